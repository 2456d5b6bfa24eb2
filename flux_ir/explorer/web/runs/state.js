/* What is looked at: constants, the data, small words, and the state. One cell is selected, one may be hovered,
   up to two are pinned. */
"use strict";

const REST_MS = 40; // a pointer that sweeps over the grid loads no large picture before it rests
const PLAY_MS = 125;
const PLAY_CALM_MS = 700; // where less motion is asked for
const CELL_PX = { least: 16, most: 104, fine: 40 };
const STICKY_PX = 56; // the two sticky heads of the grid
const CURVES_PX = { height: 168, left: 34, right: 12, top: 12, bottom: 30 };
const NOTES = {
  euler: "The state the sampler would go to, had this block been the last.",
  x0: "The clean image each block believes in.",
  tuned: "The clean image each block believes in, read through a map that was fitted to this block and step.",
  jacobian: "The clean image each block points at, by the mean derivative of the velocity by a patch’s own token.",
  jacobian_summed: "The clean image each block points at, by the mean derivative of all velocities by one token.",
  difference: "What each block changed: its picture minus that of the block before, four times brighter",
};
const NUMBERS = [
  ["flow time", "t before the step: 1 is noise, 0 is the image", (shot) => shot.run.times[shot.step]?.[0].toFixed(3)],
  [
    "relative distance",
    "of the velocity to the step’s final one",
    (shot) => number(shot, velocityNumber(shot, "relative_distance"))?.toFixed(3),
  ],
  [
    "cosine",
    "of the velocity and the step’s final one",
    (shot) => number(shot, velocityNumber(shot, "cosine"))?.toFixed(3),
  ],
  ["PSNR, dB", "of the picture against the finished one", (shot) => number(shot, `psnr_${shot.mode}_db`)?.toFixed(1)],
];

const OTHER_NUMBERS = [
  [
    "distance to the other run",
    "relative, of what this block puts out",
    (shot) => number(shot, "other_distance")?.toFixed(4),
  ],
  ["CKA with the other run", "1: alike but for rotation and scale", (shot) => number(shot, "other_cka")?.toFixed(4)],
];
const CURVE_NOTES = {
  final: "Relative distance to the step’s final answer, by depth. One line per step.",
  lenses: "Relative distance to the step’s final answer, by depth. One line per lens.",
  other: "Relative distance of each block’s output to that of the other run, by depth. One line per step.",
};

const { runs } = JSON.parse(element("explorer-data").textContent);

const spoken = (block) => block.replace(".", " "); // "double.7" as people say it
const lensesOf = (run) => Object.keys(run.lenses);
const modesOf = (run) => [...lensesOf(run), "difference"];

const state = { run: runs[0], block: 0, step: 0, mode: "", lens: "", curve: "final", wall: false, pins: [], zoom: 1 };
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
/** A fitted lens reads a velocity of its own from the block; euler and x0 share theirs. */
const FITTED = { tuned: "tuned", jacobian: "Jacobian", jacobian_summed: "Jacobian, summed" };
const velocityNumber = (shot, name) => (shot.lens in FITTED ? `${shot.lens}_${name}` : name);
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
