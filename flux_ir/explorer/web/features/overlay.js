/* Overlays: the values of a feature's tokens, drawn on a canvas of one pixel per token that covers the picture. */
"use strict";

const COLOURS = bytesOf(pages.colours); // 256 times red, green, blue, of the values 0 to 255
const SPOTLIGHT = { red: 12, green: 12, blue: 16, dark: 0.88 }; // what covers a picture where a feature is silent

/** The value of each token as a byte, 255 for the feature's largest, from text in base64: all of them, or gaps and values. */
function mapOf(text, length) {
  const bytes = bytesOf(text);
  if (bytes[0] === 1) return bytes.subarray(1);
  const values = new Uint8Array(length);
  let place = -1;
  for (let index = 1; index + 1 < bytes.length; index += 2) {
    place += bytes[index] + 1;
    if (bytes[index + 1]) values[place] = bytes[index + 1]; // a value of 0: only a longer gap
  }
  return values;
}

/** A map of an example at the step that is asked for: {rows, columns, values}, null where there is none. */
function mapAt(record, example, facts) {
  if (!example.maps.length || !facts?.rows) return null;
  const place = example.maps.length > 1 ? stepOfMap(example) : 0;
  if (place < 0) return null;
  const rows = Math.ceil(facts.rows / record.pool);
  const columns = Math.ceil(facts.columns / record.pool);
  const values = mapOf(example.maps[place], rows * columns);
  return {
    rows,
    columns,
    values,
    wide: (columns * record.pool) / facts.columns,
    high: (rows * record.pool) / facts.rows,
  };
}

function stepOfMap(example) {
  return pages.steps.indexOf(state.at === "" ? example.step : Number(state.at));
}

/** Draw a map: the stronger the value, the lighter and the more opaque; nothing at all where it is 0. */
function paintMap(canvas, map) {
  canvas.hidden = !map || state.overlay === "none";
  if (canvas.hidden) return;
  [canvas.width, canvas.height] = [map.columns, map.rows];
  Object.assign(canvas.style, { width: `${100 * map.wide}%`, height: `${100 * map.high}%` });
  const picture = new ImageData(map.columns, map.rows);
  const write = state.overlay === "spotlight" ? writeSpotlight : writeHeat;
  map.values.forEach((value, token) => write(picture.data, 4 * token, level(value)));
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

/** A value on the scale that the slider sets. */
const level = (value) => (value ? clamp(Math.round((value * 100) / state.top), 1, 255) : 0);

function writeHeat(data, at, value) {
  for (let channel = 0; channel < 3; channel += 1) data[at + channel] = COLOURS[3 * value + channel];
  data[at + 3] = Math.round(255 * Math.sqrt(value / 255));
}

function writeSpotlight(data, at, value) {
  [data[at], data[at + 1], data[at + 2]] = [SPOTLIGHT.red, SPOTLIGHT.green, SPOTLIGHT.blue];
  data[at + 3] = Math.round(255 * SPOTLIGHT.dark * (1 - Math.sqrt(value / 255)));
}

/** A value's colour for a word or a bar. */
function colourOf(value) {
  const place = 3 * level(value);
  const strength = Math.sqrt(level(value) / 255);
  return `rgb(${COLOURS[place]} ${COLOURS[place + 1]} ${COLOURS[place + 2]} / ${strength.toFixed(3)})`;
}

/** Black or white, whichever can be read on the colour of a value that lies over the page. */
function inkOn(value) {
  const [place, strength] = [3 * level(value), Math.sqrt(level(value) / 255)];
  const mixed = channels(colourNamed("--page")).map(
    (page, channel) => page + (COLOURS[place + channel] - page) * strength,
  );
  return 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] > 130 ? "#14141a" : "#ffffff";
}

function showLegend(largest) {
  const pen = element("legend").getContext("2d");
  const strip = new ImageData(256, 1);
  for (let place = 0; place < 256; place += 1) writeHeat(strip.data, 4 * place, place);
  pen.putImageData(strip, 0, 0);
  element("scale-top").textContent = `${state.top < 100 ? "≥ " : ""}${shortNumber((largest * state.top) / 100)}`;
}

// ---- Shots: a picture with its overlay and a mark where the largest value is ------------------------------------------

/** A picture that can be clicked, patch by patch. `show` paints it for the state as it is now. */
function makeShot(image, facts) {
  const layer = make("span", { className: "layer" });
  const shot = make("button", { type: "button", className: "shot" }, layer);
  shot.classList.toggle("unsized", !facts?.width);
  shot.style.setProperty("--aspect", facts?.width && facts?.height ? facts.width / facts.height : 1);
  if (pages.pictures && facts?.picture)
    layer.append(make("img", { src: thumbnailUrl(image), alt: "", decoding: "async", draggable: false }));
  const canvas = make("canvas", { className: "heat" });
  const peak = make("i", { className: "peak" });
  layer.append(canvas, peak);
  return { shot, layer, canvas, peak };
}

function placePeak({ peak, layer }, token, facts) {
  const [row, column] = [Math.floor(token / facts.columns), token % facts.columns];
  const [left, top] = [(100 * column) / facts.columns, (100 * row) / facts.rows];
  Object.assign(peak.style, { left: `${left}%`, top: `${top}%` });
  Object.assign(peak.style, { width: `${100 / facts.columns}%`, height: `${100 / facts.rows}%` });
  layer.style.transformOrigin = `${left + 50 / facts.columns}% ${top + 50 / facts.rows}%`;
}

/** The token under the pointer, or that of the largest value for a press of a key. */
function tokenAt(event, layer, facts, peakToken) {
  if (!facts.rows) return 0;
  if (event.detail === 0) return peakToken;
  const frame = layer.getBoundingClientRect();
  const column = Math.floor((facts.columns * (event.clientX - frame.left)) / frame.width);
  const row = Math.floor((facts.rows * (event.clientY - frame.top)) / frame.height);
  return clamp(row, 0, facts.rows - 1) * facts.columns + clamp(column, 0, facts.columns - 1);
}
