/* The picture with the selected map over it, its scale, and the value under the pointer. */
"use strict";

const shortNumber = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

function showPicture() {
  const [map, heat] = [mapNow(), element("heat")];
  heat.hidden = !map || !state.shown;
  element("place").textContent = entryNow() ? `${nameOf(entryNow())}` : "There are no maps here";
  const time = state.step ? `step ${STEPS[state.step]}, from t ${data.times[state.step - 1].toFixed(3)}` : "all steps";
  element("where").textContent = `${spoken(BLOCKS[state.block])} · ${time}${map ? "" : " · no map of this block"}`;
  element("grid").setAttribute("aria-label", `${nameOf(entryNow())}, ${element("where").textContent}`);
  if (!map) return;
  [heat.width, heat.height] = [COLUMNS, ROWS];
  const wide = (100 * COLUMNS * data.pool) / data.grid[1];
  const high = (100 * ROWS * data.pool) / data.grid[0];
  Object.assign(heat.style, { width: `${wide}%`, height: `${high}%` });
  heat.getContext("2d").putImageData(coloured(map, Number(element("opacity").value) / 100), 0, 0);
  const [least, most] = scaleOf(map);
  element("least").textContent = shortNumber(least);
  element("most").textContent = shortNumber(most);
}

function nameOf(entry) {
  if (!entry) return "";
  return entry.kind === "patch" ? `patch ${entry.name}` : entry.name;
}

function drawLegend() {
  const strip = new ImageData(256, 1);
  for (let shade = 0; shade < 256; shade += 1) {
    strip.data.set(
      [...COLOURS.subarray(3 * shade, 3 * shade + 3), Math.round(255 * Math.sqrt(shade / 255))],
      4 * shade,
    );
  }
  element("legend").getContext("2d").putImageData(strip, 0, 0);
}

/** Say the value of the token under the pointer, and frame it. */
function lookUnder(event) {
  const [frame, map, mark] = [element("stage").getBoundingClientRect(), mapNow(), element("patch")];
  const column = Math.floor((data.grid[1] * (event.clientX - frame.left)) / frame.width / data.pool);
  const row = Math.floor((data.grid[0] * (event.clientY - frame.top)) / frame.height / data.pool);
  const inside = map && row >= 0 && column >= 0 && row < ROWS && column < COLUMNS;
  mark.hidden = !inside;
  if (!inside) return;
  const patch = row * data.pool * data.grid[1] + column * data.pool;
  const value = shortNumber(map.values[row * COLUMNS + column]);
  element("under").textContent = `patch ${patch} (row ${row * data.pool}, column ${column * data.pool}): ${value}`;
  const [width, height] = [(100 * data.pool) / data.grid[1], (100 * data.pool) / data.grid[0]];
  Object.assign(mark.style, { left: `${column * width}%`, top: `${row * height}%` });
  Object.assign(mark.style, { width: `${width}%`, height: `${height}%` });
}
