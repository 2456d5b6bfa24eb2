/* The page's one script, in the order things happen: data, state, address bar, pictures, then one part per region.
   Texts from runs reach the page as textContent alone. The data's schema is in docs/file-formats.md. */
"use strict";

const REST_MS = 40; // a pointer that sweeps over the grid loads no large picture before it rests
const ADDRESS_MS = 200; // browsers refuse more than about 200 changes of the address in 30 s
const PLAY_MS = 125;
const PLAY_CALM_MS = 700; // where less motion is asked for
const CELL_PX = { least: 16, most: 104, fine: 40 };
const STICKY_PX = 56; // the two sticky heads of the grid
const CURVES_PX = { height: 168, left: 34, right: 12, top: 12, bottom: 30 };
const NOTES = {
  euler: "The state the sampler would go to, had this block been the last.",
  x0: "The clean image each block believes in.",
  difference: "What each block changed: its picture minus that of the block before, four times brighter",
};
const NUMBERS = [
  ["flow time", "t before the step: 1 is noise, 0 is the image", (shot) => shot.run.times[shot.step]?.[0].toFixed(3)],
  [
    "relative distance",
    "of the velocity to the step’s final one",
    (shot) => number(shot, "relative_distance")?.toFixed(3),
  ],
  ["cosine", "of the velocity and the step’s final one", (shot) => number(shot, "cosine")?.toFixed(3)],
  ["PSNR, dB", "of the picture against the finished one", (shot) => number(shot, `psnr_${shot.mode}_db`)?.toFixed(1)],
];

const { runs } = JSON.parse(element("explorer-data").textContent);

// ---- Small words ---------------------------------------------------------------------------------------------------

const spoken = (block) => block.replace(".", " "); // "double.7" as people say it
const lensesOf = (run) => Object.keys(run.lenses);
const modesOf = (run) => [...lensesOf(run), "difference"];

// ---- State: one cell is selected, one may be hovered, up to two are pinned --------------------------------------------

const state = { run: runs[0], block: 0, step: 0, mode: "", lens: "", wall: false, pins: [], zoom: 1 };
let hovered = null; // {block, step}: looked at while the pointer is there, never in the address
let playing = null;

/** A shot is one picture: everything that is needed to draw it and to name it. */
function shotAt({ block, step }, run = state.run) {
  const lens = lensesOf(run).includes(state.lens) ? state.lens : lensesOf(run)[0];
  const mode = state.mode === "difference" ? "difference" : lens;
  return { run, block, step, mode, lens };
}

const looked = () => shotAt(hovered ?? state);
const number = (shot, name) => shot.run.numbers[name]?.[shot.block][shot.step] ?? undefined;
const placeOf = (shot) => `${spoken(shot.run.blocks[shot.block])}, step ${shot.run.steps[shot.step]}`;
const modeOf = (shot) => (shot.mode === "difference" ? `difference, ${shot.lens}` : shot.mode);
const sameShot = (a, b) => nameOf(a) === nameOf(b);

/** The same block and step in another run, or null where it has none. */
function sameCell(run, shot) {
  const block = run.blocks.indexOf(shot.run.blocks[shot.block]);
  const step = run.steps.indexOf(shot.run.steps[shot.step]);
  return block < 0 || step < 0 ? null : shotAt({ block, step }, run);
}

function setMode(mode) {
  if (!modesOf(state.run).includes(mode)) return;
  state.mode = mode;
  if (mode !== "difference") state.lens = mode;
}

function defaultMode() {
  setMode(lensesOf(state.run).includes("x0") ? "x0" : lensesOf(state.run)[0]);
}

/** The view that says most: x0 half way down and half way through. Without x0 the last step, where euler is clean too. */
function defaultView() {
  defaultMode();
  const { blocks, steps } = state.run;
  select(blocks.length >> 1, state.mode === "x0" ? steps.length >> 1 : steps.length - 1);
}

function select(block, step) {
  hovered = null;
  state.block = clamp(block, 0, state.run.blocks.length - 1);
  state.step = clamp(step, 0, state.run.steps.length - 1);
}

/** The first pin is A; the next is B, and from then on a new one takes the place of B. */
function togglePin(shot) {
  const at = state.pins.findIndex((pin) => sameShot(pin, shot));
  if (at >= 0) state.pins.splice(at, 1);
  else state.pins = [...state.pins.slice(0, 1), shot];
  say(
    at >= 0 ? `${placeOf(shot)} is no longer pinned` : `${placeOf(shot)} is pinned as ${"AB"[state.pins.length - 1]}`,
  );
}

// ---- The address bar: #block=double.7&step=2&mode=x0&generation=1a2b3c4d ---------------------------------------------

/** A shot as the address names it: 1a2b3c4d.double.7.2.x0 */
function nameOf(shot) {
  const words = [shot.run.id, shot.run.blocks[shot.block], shot.run.steps[shot.step], shot.mode];
  return (shot.mode === "difference" ? [...words, shot.lens] : words).join(".");
}

function shotNamed(name) {
  const [id, kind, index, number, mode, subtracted] = name.split(".");
  const run = runs.find((known) => known.id === id);
  if (!run || !modesOf(run).includes(mode)) return null;
  const block = run.blocks.indexOf(`${kind}.${index}`);
  const step = run.steps.indexOf(Number(number));
  const lens = mode === "difference" ? subtracted : mode;
  return block >= 0 && step >= 0 && lensesOf(run).includes(lens) ? { run, block, step, mode, lens } : null;
}

function addressText() {
  const { run, block, step, mode } = state;
  const words = [`block=${run.blocks[block]}`, `step=${run.steps[step]}`, `mode=${mode}`];
  if (mode === "difference") words.push(`lens=${state.lens}`);
  words.push(`generation=${run.id}`);
  if (state.wall) words.push("view=gallery");
  if (state.pins.length) words.push(`pins=${state.pins.map(nameOf).join(",")}`);
  return `#${words.join("&")}`;
}

/** Take the state from the address; what it does not say, or says of things that are not there, stays as it is. */
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.run = runs.find((run) => run.id === words.get("generation")) ?? state.run;
  const block = state.run.blocks.indexOf(words.get("block"));
  const step = words.has("step") ? state.run.steps.indexOf(Number(words.get("step"))) : -1;
  select(block < 0 ? state.block : block, step < 0 ? state.step : step);
  if (!modesOf(state.run).includes(state.mode)) defaultMode();
  if (words.has("lens")) setMode(words.get("lens"));
  if (words.has("mode")) setMode(words.get("mode"));
  state.wall = runs.length > 1 && words.get("view") === "gallery";
  state.pins = (words.get("pins") ?? "").split(",").map(shotNamed).filter(Boolean).slice(0, 2);
}

let addressTimer = null;

function writeAddressSoon() {
  clearTimeout(addressTimer);
  if (playing === null) addressTimer = setTimeout(() => history.replaceState(null, "", addressText()), ADDRESS_MS);
}

// ---- Pictures: thumbnails are cut from bands, large pictures are loaded when looked at --------------------------------

const inlined = new Map();

/** The URL behind an address of the data: itself, or a blob of the element it names (null if that is not there yet). */
function urlOf(address) {
  if (!address?.startsWith("#")) return address;
  const holder = inlined.has(address) ? null : element(address.slice(1));
  if (holder) {
    const bytes = Uint8Array.from(atob(holder.textContent), (letter) => letter.charCodeAt(0));
    inlined.set(address, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
  }
  return inlined.get(address) ?? null;
}

function pictureUrl(run, lens, block, step) {
  const [kind, index] = run.blocks[block].split(".");
  const { pictures } = run.lenses[lens];
  return urlOf(pictures.replace("{kind}", kind).replace("{block}", index).replace("{step}", run.steps[step]));
}

const missing = new Map(); // run -> lens -> Set of "row,column"

function isMissing(run, lens, block, step) {
  if (!missing.has(run))
    missing.set(run, new Map(lensesOf(run).map((name) => [name, new Set(run.lenses[name].missing.map(String))])));
  return missing.get(run).get(lens).has(`${block},${step}`);
}

/** The blocks whose pictures make up a shot: one, or two to subtract; none where there is no such picture. */
function layersOf({ run, lens, mode, block, step }) {
  const blocks = mode === "difference" ? [block, block - 1] : [block];
  return blocks.every((index) => index >= 0 && !isMissing(run, lens, index, step)) ? blocks : [];
}

function bandOf(run, lens, block) {
  const { rows_per_band: most } = run.tiles;
  const index = Math.floor(block / most);
  const rows = Math.min(most, run.blocks.length - index * most);
  return { image: `url("${urlOf(run.lenses[lens].bands[index])}")`, row: block - index * most, rows };
}

/** Fill an element with one thumbnail, or with the difference of two. */
function paintCrop(crop, shot, layers) {
  const columns = shot.run.steps.length;
  const bands = layers.map((block) => bandOf(shot.run, shot.lens, block));
  const across = columns > 1 ? (100 * shot.step) / (columns - 1) : 0;
  crop.classList.toggle("difference", shot.mode === "difference");
  crop.style.backgroundImage = bands.map((band) => band.image).join(", ") || "none";
  crop.style.backgroundSize = bands.map((band) => `${100 * columns}% ${100 * band.rows}%`).join(", ");
  crop.style.backgroundPosition = bands
    .map((band) => `${across}% ${band.rows > 1 ? (100 * band.row) / (band.rows - 1) : 0}%`)
    .join(", ");
}

/** Show a shot in a frame: its thumbnail at once, then the large picture if it is wanted and still the one to show. */
function showShot(frame, shot, { large }) {
  const key = `${nameOf(shot)} ${large}`;
  if (frame.dataset.shot === key) return;
  frame.dataset.shot = key;
  const layers = layersOf(shot);
  const crop = frame.querySelector(".crop") ?? make("span", { className: "crop" });
  frame.replaceChildren(crop);
  frame.classList.toggle("difference", shot.mode === "difference");
  frame.setAttribute("role", "img");
  frame.setAttribute("aria-label", describe(shot, layers));
  paintCrop(crop, shot, layers);
  if (large && layers.length) setTimeout(() => showLarge(frame, key, shot, layers), REST_MS);
}

async function showLarge(frame, key, shot, layers) {
  if (frame.dataset.shot !== key) return;
  const urls = layers.map((block) => pictureUrl(shot.run, shot.lens, block, shot.step));
  if (urls.includes(null)) return; // inside the page, and not yet read
  const images = urls.map((url, index) => make("img", { src: url, alt: index ? "" : describe(shot, layers) }));
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    if (frame.dataset.shot === key) say(`The picture of ${placeOf(shot)} could not be loaded`);
    return;
  }
  if (frame.dataset.shot === key) frame.append(...images);
}

function describe(shot, layers) {
  if (!layers.length) return `${placeOf(shot)}: no picture`;
  const what = { euler: "the state the sampler would go to", x0: "the clean image it believes in" }[shot.mode];
  return `${placeOf(shot)}: ${what ?? `what it changed (${modeOf(shot)})`}`;
}

// ---- The head ----------------------------------------------------------------------------------------------------------

function factsOf(run) {
  const day = /^(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)/.exec(run.timestamp ?? "");
  return [
    run.model,
    run.seed === null ? null : `seed ${run.seed}`,
    run.num_steps === null ? null : `${run.num_steps} steps`,
    run.guidance === null ? null : `guidance ${run.guidance}`,
    run.width && run.height ? `${run.width} × ${run.height} px` : null,
    day && `${day[1]}-${day[2]}-${day[3]} ${day[4]}:${day[5]}`,
    run.id,
  ].filter(Boolean);
}

const factList = (facts) => facts.map((fact) => make("span", { textContent: fact }));

function showHead() {
  const { run } = state;
  const finished = element("finished");
  finished.hidden = run.picture === null;
  if (run.picture !== null) finished.src = urlOf(run.picture);
  finished.alt = `The finished picture of generation ${run.id}`;
  element("prompt").textContent = run.prompt || "(no prompt)";
  element("facts").replaceChildren(...factList(factsOf(run)));
  unfoldPrompt(false);
}

function unfoldPrompt(whole) {
  const prompt = element("prompt");
  prompt.classList.toggle("whole", whole);
  element("more").setAttribute("aria-expanded", whole);
  element("more").textContent = whole ? "Show less" : "Show all";
  element("more").hidden = !whole && prompt.scrollHeight <= prompt.clientHeight + 2;
}

function showTools() {
  for (const button of element("modes").children) {
    const there = modesOf(state.run).includes(button.dataset.mode);
    button.disabled = !there;
    button.title = there
      ? ""
      : `not decoded: flux-ir lens --generation_id ${state.run.id} --lens ${button.dataset.mode}`;
    button.setAttribute("aria-pressed", button.dataset.mode === state.mode);
  }
  element("mode-note").textContent = NOTES[state.mode] + (state.mode === "difference" ? ` (${state.lens}).` : "");
  element("wall").hidden = runs.length < 2;
  element("wall").setAttribute("aria-pressed", state.wall);
  element("play").setAttribute("aria-pressed", playing !== null);
  element("play").textContent = playing === null ? "Play" : "Stop";
  element("room").classList.toggle("wall", state.wall);
}

// ---- The grid: one film per row, drawn as a background, and transparent cells above it --------------------------------

let cells = []; // [block][step]
let films = []; // [block]
let heads = { blocks: [], steps: [] };
let marked = []; // cells that carry a mark now

function buildGrid() {
  const { run } = state;
  const grid = element("grid");
  [cells, films, marked, heads] = [[], [], [], { blocks: [], steps: [] }];
  const kinds = ["double", "single"].filter((kind) => run.blocks.some((block) => block.startsWith(kind)));
  grid.replaceChildren(stepRow(run), ...kinds.map((kind) => blockGroup(run, kind)));
  sizeCells();
  paintFilms();
}

const row = (className, ...children) => {
  const made = make("div", { className: `row ${className}` }, ...children);
  made.setAttribute("role", "row");
  return made;
};

const head = (role, className, text, label = text) => {
  const made = make("span", { className, textContent: text });
  made.setAttribute("role", role);
  if (label !== text) made.setAttribute("aria-label", label);
  return made;
};

function stepRow(run) {
  heads.steps = run.steps.map((step) => head("columnheader", "step-head", String(step), `step ${step}`));
  run.times.forEach(
    (time, index) => time && (heads.steps[index].title = `flow time ${time[0].toFixed(3)} → ${time[1].toFixed(3)}`),
  );
  return row("steps", head("columnheader", "corner-head", "step →", "block"), ...heads.steps);
}

function blockGroup(run, kind) {
  const blocks = run.blocks.map((name, index) => ({ name, index })).filter(({ name }) => name.startsWith(kind));
  const streams = { double: "text and image apart", single: "text and image as one" }[kind];
  const name = head("rowheader", "group-head", `${kind} blocks`);
  name.append(make("small", { textContent: streams }));
  const group = make(
    "div",
    { className: "group" },
    row("name", name),
    ...blocks.map(({ index }) => blockRow(run, index)),
  );
  group.setAttribute("role", "rowgroup");
  group.setAttribute("aria-label", `${kind} blocks`);
  return group;
}

function blockRow(run, block) {
  films[block] = make("div", { className: "film" });
  cells[block] = run.steps.map((_, step) => cellAt(run, block, step));
  heads.blocks[block] = head("rowheader", "row-head", run.blocks[block].split(".")[1], `${spoken(run.blocks[block])}`);
  const tiles = make("div", { className: "tiles" }, films[block], ...cells[block]);
  tiles.setAttribute("role", "presentation");
  return row("blocks", heads.blocks[block], tiles);
}

function cellAt(run, block, step) {
  const cell = make("div", { className: "cell", tabIndex: -1 });
  cell.place = { block, step };
  cell.dataset.block = run.blocks[block];
  cell.dataset.step = run.steps[step];
  cell.setAttribute("role", "gridcell");
  cell.setAttribute("aria-label", `${spoken(run.blocks[block])}, step ${run.steps[step]}`);
  return cell;
}

/** Cells as wide as there is room for, between bounds that keep them readable. */
function sizeCells() {
  const { steps, tiles } = state.run;
  const room = element("scroller").clientWidth - heads.blocks[0].offsetWidth - 4;
  const fitting = clamp(Math.floor(room / steps.length), CELL_PX.least, CELL_PX.most);
  const cell = clamp(Math.round(fitting * state.zoom), 12, 256);
  const grid = element("grid");
  grid.style.setProperty("--cell", `${cell}px`);
  grid.style.setProperty(
    "--cell-height",
    `${Math.max(8, Math.round((cell * tiles.tile_height_px) / tiles.tile_width_px))}px`,
  );
  grid.classList.toggle("fine", cell < CELL_PX.fine);
}

function paintFilms() {
  const { run } = state;
  for (const [block, film] of films.entries()) {
    const shots = run.steps.map((_, step) => shotAt({ block, step }));
    const bands = (state.mode === "difference" && block > 0 ? [block, block - 1] : [block]).map((index) =>
      bandOf(run, shots[0].lens, index),
    );
    film.classList.toggle("difference", state.mode === "difference");
    film.style.backgroundImage = bands.map((band) => band.image).join(", ");
    film.style.backgroundSize = bands
      .map((band) => `calc(var(--cell) * ${run.steps.length}) calc(var(--cell-height) * ${band.rows})`)
      .join(", ");
    film.style.backgroundPosition = bands.map((band) => `0 calc(var(--cell-height) * ${-band.row})`).join(", ");
    shots.forEach((shot, step) => markAbsent(cells[block][step], layersOf(shot).length === 0));
  }
}

function markAbsent(cell, absent) {
  if (cell.classList.contains("absent") === absent) return;
  cell.classList.toggle("absent", absent);
  const { block, step } = cell.dataset;
  cell.setAttribute("aria-label", `${spoken(block)}, step ${step}${absent ? ", no picture" : ""}`);
}

function showMarks() {
  for (const node of marked) {
    node.classList.remove("on", "hover");
    if (node.place) [node.tabIndex, node.ariaSelected] = [-1, null];
    delete node.dataset.pin;
  }
  const here = looked();
  const chosen = cells[state.block][state.step];
  marked = [chosen, cells[here.block][here.step], heads.blocks[here.block], heads.steps[here.step]];
  chosen.classList.add("on");
  [chosen.tabIndex, chosen.ariaSelected] = [0, "true"];
  if (hovered) marked[1].classList.add("hover");
  marked[2].classList.add("on");
  marked[3].classList.add("on");
  state.pins.forEach((pin, index) => {
    if (pin.run !== state.run) return;
    const cell = cells[pin.block][pin.step];
    cell.dataset.pin = (cell.dataset.pin ?? "") + "AB"[index];
    marked.push(cell);
  });
}

// ---- The viewer: what is looked at, or two pins under a slider ---------------------------------------------------------

function showViewer() {
  const here = looked();
  const [a, b] = state.pins;
  const comparing = Boolean(b);
  const under = comparing ? a : here;
  element("stage").style.setProperty("--aspect", under.run.tiles.tile_width_px / under.run.tiles.tile_height_px);
  showShot(element("shot-a"), under, { large: true });
  if (comparing) showShot(element("shot-b"), b, { large: true });
  for (const id of ["shot-b", "corner-a", "corner-b", "split"]) element(id).hidden = !comparing;
  const empty = !comparing && !layersOf(here).length;
  element("nothing").hidden = !empty;
  element("nothing").textContent =
    here.mode === "difference" && here.block === 0 ? "No block comes before this one." : "Not decoded.";
  element("place").textContent = comparing ? "A beside B" : spoken(here.run.blocks[here.block]);
  element("where").textContent = comparing
    ? "Drag across the picture, or use the arrow keys on the slider."
    : `Step ${here.run.steps[here.step]} · ${modeOf(here)}`;
  showPins();
  showNumbers(here);
  element("hint").textContent = [
    "Click a cell, or press Enter, to pin its picture.",
    "Pin a second picture to compare it with A.",
    "A further pin takes the place of B. Esc takes both out.",
  ][state.pins.length];
}

function showPins() {
  const list = element("pins");
  const key = state.pins.map(nameOf).join(",");
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...state.pins.map((pin, index) => {
      const generation = runs.length > 1 ? `, ${pin.run.id}` : "";
      const text = `${placeOf(pin)}, ${modeOf(pin)}${generation}`;
      const button = make("button", { type: "button" }, make("b", { textContent: "AB"[index] }), `${text}  ×`);
      button.setAttribute("aria-label", `Take out pin ${"AB"[index]}: ${text}`);
      button.addEventListener("click", () => act(() => togglePin(pin)));
      return make("li", {}, button);
    }),
  );
}

/** One column per pin, and one for what is looked at unless that is pinned too. */
function showNumbers(here) {
  const shots = state.pins.some((pin) => sameShot(pin, here)) ? state.pins : [...state.pins, here];
  const names = shots.map((_, index) => (index < state.pins.length ? "AB"[index] : "here"));
  const heads = names.map((name) => make("th", { textContent: name, scope: "col" }));
  element("numbers-table").classList.toggle("compared", shots.length > 1);
  element("numbers-head").replaceChildren(...(state.pins.length ? [make("tr", {}, make("td"), ...heads)] : []));
  element("numbers").replaceChildren(...NUMBERS.map((entry) => numberRow(entry, shots)));
}

function numberRow([label, meaning, value], shots) {
  const head = make("th", { scope: "row", textContent: label });
  head.append(make("small", { textContent: meaning }));
  return make("tr", {}, head, ...shots.map((shot) => make("td", { textContent: value(shot) ?? "–" })));
}

// ---- Curves: distance to the final answer by depth, one line per step --------------------------------------------------

let curves = null; // {x, y, paths}: how the lines of this run were drawn

function buildCurves() {
  const svg = element("curves");
  const distances = state.run.numbers.relative_distance;
  element("no-curves").hidden = Boolean(distances);
  svg.toggleAttribute("hidden", !distances);
  element("legend").hidden = !distances || state.run.steps.length < 2;
  curves = null;
  if (!distances || !svg.clientWidth) return;
  const { height, left, right, top, bottom } = CURVES_PX;
  const last = Math.max(1, state.run.blocks.length - 1);
  const most = niceCeiling(Math.max(...distances.flat().filter((value) => value !== null)));
  const x = (block) => left + ((svg.clientWidth - left - right) * block) / last;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
  const paths = state.run.steps.map((_, step) =>
    pathOf(
      distances.map((values) => values[step]),
      x,
      y,
    ),
  );
  const lines = paths.map((path, step) => draw("path", { class: "line", d: path }));
  lines.forEach((line, step) =>
    line.style.setProperty("--progress", `${(100 * step) / Math.max(1, lines.length - 1)}%`),
  );
  svg.setAttribute("viewBox", `0 0 ${svg.clientWidth} ${height}`);
  svg.replaceChildren(...axes(x, y, most, svg.clientWidth - right), ...lines, draw("g", { class: "marks" }));
  element("legend").firstElementChild.textContent = `step ${state.run.steps[0]}`;
  element("legend").lastElementChild.textContent = state.run.steps.at(-1);
  curves = { x, y, paths, width: svg.clientWidth };
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value || 1));
  return Math.max(1, [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((ceiling) => ceiling >= value) ?? 1);
}

function pathOf(values, x, y) {
  let pen = "M";
  let path = "";
  values.forEach((value, block) => {
    if (value !== null) path += `${pen}${x(block).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value === null ? "M" : "L";
  });
  return path;
}

function axes(x, y, most, end) {
  const { blocks } = state.run;
  const every = [1, 2, 5, 10].find((pace) => blocks.length / pace <= 24) ?? 20;
  const first = blocks.findIndex((block) => block.startsWith("single"));
  const marks = [0, most / 2, most].flatMap((value) => [
    draw("line", { class: value ? "axis mid" : "axis", x1: x(0), x2: end, y1: y(value), y2: y(value) }),
    draw("text", { x: x(0) - 8, y: y(value) + 4, "text-anchor": "end" }, String(value)),
  ]);
  blocks.forEach((block, index) => {
    const digits = block.split(".")[1];
    if (digits % every === 0) marks.push(draw("text", { x: x(index), y: y(0) + 14, "text-anchor": "middle" }, digits));
  });
  if (first !== 0) marks.push(draw("text", { x: x(0), y: y(0) + 28, "text-anchor": "start" }, "double"));
  if (first > 0)
    marks.push(draw("line", { class: "axis", x1: x(first - 0.5), x2: x(first - 0.5), y1: y(most), y2: y(0) + 28 }));
  if (first >= 0) marks.push(draw("text", { x: x(first), y: y(0) + 28, "text-anchor": "start" }, "single"));
  return marks;
}

function showCurveMarks() {
  if (!curves) return;
  const here = looked();
  const { x, y, paths, width } = curves;
  const distance = number(here, "relative_distance");
  const step = here.run.steps[here.step];
  const marks = [draw("line", { class: "guide", x1: x(here.block), x2: x(here.block), y1: CURVES_PX.top, y2: y(0) })];
  marks.push(draw("path", { class: "here", d: paths[here.step] }));
  if (distance !== undefined) {
    const flip = x(here.block) > width * 0.7;
    marks.push(draw("circle", { cx: x(here.block), cy: y(distance), r: 5 }));
    const place = { class: "say", x: x(here.block) + (flip ? -10 : 10), y: Math.max(22, y(distance) - 8) };
    marks.push(
      draw("text", { ...place, "text-anchor": flip ? "end" : "start" }, `step ${step}: ${distance.toFixed(3)}`),
    );
  }
  element("curves").lastElementChild.replaceChildren(...marks);
  const said = distance === undefined ? "unknown" : distance.toFixed(3);
  element("curves").setAttribute(
    "aria-label",
    `Relative distance to the final answer by depth. ${placeOf(here)}: ${said}.`,
  );
}

/** The cell whose point on the curves is nearest to the pointer: first the block, then the step. */
function cellNear(event) {
  if (!curves) return null;
  const box = element("curves").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const { blocks, steps, numbers } = state.run;
  const block = nearest(blocks.length, (index) => Math.abs(curves.x(index) - x));
  const values = numbers.relative_distance[block];
  const step = nearest(steps.length, (index) =>
    values[index] === null ? Infinity : Math.abs(curves.y(values[index]) - y),
  );
  return { block, step };
}

function nearest(count, distance) {
  let best = 0;
  for (let index = 1; index < count; index += 1) if (distance(index) < distance(best)) best = index;
  return best;
}

// ---- Generations: prompt, model, seed, the finished picture, and the same block of each --------------------------------

const cards = new Map(); // run -> its parts

function buildGallery() {
  element("gallery").hidden = runs.length < 2;
  element("room").classList.toggle("many", runs.length > 1);
  if (runs.length > 1) element("gallery").replaceChildren(...runs.map(buildCard));
}

function buildCard(run) {
  const finished = make("span", { className: "frame" });
  if (run.picture) finished.append(make("img", { src: urlOf(run.picture), alt: "", loading: "lazy" }));
  const frame = make("span", { className: "frame shot" });
  frame.style.position = "relative";
  const caption = make("span");
  const button = make(
    "button",
    { type: "button" },
    finished,
    frame,
    make("span", { textContent: "finished" }),
    caption,
  );
  button.style.setProperty("--aspect", run.tiles.tile_width_px / run.tiles.tile_height_px);
  button.setAttribute("aria-label", `Show generation ${run.id}`);
  button.addEventListener("click", () => act(() => openRun(run)));
  const facts = make("p", { className: "facts" }, ...factList([run.model, `seed ${run.seed}`, run.id]));
  const chosen = make("p", { className: "facts chosen", textContent: "shown in the grid" });
  const text = make("p", { className: "text", dir: "auto", textContent: run.prompt || "(no prompt)" });
  const card = make("article", { className: "card" }, button, text, facts, chosen);
  cards.set(run, { card, button, frame, caption, chosen });
  return card;
}

function showGallery() {
  if (runs.length < 2) return;
  const here = looked();
  for (const [run, { card, button, frame, caption, chosen }] of cards) {
    const shot = sameCell(run, here);
    card.classList.toggle("on", run === state.run);
    chosen.hidden = run !== state.run;
    button.setAttribute("aria-current", run === state.run);
    caption.textContent = shot ? `${placeOf(shot)}, ${modeOf(shot)}` : "no such block or step";
    if (shot) showShot(frame, shot, { large: state.wall });
    else clearFrame(frame);
  }
}

function clearFrame(frame) {
  frame.replaceChildren();
  delete frame.dataset.shot;
}

function openRun(run) {
  const same = sameCell(run, shotAt(state));
  state.run = run;
  if (!modesOf(run).includes(state.mode)) defaultMode();
  select(same?.block ?? state.block, same?.step ?? state.step);
  showRun();
}

// ---- What people do ------------------------------------------------------------------------------------------------------

let drawing = false;

/** Do something to the state, then show it, once per frame at most. */
function act(change) {
  change();
  showTools();
  writeAddressSoon();
  showSoon();
}

function showSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    showMarks();
    showViewer();
    showCurveMarks();
    showGallery();
  });
}

function showRun() {
  showHead();
  buildGrid();
  buildCurves();
}

function move(down, across) {
  stop();
  act(() => select(state.block + down, state.step + across));
  followWithFocus();
}

/** Bring the selected cell into view inside the grid, without moving the page. */
function showCell() {
  const scroller = element("scroller");
  const [cell, box] = [cells[state.block][state.step].getBoundingClientRect(), scroller.getBoundingClientRect()];
  const [left, top] = [heads.blocks[0].offsetWidth, STICKY_PX];
  scroller.scrollTop +=
    Math.min(0, cell.top - box.top - top) || Math.max(0, cell.bottom - box.top - scroller.clientHeight);
  scroller.scrollLeft +=
    Math.min(0, cell.left - box.left - left) || Math.max(0, cell.right - box.left - scroller.clientWidth);
}

function followWithFocus() {
  const cell = cells[state.block][state.step];
  showCell();
  if (!state.wall) cell.focus({ preventScroll: true });
}

function changeMode(mode) {
  act(() => setMode(mode));
  paintFilms();
  say(NOTES[state.mode]);
}

function nextMode() {
  const modes = modesOf(state.run);
  changeMode(modes[(modes.indexOf(state.mode) + 1) % modes.length]);
}

function nextRun(by) {
  act(() => openRun(runs[(runs.indexOf(state.run) + by + runs.length) % runs.length]));
}

function zoom(factor) {
  state.zoom = clamp(state.zoom * factor, 0.25, 8);
  sizeCells();
}

/** Down the blocks of a step, then on to the next step, for ever: the order of the film. */
function playOn() {
  const atEnd = state.block === state.run.blocks.length - 1;
  const step = atEnd ? (state.step + 1) % state.run.steps.length : state.step;
  act(() => select(atEnd ? 0 : state.block + 1, step));
  showCell();
}

function stop() {
  clearInterval(playing);
  playing = null;
}

function togglePlay() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (playing === null) playing = setInterval(playOn, calm ? PLAY_CALM_MS : PLAY_MS);
  else stop();
  act(() => {});
}

function toggleWall() {
  if (runs.length > 1) act(() => (state.wall = !state.wall));
  if (!state.wall) [sizeCells(), buildCurves()];
}

const KEYS = {
  ArrowLeft: () => move(0, -1),
  ArrowRight: () => move(0, 1),
  ArrowUp: () => move(-1, 0),
  ArrowDown: () => move(1, 0),
  Home: () => move(0, -Infinity),
  End: () => move(0, Infinity),
  PageUp: () => move(-Infinity, 0),
  PageDown: () => move(Infinity, 0),
  " ": togglePlay,
  Enter: () => act(() => togglePin(looked())),
  Escape: () => act(() => (state.pins = [])),
  m: nextMode,
  n: () => nextRun(1),
  p: () => nextRun(-1),
  g: toggleWall,
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  "?": () => element("keys").showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || element("keys").open) return;
  const movesSlider = event.target.closest("input, .prompt") && /^(Arrow|Home|End|Page)/.test(event.key);
  const pressesButton = event.target.closest("button") && (event.key === " " || event.key === "Enter");
  if (movesSlider || pressesButton || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
}

function onPointer(event) {
  const place = event.target.closest(".cell")?.place ?? null;
  if (place === hovered) return;
  hovered = place;
  showSoon();
}

function onCellClick(event) {
  const { place } = event.target.closest(".cell") ?? {};
  if (!place) return;
  stop();
  act(() => {
    select(place.block, place.step);
    togglePin(shotAt(state));
  });
  cells[place.block][place.step].focus({ preventScroll: true });
}

function listen() {
  document.addEventListener("keydown", onKey);
  element("grid").addEventListener("pointerover", onPointer);
  element("grid").addEventListener("pointerleave", onPointer);
  element("grid").addEventListener("click", onCellClick);
  element("curves").addEventListener("pointermove", (event) => ((hovered = cellNear(event)), showSoon()));
  element("curves").addEventListener("pointerleave", () => ((hovered = null), showSoon()));
  element("curves").addEventListener("click", () => hovered && act(() => select(hovered.block, hovered.step)));
  element("modes").addEventListener("click", ({ target }) => target.dataset.mode && changeMode(target.dataset.mode));
  element("play").addEventListener("click", togglePlay);
  element("wall").addEventListener("click", toggleWall);
  element("smaller").addEventListener("click", () => zoom(0.8));
  element("larger").addEventListener("click", () => zoom(1.25));
  element("keys-button").addEventListener("click", KEYS["?"]);
  element("more").addEventListener("click", () =>
    unfoldPrompt(element("more").getAttribute("aria-expanded") === "false"),
  );
  element("split").addEventListener("input", ({ target }) =>
    element("stage").style.setProperty("--split", `${target.value}%`),
  );
  window.addEventListener("hashchange", () => start());
  window.addEventListener("resize", () => (sizeCells(), buildCurves(), showSoon()));
  document.addEventListener("DOMContentLoaded", showAgain);
}

/** In a single file, large pictures come after this script: show them once they have been read. */
function showAgain() {
  for (const frame of document.querySelectorAll("[data-shot]")) delete frame.dataset.shot;
  showSoon();
}

function start() {
  stop();
  readAddress();
  showRun();
  act(() => {});
  showCell();
}

defaultView();
buildGallery();
listen();
start();
