/* The heat table of an atlas, and the pictures and numbers behind the chosen cell. */
"use strict";

const atlas = JSON.parse(element("data").textContent);
const rowOf = new Map(atlas.rows.map((row) => [key(row.block, row.kind, row.window, row.control), row]));
const WORDS = {
  latent: ["latent distance", "How far the finished latent is from the unedited one, as a share of it."],
  psnr_db: ["PSNR", "Decibels between the pictures that differ, darker where they differ more."],
  lpips: ["LPIPS", "How different the pictures look to a network for photographs."],
  lost: ["lost", "Share of what was right in the unedited picture that is wrong in this one."],
  taken: ["taken", "Of what only the other prompt says, the share that the picture shows now."],
};
const MOST = { latent: 1, lpips: 0.8, lost: 1, taken: 1 };
const kinds = Object.keys(atlas.kinds);
const windows = Object.keys(atlas.windows).filter((name) => atlas.rows.some((row) => row.window === name));
const aspects = [...new Set(atlas.rows.flatMap((row) => Object.keys(row.lost_of ?? {})))];
const measures = [
  ...Object.keys(WORDS).filter((name) => atlas.rows.some((row) => row[name])),
  ...aspects.map((name) => `lost: ${name}`),
];
const chosen = { measure: measures[0], window: windows[0], block: atlas.blocks[0], kind: kinds[0] };

function key(block, kind, window, control) {
  return `${block} ${kind} ${window} ${control}`;
}

function numbersOf(row, measure) {
  if (!row) return null;
  return measure.startsWith("lost: ") ? (row.lost_of?.[measure.slice(6)] ?? null) : (row[measure] ?? null);
}

/** From 0, nothing has changed, to 1. */
function shareOf(value, measure) {
  return measure === "psnr_db" ? clamp((40 - value) / 35, 0, 1) : clamp(value / (MOST[measure] ?? 1), 0, 1);
}

const told = (number, measure) => (measure === "psnr_db" ? number.toFixed(1) : number.toFixed(2));

function interval(value, measure) {
  if (!value) return "";
  const mean = told(value.mean, measure);
  return value.low === null ? mean : `${mean}  (${told(value.low, measure)} to ${told(value.high, measure)})`;
}

function drawChoices(where, names, name, titles) {
  const buttons = names.map((one) => {
    const button = make("button", { type: "button", textContent: titles(one) });
    button.setAttribute("aria-pressed", String(chosen[name] === one));
    button.addEventListener("click", () => choose({ [name]: one }));
    return button;
  });
  element(where).replaceChildren(...buttons);
}

function drawTable() {
  const head = make("tr", {}, make("th"), ...kinds.map((kind) => make("th", { textContent: kind, scope: "col" })));
  const body = atlas.blocks.map((block) => {
    const cells = kinds.map((kind) => make("td", {}, cellOf(block, kind)));
    return make("tr", {}, make("th", { textContent: block, scope: "row" }), ...cells);
  });
  element("heat").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

function cellOf(block, kind) {
  const { measure, window } = chosen;
  const row = rowOf.get(key(block, kind, window, false));
  if (!row) return "";
  const value = numbersOf(row, measure);
  const control = numbersOf(rowOf.get(key(block, kind, window, true)), measure);
  const button = make("button", { type: "button", textContent: value ? told(value.mean, measure) : "\u2013" });
  if (value) {
    const share = shareOf(value.mean, measure);
    button.style.setProperty("--share", `${Math.round(share * 100)}%`);
    button.classList.toggle("dark", share > 0.6);
  }
  if (control) button.append(make("small", { textContent: `random ${told(control.mean, measure)}` }));
  button.dataset.block = block;
  button.dataset.kind = kind;
  if (block === chosen.block && kind === chosen.kind) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => choose({ block, kind }));
  return button;
}

function drawCell() {
  const { block, kind, window } = chosen;
  const row = rowOf.get(key(block, kind, window, false));
  const control = rowOf.get(key(block, kind, window, true));
  element("cell-title").textContent = `${block}: ${kind}, ${window === "all" ? "all steps" : `${window} steps`}`;
  element("cell-about").textContent = `In this row ${atlas.kinds[kind]}.`;
  const columns = control ? [row, control] : [row];
  const head = ["mean (95 %)", "random, as far"].slice(0, columns.length);
  const lines = row ? measures.filter((name) => columns.some((one) => numbersOf(one, name))) : [];
  const body = lines.map((name) =>
    make(
      "tr",
      {},
      make("th", { textContent: WORDS[name]?.[0] ?? name, scope: "row" }),
      ...columns.map((one) => make("td", { textContent: interval(numbersOf(one, name), name) })),
    ),
  );
  const titles = head.map((text) => make("th", { textContent: text, scope: "col" }));
  element("numbers").replaceChildren(
    make("thead", {}, make("tr", {}, make("th"), ...titles)),
    make("tbody", {}, ...body),
  );
  drawPictures(row, control);
  say(element("cell-title").textContent);
}

function drawPictures(row, control) {
  const name = `${chosen.kind}_${chosen.window}`;
  const files = [["unedited", "unedited.jpg"]];
  if (row) files.push(["edited", `${chosen.block}/${name}.jpg`]);
  if (control) files.push(["random, as far", `${chosen.block}/${name}_control.jpg`]);
  if (atlas.anchors.length) files.push(["other prompt", "other_prompt.jpg"]);
  const shown = atlas.pictures.filter((picture) => picture.kept);
  element("pictures").style.setProperty("--columns", files.length);
  element("pictures").replaceChildren(
    ...(shown.length ? files.map(([title]) => make("span", { textContent: title })) : []),
    ...shown.flatMap((picture) => [
      make("p", { textContent: picture.prompt, dir: "auto" }),
      ...files.map(([title, file]) => {
        const link = make("a", { href: `pictures/${picture.id}/${file}` });
        link.append(make("img", { src: link.getAttribute("href"), alt: title, loading: "lazy" }));
        return link;
      }),
    ]),
  );
}

const drawAll = oncePerFrame(() => {
  drawChoices("measures", measures, "measure", (name) => WORDS[name]?.[0] ?? name);
  drawChoices("windows", windows, "window", (name) => {
    const steps = atlas.windows[name];
    const which = steps.length > 1 ? `${steps[0]}\u2013${steps.at(-1)}` : steps[0];
    return name === "all" ? "all steps" : `${name} (${which})`;
  });
  const name = chosen.measure;
  element("about").textContent =
    WORDS[name]?.[1] ?? `Share of the pictures whose ${name.slice(6)} was right and is wrong now.`;
  drawTable();
  drawCell();
});

/** Change what is chosen, and show it. A kind that was not done in the window gives way to one that was. */
function choose(change) {
  Object.assign(chosen, change);
  if (!rowOf.has(key(chosen.block, chosen.kind, chosen.window, false))) {
    const done = kinds.find((kind) => rowOf.has(key(chosen.block, kind, chosen.window, false)));
    if (done) chosen.kind = done;
  }
  drawAll();
  replaceAddressSoon(() => `#${new URLSearchParams(chosen)}`);
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The arrow keys go from cell to cell. */
function moveTo(event) {
  const move = MOVES[event.key];
  if (!move) return;
  event.preventDefault();
  const next = (names, now, by) => names[clamp(names.indexOf(now) + by, 0, names.length - 1)];
  const done = kinds.filter((kind) => rowOf.has(key(chosen.block, kind, chosen.window, false)));
  choose({ block: next(atlas.blocks, chosen.block, move[0]), kind: next(done, chosen.kind, move[1]) });
}

function begin() {
  const pictures = atlas.pictures.length;
  element("title").textContent = `What is each block of ${atlas.model} for?`;
  const apart = atlas.anchors.map((row) => `pictures of other prompts are ${told(row.latent.mean, "latent")} apart`);
  element("facts").textContent = [`${pictures} pictures of ${atlas.prompts} prompts`, ...apart].join(", ");
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const known = { measure: measures, window: windows, block: atlas.blocks, kind: kinds };
  choose(Object.fromEntries(Object.entries(asked).filter(([name, value]) => known[name]?.includes(value))));
}

listenToKeys(moveTo, {});
begin();
