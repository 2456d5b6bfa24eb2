/* The viewer: what is looked at, or two pins under a slider. */
"use strict";

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
  element("numbers").replaceChildren(...numbersOf(shots).map((entry) => numberRow(entry, shots)));
}

const numbersOf = (shots) => (shots.some(({ run }) => run.other) ? [...NUMBERS, ...OTHER_NUMBERS] : NUMBERS);

function numberRow([label, meaning, value], shots) {
  const head = make("th", { scope: "row", textContent: label });
  head.append(make("small", { textContent: meaning }));
  return make("tr", {}, head, ...shots.map((shot) => make("td", { textContent: value(shot) ?? "–" })));
}
