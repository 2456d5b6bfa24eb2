/* Data: a script beside the page for each word and direction, loaded when it is chosen and kept. */
"use strict";

const data = JSON.parse(element("maps-data").textContent);
const COLOURS = bytesOf(data.colours); // 256 times red, green, blue
const [ROWS, COLUMNS] = data.grid.map((count) => Math.ceil(count / data.pool));
const CELLS = ROWS * COLUMNS;

function bytesOf(text) {
  const letters = atob(text);
  return Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
}

const loads = new Map(); // name -> {promise, settle}

/** What a script beside the page calls. On window, where other scripts find it. */
window.received = (name, value) => loads.get(name)?.settle(value);

/** The maps of one word in one direction: a promise, which fails where there is no such file. */
function load(name) {
  if (!loads.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => {
      const script = make("script", { src: `${name}.js` });
      entry.settle = (value) => resolve(mapsOf(value));
      script.onload = () => script.remove();
      script.onerror = () => {
        loads.delete(name);
        reject(new Error(`${name}.js could not be loaded`));
      };
      document.head.append(script);
    });
    loads.set(name, entry);
  }
  return loads.get(name).promise;
}

/** Maps by block and step; 0 is the mean, of all blocks or of all steps. null: there is none of this block. */
function mapsOf({ values, bounds }) {
  const bytes = bytesOf(values);
  const [blocks, steps] = [data.blocks.length, data.steps.length];
  const own = Array.from({ length: blocks }, (_, block) =>
    Array.from({ length: steps }, (_, step) => {
      const at = step * blocks + block;
      if (!bounds[at]) return null;
      const [least, most] = bounds[at];
      const part = bytes.subarray(at * CELLS, (at + 1) * CELLS);
      return Float32Array.from(part, (value) => least + ((most - least) * value) / 255);
    }),
  );
  const rows = own.map((row) => [meanOf(row), ...row]);
  const mean = Array.from({ length: steps + 1 }, (_, step) => meanOf(rows.map((row) => row[step])));
  return [mean, ...rows].map((row) => row.map((map) => map && bounded(map)));
}

function meanOf(maps) {
  const there = maps.filter(Boolean);
  if (!there.length) return null;
  const mean = new Float32Array(CELLS);
  for (const map of there) map.forEach((value, cell) => (mean[cell] += value / there.length));
  return mean;
}

function bounded(values) {
  return { values, least: values.reduce((a, b) => Math.min(a, b)), most: values.reduce((a, b) => Math.max(a, b)) };
}
