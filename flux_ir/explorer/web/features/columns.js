/* Columns: the numbers of features by name, and how people read them. What each means comes with the data. */
"use strict";

const FEATURE = { name: "feature", title: "feature", unit: "index", about: "Its number in the autoencoder." };
const MATCH = {
  name: "match",
  title: "matches",
  unit: "count",
  about: "How many of its top pictures have the words looked for in their prompts.",
};

const columnsOf = (stream = state.stream) => pages.of[stream].columns;
const columnNamed = (name) => columnsOf().find((column) => column.name === name) ?? null;

/** The columns that the list shows. */
function shownColumns() {
  const names = state.columns ? state.columns.split(",") : pages.of[state.stream].shown;
  const shown = names.map(columnNamed).filter(Boolean);
  return searching() ? [MATCH, ...shown] : shown;
}

/** The column that a person means: by its name, its title, or the beginning of one of them; null: none or several. */
function columnMeant(word) {
  const said = word.toLowerCase();
  const all = [FEATURE, ...columnsOf()];
  const exact = all.find(({ name, title }) => name === said || title === said);
  const begun = all.filter(({ name, title }) => name.startsWith(said) || title.startsWith(said));
  return exact ?? (begun.length === 1 ? begun[0] : null);
}

/** A number as the list and the page show it: three digits say enough. */
function shortNumber(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-4)
    return value.toExponential(1).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  if (size >= 1000) return grouped(Math.round(value));
  return value.toPrecision(3).replace("-", "−");
}

const grouped = (whole) => String(whole).replace(/\B(?=(\d{3})+$)/g, "\u202f");

function formatted(value, unit) {
  if (!Number.isFinite(value)) return "–";
  if (unit === "index") return String(value);
  if (unit === "count") return grouped(value);
  if (unit === "share") return `${shortPercent(100 * value)} %`;
  return shortNumber(value);
}

function shortPercent(percent) {
  if (percent === 0 || percent >= 99.95) return String(Math.round(percent));
  if (percent >= 10) return percent.toFixed(1);
  return percent >= 0.01 ? percent.toPrecision(2) : percent.toExponential(0).replace("-", "−");
}

/** What a number is called, with its unit. */
const titled = ({ title, unit }) => (unit === "share" ? `${title}, %` : title);

/** How often a feature fires, in a word. */
function densityWord(frequency) {
  if (!(frequency > 0)) return "dead";
  if (frequency < pages.rare) return "rare";
  return frequency < pages.common ? "common" : "very common";
}

const numberOf = (name, feature = state.feature) => list.columns.get(name)?.[feature] ?? NaN;
const meansPlace = (feature) => numberOf("position_r2", feature) > pages.place;
