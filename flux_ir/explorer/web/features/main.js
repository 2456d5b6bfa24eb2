/* What people do, by pointer and by key; and how the pages begin. */
"use strict";

const showSoon = oncePerFrame(show);

/** Do something to the state, then show it, once per frame at most. */
function act(change) {
  change();
  replaceAddressSoon(addressOf);
  showSoon();
}

let painted = null; // what the maps of the pictures were painted for

function show() {
  if (!list) return;
  const onFeature = state.feature !== null;
  if (arrange() && cursor >= order.length) cursor = 0;
  element("list-view").hidden = onFeature;
  element("feature-view").hidden = !onFeature;
  if (onFeature) showOneFeature();
  else showList();
}

function showList() {
  document.title = element("list-name").textContent;
  showColumns();
  showChips();
  showRows();
  showScatter();
  if (searching() && !prompts) readPrompts();
  if (!element("peek").dataset.feature && order.length) showPeek(order[0]);
  for (const button of element("list-streams").children)
    button.setAttribute("aria-pressed", button.dataset.stream === state.stream);
}

function showOneFeature() {
  const wanted = JSON.stringify([state.overlay, state.top, state.at]);
  const repaint = painted !== wanted && current.record && current.key === `${state.stream} ${state.feature}`;
  painted = wanted;
  if (repaint) {
    if (state.stream === "txt") showExamples(current.record, current.facts);
    else paintShots();
    patchKey = null;
  }
  showSettings();
  showFeature();
}

// ---- From one thing to another ------------------------------------------------------------------------------------------

function openFeature(feature) {
  if (!isFeature(feature)) return;
  pushAddress({ feature, picture: null, token: null, step: null });
  if (positions[feature] >= 0) cursor = positions[feature];
  show();
}

function stepFeature(by) {
  const feature = neighbour(by);
  if (feature === null || feature === state.feature) return;
  act(() => Object.assign(state, { feature, picture: null, token: null, step: null }));
  cursor = Math.max(0, positions[feature]);
  say(`Feature ${feature}, ${positions[feature] + 1} of ${order.length}`);
}

function openAny() {
  if (order.length) openFeature(order[Math.floor(Math.random() * order.length)]);
}

function openList() {
  pushAddress({ feature: null, picture: null, token: null, step: null });
  show();
  moveCursor(0);
}

async function openStream(stream) {
  if (stream === state.stream) return;
  Object.assign(state, { stream, columns: "", box: "", view: "", picture: null, token: null, step: null });
  replaceAddressSoon(addressOf);
  await readStream();
}

/** Load the list of the stream that the state names, then its words, and show each when it is there. */
async function readStream() {
  const { stream } = state;
  [list, texts, prompts, orderKey] = [null, null, null, null];
  try {
    const found = await loadList(stream);
    if (stream !== state.stream) return;
    list = found;
    for (const axis of ["x", "y"]) if (!columnNamed(state[axis])) state[axis] = DEFAULTS[axis];
    buildAxes();
    delete element("peek").dataset.feature;
    show();
    texts = await loadTexts(stream);
    delete element("peek").dataset.feature;
    if (stream === state.stream) show();
  } catch (error) {
    element("find-note").textContent = `${error.message}. The files of pages/ belong together: write them again.`;
    element("find-note").classList.add("problem");
  }
}

async function readPrompts() {
  const { stream } = state;
  const found = await loadWords(stream);
  if (stream !== state.stream || prompts) return;
  prompts = found;
  show();
}

// ---- Keys ---------------------------------------------------------------------------------------------------------------

const onList = () => state.feature === null;

function moveBy(by) {
  if (onList()) moveCursor(by);
  else stepFeature(by);
}

function nextOverlay() {
  const all = ["heat", "spotlight", "none"];
  act(() => (state.overlay = all[(all.indexOf(state.overlay) + 1) % all.length]));
}

function leave() {
  if (!onList() && state.picture !== null) closePatch();
  else if (!onList()) openList();
  else if (state.find) act(() => (state.find = ""));
  else if (state.box) act(() => (state.box = ""));
}

function askForNumber(digit = "") {
  const field = element("jump-number");
  field.max = pages.d_sae - 1;
  field.value = digit;
  element("jump").showModal();
  field.focus();
}

function focusFind() {
  if (!onList()) openList();
  element("find").focus();
  element("find").select();
}

const rowsInView = () => Math.max(1, Math.floor(element("rows").clientHeight / ROW_PX) - 1);

const KEYS = {
  ArrowLeft: () => !onList() && stepFeature(-1),
  ArrowRight: () => !onList() && stepFeature(1),
  ArrowUp: () => onList() && moveCursor(-1),
  ArrowDown: () => onList() && moveCursor(1),
  PageUp: () => onList() && moveCursor(-rowsInView()),
  PageDown: () => onList() && moveCursor(rowsInView()),
  Home: () => moveBy(-Infinity),
  End: () => moveBy(Infinity),
  Enter: () => onList() && order.length && openFeature(order[cursor]),
  Escape: leave,
  r: openAny,
  g: () => askForNumber(),
  "/": focusFind,
  m: nextOverlay,
  s: () => act(() => (state.smooth = !state.smooth)),
  z: () => act(() => (state.close = !state.close)),
  "[": () => act(() => (state.opacity = clamp(state.opacity - 10, 0, 100))),
  "]": () => act(() => (state.opacity = clamp(state.opacity + 10, 0, 100))),
  "?": () => element("keys").showModal(),
};
const PATCH_KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const SCROLLS = ["ArrowUp", "ArrowDown", "PageUp", "PageDown"]; // keys that scroll the page of a feature

function onKey(event) {
  if (event.target === element("find")) return onFindKey(event);
  if (event.shiftKey && PATCH_KEYS[event.key] && state.picture !== null) {
    event.preventDefault();
    return movePatch(...PATCH_KEYS[event.key]);
  }
  const inField = event.target.closest("input, select") && /^(Arrow|Home|End|Page|Enter)/.test(event.key);
  const presses = event.target.closest("button, a") && event.key === "Enter";
  if (inField || presses || (!onList() && SCROLLS.includes(event.key))) return;
  const digit = /^\d$/.test(event.key);
  if (!digit && !KEYS[event.key]) return;
  event.preventDefault();
  if (digit) askForNumber(event.key);
  else KEYS[event.key]();
}

function onFindKey(event) {
  if (event.key === "Escape") {
    event.preventDefault();
    if (state.find) act(() => (state.find = element("find").value = ""));
    else element("rows").focus();
  }
  if (event.key === "ArrowDown" || event.key === "Enter") {
    event.preventDefault();
    element("rows").focus();
    moveCursor(0);
  }
}

// ---- Listening ------------------------------------------------------------------------------------------------------------

/** A link to a view of these pages is followed without loading them again. */
function onLink(event) {
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  history.replaceState(null, "", addressOf());
  history.pushState(null, "", link.getAttribute("href"));
  goToAddress();
}

function goToAddress() {
  const { stream } = state;
  readAddress();
  if (state.feature !== null && positions[state.feature] >= 0) cursor = positions[state.feature];
  if (state.stream !== stream) readStream();
  else show();
  if (onList()) moveCursor(0);
}

function listen() {
  listenToKeys(onKey, KEYS);
  document.addEventListener("click", onLink);
  for (const button of element("overlays").children)
    button.addEventListener("click", () => act(() => (state.overlay = button.dataset.overlay)));
  element("opacity").addEventListener("input", ({ target }) => act(() => (state.opacity = Number(target.value))));
  element("top").addEventListener("input", ({ target }) => act(() => (state.top = Number(target.value))));
  element("find").addEventListener("input", ({ target }) =>
    act(() => {
      state.find = target.value.trim();
      cursor = 0;
      element("rows").scrollTop = 0;
    }),
  );
  element("rows").addEventListener("scroll", showRows, { passive: true });
  element("rows").addEventListener("pointerover", ({ target }) => {
    const row = pool.find(({ link }) => link === target.closest(".row"));
    if (row) showPeek(row.feature);
  });
  element("choose-columns").addEventListener("click", () => {
    buildGlossary();
    element("numbers").showModal();
  });
  element("glossary").addEventListener("change", chooseColumns);
  element("jump-form").addEventListener("submit", () => openFeature(Number(element("jump-number").value)));
  listenToScatter();
  window.addEventListener("popstate", goToAddress);
  window.addEventListener("resize", showSoon);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showSoon);
}

readAddress();
buildListHead();
listen();
element(state.feature === null ? "list-view" : "feature-view").hidden = false;
element(state.feature === null ? "feature-view" : "list-view").hidden = true;
readStream();
