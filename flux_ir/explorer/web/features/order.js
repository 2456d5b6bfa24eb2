/* Order: which features are listed, and which comes after which. Everything is a pass over typed arrays. */
"use strict";

const FLAGS = {
  alive: (feature) => numberOf("frequency", feature) > 0,
  dead: (feature) => !(numberOf("frequency", feature) > 0),
  rare: (feature) => densityWord(numberOf("frequency", feature)) === "rare",
  common: (feature) => /common/.test(densityWord(numberOf("frequency", feature))),
  place: meansPlace,
  labelled: (feature) => Boolean(texts?.labels[feature]),
};
const COMPARE = {
  "<": (value, bound) => value < bound,
  ">": (value, bound) => value > bound,
  "<=": (value, bound) => value <= bound,
  ">=": (value, bound) => value >= bound,
  "=": (value, bound) => shortNumber(value) === shortNumber(bound),
};
const CONDITION = /^([\p{L}\d_ .]+?)(<=|>=|<|>|=)(-?\d*\.?\d+(?:e[+-]?\d+)?)(%?)$/iu;

let list = null; // of the stream that is shown: {columns, top, peaks}
let texts = null; // {labels, words, searched}, once loaded
let prompts = null; // {words, ptr, features, counts}, once somebody has searched
let order = new Uint32Array(0); // the features listed, in order
let positions = new Int32Array(0); // of each feature in the order; -1: not listed
let matches = null; // of each feature, how many top pictures match the words looked for
let orderKey = null;

/** What was typed, taken apart: `red max>3 density<1% is:place -circle "two words"`. */
function parseFind(text) {
  const found = { words: [], without: [], conditions: [], flags: [], problems: [] };
  for (const [, quoted, plain] of text.matchAll(/"([^"]*)"?|(\S+)/g)) {
    const word = (quoted ?? plain).toLowerCase();
    if (quoted !== undefined) found.words.push(word);
    else if (word.startsWith("is:")) addFlag(found, word.slice(3));
    else if (/[<>=]/.test(word)) addCondition(found, word);
    else if (word.length > 1 && word.startsWith("-")) found.without.push(word.slice(1));
    else found.words.push(word);
  }
  found.words = found.words.filter(Boolean);
  return found;
}

function addFlag(found, flag) {
  if (FLAGS[flag]) found.flags.push(flag);
  else found.problems.push(`nothing is:${flag}; there is ${Object.keys(FLAGS).join(", ")}`);
}

function addCondition(found, word) {
  const [, name, sign, bound, percent] = CONDITION.exec(word) ?? [];
  const column = name && columnMeant(name);
  if (!column) found.problems.push(`${word} names no number: write it as max>3, with a name from Numbers`);
  else found.conditions.push({ column, sign, bound: percent ? bound / 100 : Number(bound) });
}

const searching = () => parseFind(state.find).words.length > 0;

/** What the list is sorted by, the sign apart. */
function sorting() {
  const usual = searching() ? "-match" : pages.of[state.stream].sort;
  const wanted = state.sort || usual;
  const name = wanted.replace(/^-/, "");
  const known = name === "feature" || (name === "match" && searching()) || columnNamed(name);
  return known
    ? { name, down: wanted.startsWith("-") }
    : { name: usual.replace(/^-/, ""), down: usual.startsWith("-") };
}

/** Make the order anew if anything that it depends on has changed; says whether it has. */
function arrange() {
  const key = JSON.stringify([state.stream, state.sort, state.find, state.box && [state.box, state.x, state.y]]);
  const ready = `${key} ${Boolean(texts)} ${Boolean(prompts)}`;
  if (ready === orderKey) return false;
  orderKey = ready;
  const listed = sorted(filtered());
  order = listed;
  positions = new Int32Array(pages.d_sae).fill(-1);
  for (let index = 0; index < order.length; index += 1) positions[order[index]] = index;
  return true;
}

function filtered() {
  const find = parseFind(state.find);
  matches = find.words.length ? countMatches(find.words) : null;
  const tests = find.conditions.map(conditionTest);
  tests.push(...find.flags.map((flag) => FLAGS[flag]));
  tests.push(...find.without.map((word) => (feature) => !mentions(feature, word)));
  if (matches) tests.push((feature) => matches[feature] >= 0);
  if (state.box) tests.push(boxTest(numbersIn(state.box)));
  const kept = new Uint32Array(pages.d_sae);
  let count = 0;
  for (let feature = 0; feature < pages.d_sae; feature += 1)
    if (tests.every((test) => test(feature))) kept[count++] = feature;
  return kept.slice(0, count);
}

function conditionTest({ column, sign, bound }) {
  const compare = COMPARE[sign];
  if (column === FEATURE) return (feature) => compare(feature, bound);
  const values = list.columns.get(column.name);
  return (feature) => compare(values[feature], bound);
}

const numbersIn = (text) => text.split(",").map(Number);

function boxTest([left, right, bottom, top]) {
  const [x, y] = [list.columns.get(state.x), list.columns.get(state.y)];
  return (feature) => x[feature] >= left && x[feature] <= right && y[feature] >= bottom && y[feature] <= top;
}

function sorted(features) {
  const { name, down } = sorting();
  if (name === "feature") return down ? features.reverse() : features;
  const values = name === "match" ? matches : list.columns.get(name);
  const sign = down ? -1 : 1;
  // What is not known comes last whichever way is up; equals stay in the order of their numbers.
  return features.sort((a, b) => {
    const [first, second] = [values[a], values[b]];
    if (first === second) return a - b;
    if (Number.isNaN(first)) return Number.isNaN(second) ? a - b : 1;
    return Number.isNaN(second) ? -1 : sign * (first - second);
  });
}

// ---- Words --------------------------------------------------------------------------------------------------------------

const mentions = (feature, word) => (texts?.searched[feature] ?? "").includes(` ${word}`);

/** Of each feature: the top pictures that match all words, -1 where it matches in no way. A number is a feature too. */
function countMatches(words) {
  const found = new Float32Array(pages.d_sae).fill(Infinity);
  for (const word of words) {
    const counts = countWord(word);
    for (let feature = 0; feature < found.length; feature += 1)
      found[feature] = Math.min(found[feature], counts[feature]);
  }
  return found;
}

function countWord(word) {
  const counts = new Int16Array(pages.d_sae).fill(-1);
  if (texts)
    for (let feature = 0; feature < counts.length; feature += 1) if (mentions(feature, word)) counts[feature] = 0;
  if (/^\d+$/.test(word) && isFeature(Number(word))) counts[Number(word)] = 0;
  prompts?.words.forEach((known, index) => {
    if (!known.startsWith(word)) return;
    for (let at = prompts.ptr[index]; at < prompts.ptr[index + 1]; at += 1) {
      const feature = prompts.features[at];
      counts[feature] = Math.max(counts[feature], prompts.counts[at]);
    }
  });
  return counts;
}

/** The feature so many places further in the order; from one that is not listed, the first that is. */
function neighbour(by) {
  if (!order.length) return null;
  const at = positions[state.feature];
  return at < 0 ? order[0] : order[clamp(at + by, 0, order.length - 1)];
}
