/* What is looked at, and the address bar: #word=red%231&way=to_words&block=double.3&step=2&scale=one. */
"use strict";

const BLOCKS = ["all blocks", ...data.blocks];
const STEPS = ["mean", ...data.steps.map(String)];
const KINDS = { word: "Words", concept: "Concepts", group: "Groups of tokens", patch: "Patches" };
const state = { entry: 0, way: "to_words", block: 0, step: 0, shared: false, shown: true };
let maps = null; // of the entry and the way: [block][step] of {values, least, most}
let largest = 0; // of all of them

const entryNow = () => data.entries[state.entry];
const waysNow = () => Object.keys(entryNow()?.files ?? {});
const wayNow = () => (waysNow().includes(state.way) ? state.way : waysNow()[0]);
const mapNow = () => maps?.[state.block]?.[state.step] ?? null;
const spoken = (block) => block.replace(".", " ");

/** What the weakest and the strongest colour stand for. */
function scaleOf(map) {
  return state.shared ? [0, largest] : [map.least, map.most];
}

/** A value as a byte on a scale. */
function level(value, [least, most]) {
  return most > least ? clamp(Math.round((255 * (value - least)) / (most - least)), 0, 255) : 0;
}

function addressText() {
  const entry = entryNow();
  const words = [`${entry?.kind}=${encodeURIComponent(entry?.name)}`, `way=${wayNow()}`];
  words.push(`block=${state.block ? data.blocks[state.block - 1] : "all"}`);
  words.push(`step=${state.step ? data.steps[state.step - 1] : "mean"}`);
  if (state.shared) words.push("scale=one");
  return `#${words.join("&")}`;
}

/** Take the state from the address; what it does not say, or says of things that are not there, stays as it is. */
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  const named = data.entries.findIndex((entry) => words.get(entry.kind) === entry.name);
  if (named >= 0) state.entry = named;
  if (waysNow().includes(words.get("way"))) state.way = words.get("way");
  state.block = words.has("block") ? data.blocks.indexOf(words.get("block")) + 1 : state.block;
  state.step = words.has("step") ? data.steps.map(String).indexOf(words.get("step")) + 1 : state.step;
  state.shared = words.get("scale") === "one";
}
