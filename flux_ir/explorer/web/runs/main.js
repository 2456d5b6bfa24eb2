/* What people do. */
"use strict";

const showSoon = oncePerFrame(() => {
  showMarks();
  showViewer();
  showCurveMarks();
  showGallery();
});

/** Do something to the state, then show it, once per frame at most. */
function act(change) {
  change();
  showTools();
  writeAddressSoon();
  showSoon();
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

/** Both are as wide as the window leaves room for. */
function fitToRoom() {
  sizeCells();
  buildCurves();
}

function toggleWall() {
  if (runs.length > 1) act(() => (state.wall = !state.wall));
  if (!state.wall) fitToRoom();
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
  c: nextCurve,
  n: () => nextRun(1),
  p: () => nextRun(-1),
  g: toggleWall,
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  "?": () => element("keys").showModal(),
};

function onKey(event) {
  const movesSlider = event.target.closest("input, .prompt") && /^(Arrow|Home|End|Page)/.test(event.key);
  const pressesButton = event.target.closest("button") && (event.key === " " || event.key === "Enter");
  if (movesSlider || pressesButton || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
}

function onPointer(event) {
  const place = event.target.closest(".cell")?.place ?? null;
  if (place !== hovered) hover(place);
}

function hover(place) {
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
  listenToKeys(onKey, KEYS);
  element("grid").addEventListener("pointerover", onPointer);
  element("grid").addEventListener("pointerleave", onPointer);
  element("grid").addEventListener("click", onCellClick);
  element("curves").addEventListener("pointermove", (event) => hover(cellNear(event)));
  element("curves").addEventListener("pointerleave", () => hover(null));
  element("curves").addEventListener("click", () => hovered && act(() => select(hovered.block, hovered.step)));
  element("modes").addEventListener("click", ({ target }) => target.dataset.mode && changeMode(target.dataset.mode));
  element("more").addEventListener("click", () =>
    unfoldPrompt(element("more").getAttribute("aria-expanded") === "false"),
  );
  element("curve-choice").addEventListener(
    "click",
    ({ target }) => target.dataset.curve && changeCurve(target.dataset.curve),
  );
  element("split").addEventListener("input", ({ target }) =>
    element("stage").style.setProperty("--split", `${target.value}%`),
  );
  window.addEventListener("hashchange", () => start());
  window.addEventListener("resize", () => {
    fitToRoom();
    showSoon();
  });
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
