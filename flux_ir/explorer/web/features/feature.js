/* The page of one feature: its head, and beside its pictures all that is known of it. */
"use strict";

const STRENGTH = ["frequency", "max_active", "mean_active", "images", "share"];
const PLACE = ["centre_x", "centre_y", "spread", "entropy", "position_r2"];

let current = { record: null, facts: new Map(), key: null }; // what is shown

/** Show the feature that the state names, once its record is there. */
async function showFeature() {
  const key = `${state.stream} ${state.feature}`;
  if (current.key === key) return refreshFeature();
  current = { record: null, facts: new Map(), key };
  try {
    const record = await loadRecord(state.stream, state.feature);
    const facts = await loadImages([
      ...new Set(record.groups.flatMap((group) => group.examples.map(({ image }) => image))),
    ]);
    if (current.key !== key) return; // another feature has been opened meanwhile
    Object.assign(current, { record, facts });
    showExamples(record, facts);
    refreshFeature();
    prefetchNeighbours();
  } catch (error) {
    if (current.key === key) showFailure(error);
  }
}

/** What depends on the state besides the feature. */
function refreshFeature() {
  if (!current.record) return;
  showFeatureHead();
  showAbout();
  showControls();
  showPatch();
}

function showFailure(error) {
  element("examples").replaceChildren(
    make("p", {
      className: "empty",
      textContent: `${error.message}. The files of pages/ belong together: write them again.`,
    }),
  );
}

/** By the order of the list, neighbours are mostly in other shards of records. */
function prefetchNeighbours() {
  for (const by of [1, 2, -1]) {
    const feature = neighbour(by);
    if (feature !== null) load(recordShard(state.stream, feature)).catch(() => {});
  }
}

// ---- The head and the controls --------------------------------------------------------------------------------------------

function showFeatureHead() {
  const { feature } = state;
  const { label } = current.record;
  const name = label?.text || `Feature ${feature}`;
  element("feature-name").textContent = name;
  document.title = `${name} · ${pages.site ?? pages.name}`;
  const at = positions[feature];
  const facts = [label?.text ? `feature ${feature}` : null, label?.text ? labelFacts(label) : null];
  facts.push(densityWord(numberOf("frequency")), meansPlace(feature) ? "a place" : null);
  facts.push(
    at >= 0 ? `${grouped(at + 1)} of ${grouped(order.length)} in the list` : "not in the list as it is filtered",
  );
  element("feature-facts").replaceChildren(
    ...facts
      .filter(Boolean)
      .map((fact) => make("span", { textContent: fact, className: fact === "a place" ? "flag" : "" })),
  );
  element("to-list").href = addressOf({ feature: null, picture: null, token: null, step: null });
}

/** How good a label is: how well it tells the feature's pictures from look-alikes that nobody had described. */
function labelFacts({ source, score, low, high }) {
  const from = source ? `label from ${source}` : "label";
  if (!Number.isFinite(score)) return from;
  const range = Number.isFinite(low) ? ` (${shortNumber(low)} to ${shortNumber(high)})` : "";
  return `${from}, score ${shortNumber(score)}${range}`;
}

function showControls() {
  const { record } = current;
  const maps = pages.of[state.stream].maps;
  for (const button of element("overlays").children) {
    button.setAttribute("aria-pressed", button.dataset.overlay === state.overlay);
    button.disabled = !maps && button.dataset.overlay !== "none";
  }
  for (const [id, on] of [
    ["smooth", state.smooth],
    ["close", state.close],
  ]) {
    element(id).setAttribute("aria-pressed", on);
    element(id).hidden = !maps || state.stream === "txt";
  }
  element("overlays").hidden = state.stream === "txt";
  element("opacity").value = state.opacity;
  element("opacity").closest("label").hidden = !maps || state.stream === "txt";
  element("top").value = state.top;
  element("scale").hidden = !maps;
  showLegend(record.scale);
  showMapSteps(record);
  for (const id of ["list-streams", "feature-streams"])
    for (const button of element(id).children)
      button.setAttribute("aria-pressed", button.dataset.stream === state.stream);
}

/** Maps of one step for all pictures, where the record holds those of every step. */
function showMapSteps(record) {
  const every = record.groups.some((group) => group.examples.some((example) => example.maps.length > 1));
  const group = element("maps");
  group.hidden = !every;
  if (!every) return;
  const choices = [["", "its step"], ...pages.steps.map((step) => [String(step), `${step}`])];
  if (choices.length > 10) choices.splice(10);
  group.replaceChildren(
    ...choices.map(([at, text]) => {
      const button = make("button", { type: "button", textContent: text });
      button.setAttribute("aria-pressed", state.at === at);
      button.title = at ? `maps at step ${at}` : "each map at the step of its largest value";
      button.addEventListener("click", () => act(() => (state.at = at)));
      return button;
    }),
  );
}

// ---- What is known of it ----------------------------------------------------------------------------------------------------

function showAbout() {
  const { record, facts } = current;
  const key = `${current.key} ${Boolean(texts)} ${state.at}`;
  if (element("about").dataset.key === key) return;
  element("about").dataset.key = key;
  element("about").replaceChildren(
    ...[
      panel("How strong, how often", histogramChart(record), numberList(STRENGTH)),
      pages.steps.length > 1 && panel("Over the steps", profileChart(record), profileNote()),
      placePanel(record, facts),
      tokensPanel(record),
      wordsPanel(record),
      labelPanel(record),
      neighboursPanel("Nearest directions", record.nearest, "cosine"),
      neighboursPanel("Fires together with", record.together, "Jaccard"),
      picturesPanel("What it draws", record.draws),
      panel("Judged", numberList(otherNumbers())),
      missingPanel(),
    ].filter(Boolean),
  );
}

function panel(title, ...content) {
  const kept = content.filter(Boolean);
  return kept.length ? make("section", { className: "panel" }, make("h2", { textContent: title }), ...kept) : null;
}

/** Stages that have not been run, and which command runs each. */
function missingPanel() {
  const rows = pages.missing.map((text) => make("p", { className: "note", textContent: text }));
  return panel("Not computed yet", ...rows);
}

/** The columns that no other panel shows. */
function otherNumbers() {
  return columnsOf()
    .map((column) => column.name)
    .filter((name) => !STRENGTH.includes(name) && !PLACE.includes(name) && name !== "peak_step");
}

function numberList(names) {
  if (!names.some(columnNamed)) return null;
  const terms = make("dl", { className: "facts-list" });
  for (const column of names.map(columnNamed).filter(Boolean)) {
    const term = make("dt", { textContent: column.title, title: column.about });
    terms.append(term, make("dd", { textContent: formatted(numberOf(column.name), column.unit) }));
  }
  return terms;
}

function profileNote() {
  const text = "Bars: share of the tokens it fires on. Line: mean over all tokens.";
  return make("p", { className: "note", textContent: text });
}

function placePanel(record, facts) {
  if (state.stream === "txt" || !pages.of[state.stream].maps) return null;
  const said = meansPlace(state.feature)
    ? `It means a place: where a token lies explains ${shortPercent(100 * numberOf("position_r2"))} % of it.`
    : "Ring: centre and spread of all its activation. Heat: the mean of its top pictures.";
  const numbers = numberList(PLACE);
  const frame = placeChart(record, facts);
  return panel(
    "Where in the picture",
    make("div", { className: "where-row" }, frame ?? "", numbers),
    make("p", { className: "note", textContent: said }),
  );
}

function wordsPanel(record) {
  if (!record.words?.length) return null;
  const most = Math.max(...record.words.map(([, lift]) => lift), 1e-9);
  const rows = record.words.map(([word, lift, count]) => {
    const link = make("a", {
      textContent: word,
      dir: "auto",
      href: addressOf({ feature: null, picture: null, token: null, find: quoted(word) }),
    });
    link.title = "List the features whose top pictures have this word";
    return make(
      "li",
      {},
      link,
      valueBar(lift, most),
      make("span", { className: "small", textContent: `${shortNumber(lift)} · ${grouped(count)}` }),
    );
  });
  const note = make("p", {
    className: "note",
    textContent: "How much more often than by chance [PMI, bits], and in how many prompts.",
  });
  return panel("Words that lift it", make("ul", { className: "ranked" }, ...rows), note);
}

/** A description that did not do well enough to be a label, and how well it did. */
function labelPanel({ label }) {
  if (!label || label.text || !label.candidate) return null;
  const note = make("p", { className: "note" }, "The best description, no better than the bar for a label: ");
  note.append(make("b", { textContent: label.candidate }), `, score ${shortNumber(label.score)} where chance is .5.`);
  return panel("No label", note);
}

/** Of a feature of text tokens: the tokens it fires on, by their share of its activation. */
function tokensPanel(record) {
  if (!record.tokens?.length) return null;
  const most = Math.max(...record.tokens.map(([, mean]) => mean), 1e-9);
  const rows = record.tokens.map(([token, mean, fired, of]) => {
    const counts = make("span", { className: "small", textContent: `${grouped(fired)} of ${grouped(of)}` });
    const name = make("b", { className: "token-name", textContent: token });
    return make("li", {}, name, valueBar(mean, most), counts);
  });
  const note = "Bar: mean activation. How often it fires on the token, of how often the token is there.";
  return panel(
    "Tokens it fires on",
    make("ul", { className: "ranked" }, ...rows),
    make("p", { className: "note", textContent: note }),
  );
}

const quoted = (word) => (/[\s<>="]|^-|^is:/.test(word) ? `"${word.replaceAll('"', "")}"` : word);

function neighboursPanel(title, pairs, measure) {
  if (!pairs?.length) return null;
  const rows = pairs.map(([feature, value]) =>
    make(
      "li",
      {},
      featureLink(feature),
      valueBar(value, 1),
      make("span", { className: "small", textContent: shortNumber(value) }),
    ),
  );
  return panel(`${title}, by ${measure}`, make("ul", { className: "ranked near" }, ...rows));
}

/** A link to a feature with its strongest picture and its label. */
function featureLink(feature) {
  const thumb = makeThumb();
  paintThumb(thumb, feature, 0);
  const name = make("span", { className: "text", textContent: texts?.labels[feature] || texts?.words[feature] || "" });
  const link = make("a", {
    className: "feature-link",
    href: addressOf({ feature, picture: null, token: null, step: null }),
  });
  link.append(thumb.frame, make("b", { textContent: feature }), name);
  link.dataset.feature = feature;
  return link;
}

/** Pictures of the feature that a later stage made. */
function picturesPanel(title, pictures) {
  if (!pictures?.length) return null;
  const figures = pictures.map(([address, caption]) =>
    make(
      "figure",
      {},
      make("img", { src: address, alt: caption }),
      make("figcaption", { className: "small", textContent: caption }),
    ),
  );
  return panel(title, make("div", { className: "draws" }, ...figures));
}
