/* The address bar: #block=double.7&step=2&mode=x0&generation=1a2b3c4d. */
"use strict";

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
  if (state.curve === "lenses") words.push("curves=lenses");
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
  if (words.has("curves")) state.curve = words.get("curves");
  state.wall = runs.length > 1 && words.get("view") === "gallery";
  state.pins = (words.get("pins") ?? "").split(",").map(shotNamed).filter(Boolean).slice(0, 2);
}

/** While a film plays the address stands still: each of its cells would be one more change. */
function writeAddressSoon() {
  if (playing === null) replaceAddressSoon(addressText);
  else clearTimeout(addressTimer);
}
