/* The pictures of a feature, group by group: the largest, one row per quantile, random ones, and those it is silent on. */
"use strict";

const GROUPS = {
  top: ["Where it is strongest", "the largest values, each from another prompt"],
  quantile: ["From strong to weak", "a row for each part of its range of values"],
  random: ["Any pictures it fires on", "drawn at random"],
  silent: ["Look-alikes on which it is silent", "their prompts or their pictures are near, the feature is 0"],
};

let shots = []; // of the feature that is shown: {shot, layer, canvas, peak, example, facts}

function showExamples(record, facts) {
  shots = [];
  const sections = Object.keys(GROUPS).map((kind) => groupSection(kind, record, facts));
  sections.splice(1, 0, turnedSection(record));
  element("examples").replaceChildren(...sections.filter(Boolean));
  element("examples").scrollTop = 0;
  element("examples").dataset.feature = state.feature;
  paintShots();
}

/** What turning the feature does, beside a random direction that moves every token as far; a figure per prompt. */
function turnedSection({ steering }) {
  if (!steering?.length) return null;
  const [, , , strengths, distance, score, control, above, aboveAt] = steering[0];
  const verdict = make("b", {
    className: above ? "above" : "",
    textContent: above ? "above its random direction" : "not above its random direction",
  });
  const by = distance === "lpips" ? "LPIPS" : "the distance of latents";
  const at = 2 * aboveAt.length + 1 === strengths.length ? "" : `; above at ${aboveAt.join(", ") || "no strength"}`;
  const numbers = `: score ${shortNumber(score)}, random ${shortNumber(control)}, by ${by}${at}`;
  const head = make("div", { className: "group-title" }, make("h2", { textContent: "Turned down and up" }));
  head.append(make("p", { className: "note" }, verdict, numbers));
  return make("section", { className: "group turned" }, head, ...steering.map(turnedFigure));
}

function turnedFigure([strip, random, prompt, strengths]) {
  const labels = make("div", { className: "strengths", ariaHidden: "true" });
  labels.append(...strengths.map((strength) => make("span", { textContent: strength })));
  const said = `at the strengths ${strengths.join(", ")}`;
  const rows = make("div", { className: "strips" }, labels);
  rows.style.setProperty("--count", strengths.length);
  for (const [src, name] of [
    [strip, "the feature"],
    [random, "a random direction"],
  ])
    rows.append(
      make("img", { src, alt: `${name} ${said}`, loading: "lazy" }),
      make("p", { className: "small", textContent: name }),
    );
  const caption = make("figcaption", { className: "prompt", dir: "auto", textContent: prompt });
  return make("figure", {}, caption, make("div", { className: "sideways" }, rows));
}

function groupSection(kind, record, facts) {
  const groups = record.groups.filter((group) => group.kind === kind && group.examples.length);
  if (!groups.length) return null;
  const [title, about] = GROUPS[kind];
  const head = make("div", { className: "group-title" }, make("h2", { textContent: title }));
  head.append(make("p", { className: "note", textContent: about }));
  const section = make("section", { className: `group ${kind}` }, head);
  for (const group of groups) section.append(groupRow(group, record, facts));
  return section;
}

function groupRow(group, record, facts) {
  const isText = state.stream === "txt";
  const card = isText ? textCard : pictureCard;
  const cards = make("div", { className: isText ? "sentences" : "cards" });
  cards.style.setProperty("--count", group.examples.length);
  cards.append(...group.examples.map((example) => card(example, group, record, facts.get(example.image))));
  if (group.kind !== "quantile") return cards;
  const range = make("p", { className: "range", textContent: rangeText(group) });
  return make("div", { className: "quantile-row" }, range, cards);
}

function rangeText({ low, high }) {
  if (high === null) return low === null ? "all" : `above ${shortNumber(low)}`;
  return low === null ? `below ${shortNumber(high)}` : `${shortNumber(low)} to ${shortNumber(high)}`;
}

// ---- Image tokens ---------------------------------------------------------------------------------------------------------

function pictureCard(example, group, _record, facts) {
  const parts = { ...makeShot(example.image, facts), example, facts };
  shots.push(parts);
  const silent = group.kind === "silent";
  parts.shot.setAttribute("aria-label", spokenExample(example, facts, silent));
  parts.shot.dataset.image = example.image;
  if (facts?.rows && example.token >= 0) placePeak(parts, example.token, facts);
  parts.peak.hidden = silent || !facts?.rows;
  parts.shot.addEventListener("click", (event) => {
    const token = tokenAt(event, parts.layer, facts, Math.max(0, example.token));
    inspect(example.image, token, silent ? pages.steps[0] : example.step);
  });
  const caption = make("figcaption", {}, ...captionOf(example, facts, silent));
  return make("figure", { className: "card" }, parts.shot, caption);
}

function captionOf(example, facts, silent) {
  const line = make("p", { className: "measure" });
  if (!silent) line.append(make("b", { textContent: shortNumber(example.value) }));
  const about = factsOf(example, facts, silent);
  line.append(make("span", { className: "small", textContent: about }));
  line.title = [about, facts?.seed && `seed ${facts.seed}`].filter(Boolean).join(" · ");
  const prompt = make("p", { className: "prompt", dir: "auto", textContent: facts?.prompt || "(no prompt)" });
  prompt.title = facts?.prompt ?? "";
  return [line, prompt];
}

function factsOf(example, facts, silent) {
  const step = !silent && pages.steps.length > 1 ? `step ${example.step}` : null;
  const place = silent ? null : placeOf(example.token, facts);
  return [step, place].filter(Boolean).join(" · ");
}

function placeOf(token, facts) {
  if (state.stream === "txt") return `token ${token}`;
  return facts?.rows ? `r${Math.floor(token / facts.columns)} c${token % facts.columns}` : null;
}

function spokenExample(example, facts, silent) {
  const prompt = facts?.prompt || "no prompt";
  return silent ? `Silent on: ${prompt}` : `${shortNumber(example.value)} on: ${prompt}. Look at its patches`;
}

function valueBar(value, scale) {
  const bar = make("i", { className: "bar" });
  bar.style.setProperty("--share", clamp(value / scale, 0, 1));
  return bar;
}

/** Paint all maps for the state as it is now: the step, the scale, heat or spotlight. */
function paintShots() {
  for (const parts of shots) paintMap(parts.canvas, mapAt(current.record, parts.example, parts.facts));
  showSettings();
}

/** What style alone changes. */
function showSettings() {
  const style = element("featured").style;
  style.setProperty("--opacity", state.opacity / 100);
  element("featured").classList.toggle("smooth", state.smooth);
  element("featured").classList.toggle("close", state.close);
}

// ---- Text tokens: prompts with their tokens coloured by value ----------------------------------------------------------

function textCard(example, group, record, facts) {
  const silent = group.kind === "silent";
  const line = make("p", { className: "tokens", dir: "auto" });
  const parts = { line, example, facts, canvas: make("canvas"), record };
  parts.canvas.hidden = true;
  paintTokens(parts);
  const measure = make("p", { className: "measure" });
  if (!silent)
    measure.append(valueBar(example.value, record.scale), make("b", { textContent: shortNumber(example.value) }));
  measure.append(make("span", { className: "small", textContent: factsOf(example, facts, silent) }));
  const picture = pages.pictures ? make("img", { src: thumbnailUrl(example.image), alt: "", decoding: "async" }) : "";
  const button = make("button", { type: "button", className: "thumb" }, picture);
  button.setAttribute("aria-label", spokenExample(example, facts, silent));
  button.dataset.image = example.image;
  button.addEventListener("click", () =>
    inspect(example.image, Math.max(0, example.token), silent ? pages.steps[0] : example.step),
  );
  return make("figure", { className: "sentence" }, button, make("figcaption", {}, line, measure));
}

function paintTokens({ line, example, facts, record }) {
  const words = facts?.tokens ?? [];
  const place = example.maps.length > 1 ? stepOfMap(example) : 0;
  const values = example.maps.length && place >= 0 ? mapOf(example.maps[place], pages.of.txt.tokens) : [];
  const count = Math.max(words.length, lastAbove(values) + 1);
  const texts = Array.from({ length: count }, (_, token) => tokenText(token, words));
  line.replaceChildren(...texts.map((text, token) => tokenMark(token, text, values, example, record)));
}

/** Tokens that carry their own spaces are shown as they are; others get one each. */
function tokenText(token, words) {
  const text = words[token] ?? `⟨${token}⟩`;
  return token && !words.some((word) => word.startsWith(" ")) ? ` ${text}` : text;
}

const lastAbove = (values) => values.reduce((last, value, index) => (value ? index : last), -1);

function tokenMark(token, text, values, example, record) {
  const value = values[token] ?? 0;
  const mark = make("span", { className: "token", textContent: text });
  if (!value) return mark;
  mark.classList.add("lit");
  Object.assign(mark.style, { backgroundColor: colourOf(value), color: inkOn(value) });
  mark.title = `token ${token}: ${shortNumber((value / 255) * record.scale)}`;
  if (token === example.token) mark.classList.add("most");
  return mark;
}
