/* The page: its list of words, its keys, and what is drawn again when something is chosen. */
"use strict";

function listWords() {
  let kind = "";
  data.entries.forEach((entry, index) => {
    if (entry.kind !== kind) {
      kind = entry.kind;
      element("words").append(make("h2", { textContent: KINDS[kind] }));
    }
    const button = make("button", { type: "button", textContent: nameOf(entry) });
    button.dataset.entry = index;
    button.addEventListener("click", () => choose({ entry: index }));
    element("words").append(button);
  });
}

/** Change the state and show it; maps that are not there yet come first. */
function choose(change) {
  Object.assign(state, change);
  const entry = entryNow();
  for (const button of element("words").querySelectorAll("button")) {
    const here = Number(button.dataset.entry) === state.entry;
    button.setAttribute("aria-pressed", here);
    if (here) button.scrollIntoView({ block: "nearest" });
  }
  showWays();
  element("shared").setAttribute("aria-pressed", state.shared);
  element("shown").setAttribute("aria-pressed", state.shown);
  replaceAddressSoon(addressText);
  if (!entry) {
    showAll();
    return;
  }
  const name = entry.files[wayNow()];
  load(name).then(
    (found) => {
      if (entryNow()?.files[wayNow()] !== name) return; // another was chosen meanwhile
      maps = found;
      largest = Math.max(...maps.flat().map((map) => map?.most ?? 0));
      showAll();
    },
    (error) => {
      element("where").textContent = error.message;
    },
  );
}

function showWays() {
  const buttons = waysNow().map((way) => {
    const button = make("button", { type: "button", textContent: data.ways[way][0] });
    button.dataset.way = way;
    button.setAttribute("aria-pressed", way === wayNow());
    button.addEventListener("click", () => choose({ way }));
    return button;
  });
  element("ways").replaceChildren(...buttons);
  element("way").textContent = wayNow() ? `${data.ways[wayNow()][1]}.` : "";
}

const drawn = { maps: null, shared: false };

const showAll = oncePerFrame(() => {
  if (drawn.maps !== maps || drawn.shared !== state.shared) drawGrid(); // not when a cell is chosen: there may be 1,600
  Object.assign(drawn, { maps, shared: state.shared });
  showHere();
  showPicture();
  say(`${nameOf(entryNow())}, ${element("where").textContent}`);
});

function move(block, step) {
  choose({
    block: clamp(state.block + block, 0, BLOCKS.length - 1),
    step: clamp(state.step + step, 0, STEPS.length - 1),
  });
}

const nextEntry = (by) =>
  choose({ entry: (state.entry + by + data.entries.length) % Math.max(1, data.entries.length) });

const KEYS = {
  ArrowLeft: () => move(0, -1),
  ArrowRight: () => move(0, 1),
  ArrowUp: () => move(-1, 0),
  ArrowDown: () => move(1, 0),
  Home: () => choose({ block: 0, step: 0 }),
  n: () => nextEntry(1),
  p: () => nextEntry(-1),
  d: () => choose({ way: waysNow()[(waysNow().indexOf(wayNow()) + 1) % Math.max(1, waysNow().length)] }),
  s: () => choose({ shared: !state.shared }),
  o: () => choose({ shown: !state.shown }),
  "?": () => element("keys").showModal(),
};

function start() {
  element("prompt").textContent = data.prompt || "(no prompt)";
  element("facts").append(...data.facts.map((fact) => make("span", { textContent: fact })));
  listWords();
  layOutGrid();
  drawLegend();
  listenToKeys((event) => {
    if (!KEYS[event.key] || event.target.matches?.("input")) return;
    event.preventDefault();
    KEYS[event.key]();
  }, KEYS);
  element("grid").addEventListener("pointerdown", (event) => choose(cellAt(event)));
  element("stage").addEventListener("pointermove", lookUnder);
  element("stage").addEventListener("pointerleave", () => {
    element("patch").hidden = true;
    element("under").textContent = "";
  });
  element("opacity").addEventListener("input", showPicture);
  window.addEventListener("hashchange", () => {
    readAddress();
    choose({});
  });
  readAddress();
  choose({});
}

start();
