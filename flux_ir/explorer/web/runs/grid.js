/* The grid: one film per row, drawn as a background, and transparent cells above it. */
"use strict";

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
  for (const [index, time] of run.times.entries())
    if (time) heads.steps[index].title = `flow time ${time[0].toFixed(3)} → ${time[1].toFixed(3)}`;
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
