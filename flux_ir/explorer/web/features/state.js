/* State: what is looked at and how. All of it is in the address, so an address brings back the exact view. */
"use strict";

/** What a view is when the address does not say. The kind of a value is that of its default; null: a number or none. */
const DEFAULTS = {
  stream: pages.streams[0], // whose tokens: img or txt
  feature: null, // null: the list
  sort: "", // name of a column, "-" before it: largest first; "": what says most
  find: "", // words and conditions, as typed
  columns: "", // names with commas; "": those that say most
  x: "frequency", // axes of the map of all features
  y: "max_active",
  box: "", // left,right,bottom,top on these axes: only the features inside are listed
  view: "", // the same of what the map shows
  overlay: "heat", // or spotlight, or none
  opacity: 80, // of the overlay [%]
  top: 100, // the value that gets the strongest colour, in % of the feature's largest
  smooth: false,
  close: false, // zoomed to the largest value
  at: "", // number of the step whose map is shown; "": the step of the largest value
  picture: null, // the one that is inspected
  token: null, // the place on it
  step: null, // number of the step at which it is inspected
};

const state = { ...DEFAULTS };

function addressOf(changes = {}) {
  const wanted = { ...state, ...changes };
  const words = new URLSearchParams();
  for (const [name, usual] of Object.entries(DEFAULTS))
    if (wanted[name] !== usual && wanted[name] !== null) words.set(name, wanted[name]);
  return `#${words}`;
}

/** Take the state from the address; what it says of things that are not there is left out. */
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const [name, usual] of Object.entries(DEFAULTS)) state[name] = wordOf(words.get(name), usual);
  if (!pages.streams.includes(state.stream)) state.stream = DEFAULTS.stream;
  if (!isFeature(state.feature)) state.feature = null;
  for (const axis of ["x", "y"]) if (!columnNamed(state[axis])) state[axis] = DEFAULTS[axis];
  if (!["heat", "spotlight", "none"].includes(state.overlay)) state.overlay = DEFAULTS.overlay;
  state.opacity = clamp(state.opacity, 0, 100);
  state.top = clamp(state.top, 1, 100);
}

function wordOf(word, usual) {
  if (word === null) return usual;
  if (typeof usual === "boolean") return word === "true";
  if (typeof usual === "string") return word;
  return word !== "" && Number.isFinite(Number(word)) ? Number(word) : usual;
}

const isFeature = (number) => Number.isInteger(number) && number >= 0 && number < pages.d_sae;

/** A step that Back undoes: from the list to a feature, or along a link. */
function pushAddress(changes) {
  clearTimeout(addressTimer);
  history.replaceState(null, "", addressOf());
  Object.assign(state, changes);
  history.pushState(null, "", addressOf());
}
