/* The map of all features: a dot for each, on two of their numbers; a box drawn on it is a filter of the list. */
"use strict";

const MARGIN_PX = { left: 46, right: 10, top: 8, bottom: 30 };
const CLICK_PX = 4; // a press that moves less is a click
const NEAR_PX = 14; // how far from a dot the pointer means it

let dots = null; // {width, height, x, y}: where each feature's dot lies on the canvas [CSS px], NaN where it has none
let drag = null; // {x, y}: where the press began
let pointed = null; // the feature under the pointer

function buildAxes() {
  for (const axis of ["x", "y"]) {
    const select = element(`axis-${axis}`);
    select.replaceChildren(
      ...columnsOf().map((column) => make("option", { value: column.name, textContent: titled(column) })),
    );
  }
}

// ---- Scales: logarithmic where all numbers are positive and spread over decades -----------------------------------------

function scaleOf(name) {
  const values = list.columns.get(name);
  let [least, most, positive] = [Infinity, -Infinity, Infinity];
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    least = Math.min(least, value);
    most = Math.max(most, value);
    if (value > 0) positive = Math.min(positive, value);
  }
  const log = least >= 0 && most > 30 * positive;
  if (!(most > least)) [least, most] = [Number.isFinite(least) ? least - 1 : 0, Number.isFinite(most) ? most + 1 : 1];
  const [low, high] = log ? [Math.log10(positive), Math.log10(most)] : [least, most];
  const edge = 0.03 * (high - low);
  return { log, low: low - edge, high: high + edge };
}

const toScale = (scale, value) => (scale.log ? (value > 0 ? Math.log10(value) : NaN) : value);
const fromScale = (scale, place) => (scale.log ? 10 ** place : place);

function scalesNow() {
  const scales = { x: { ...scaleOf(state.x) }, y: { ...scaleOf(state.y) } };
  if (!state.view) return scales;
  const [left, right, bottom, top] = numbersIn(state.view);
  Object.assign(scales.x, { low: left, high: right });
  Object.assign(scales.y, { low: bottom, high: top });
  return scales;
}

// ---- Drawing ------------------------------------------------------------------------------------------------------------

let scatterKey = "";

function showScatter() {
  for (const axis of ["x", "y"]) element(`axis-${axis}`).value = state[axis];
  element("whole").hidden = !state.view;
  const frame = element("scatter");
  const [width, height] = [frame.clientWidth, frame.clientHeight];
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const key = JSON.stringify([orderKey, state.x, state.y, state.view, width, height, devicePixelRatio, dark]);
  if (key !== scatterKey && width) {
    scatterKey = key;
    const scales = scalesNow();
    placeDots(scales, width, height);
    drawDots(width, height);
    drawAxes(scales, width, height);
  }
  showBox();
}

function placeDots(scales, width, height) {
  const { left, right, top, bottom } = MARGIN_PX;
  const [across, up] = [width - left - right, height - top - bottom];
  const [xs, ys] = [list.columns.get(state.x), list.columns.get(state.y)];
  dots = { scales, width, height, x: new Float32Array(pages.d_sae), y: new Float32Array(pages.d_sae) };
  for (let feature = 0; feature < pages.d_sae; feature += 1) {
    dots.x[feature] =
      left + (across * (toScale(scales.x, xs[feature]) - scales.x.low)) / (scales.x.high - scales.x.low);
    dots.y[feature] = top + up * (1 - (toScale(scales.y, ys[feature]) - scales.y.low) / (scales.y.high - scales.y.low));
  }
}

const colourNamed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** "#rrggbb" as numbers. */
const channels = (colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));

/** Dots are counted pixel by pixel, so that 65,536 of them take a few milliseconds: listed ones above the others. */
function drawDots(width, height) {
  const ratio = devicePixelRatio;
  const canvas = element("scatter-canvas");
  const [columns, rows] = [Math.round(width * ratio), Math.round(height * ratio)];
  [canvas.width, canvas.height] = [columns, rows];
  const cover = [new Float32Array(columns * rows), new Float32Array(columns * rows)];
  const stamp = dotStamp(clamp(3.4 - 0.46 * Math.log10(pages.d_sae), 1.1, 3) * ratio);
  for (let feature = 0; feature < pages.d_sae; feature += 1)
    if (isInside(feature)) press(cover[Number(positions[feature] >= 0)], stamp, feature, columns, rows, ratio);
  const picture = new ImageData(columns, rows);
  const colours = [channels(colourNamed("--dot")), channels(colourNamed("--accent"))];
  const crowd = cover.map((group) => Math.log1p(group.reduce((most, share) => Math.max(most, share), 1)));
  for (let at = 0; at < columns * rows; at += 1) {
    const group = cover[1][at] > 0.2 || !cover[0][at] ? 1 : 0;
    if (!cover[group][at]) continue;
    const alpha = 0.25 + (0.75 * Math.log1p(cover[group][at])) / crowd[group];
    for (let channel = 0; channel < 3; channel += 1) picture.data[4 * at + channel] = colours[group][channel];
    picture.data[4 * at + 3] = Math.round(255 * alpha * Math.min(1, cover[group][at]));
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function isInside(feature) {
  const [x, y] = [dots.x[feature], dots.y[feature]];
  const { left, right, top, bottom } = MARGIN_PX;
  return x >= left && x <= dots.width - right && y >= top && y <= dots.height - bottom; // false for NaN
}

/** How much of each pixel around the middle of a dot it covers. */
function dotStamp(radius) {
  const reach = Math.ceil(radius);
  const found = [];
  for (let y = -reach; y <= reach; y += 1)
    for (let x = -reach; x <= reach; x += 1) {
      const cover = clamp(radius + 0.5 - Math.hypot(x, y), 0, 1);
      if (cover > 0) found.push([x, y, cover]);
    }
  return found;
}

function press(cover, stamp, feature, columns, rows, ratio) {
  const [x, y] = [Math.round(dots.x[feature] * ratio), Math.round(dots.y[feature] * ratio)];
  for (const [right, down, share] of stamp) {
    const [column, row] = [x + right, y + down];
    if (column >= 0 && column < columns && row >= 0 && row < rows) cover[row * columns + column] += share;
  }
}

function drawAxes(scales, width, height) {
  const pen = element("scatter-canvas").getContext("2d");
  pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  const { left, right, top, bottom } = MARGIN_PX;
  pen.fillStyle = colourNamed("--muted");
  pen.strokeStyle = colourNamed("--rule");
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.strokeRect(left + 0.5, top + 0.5, width - left - right - 1, height - top - bottom - 1);
  pen.textAlign = "center";
  for (const place of ticks(scales.x)) {
    const x = left + ((width - left - right) * (place - scales.x.low)) / (scales.x.high - scales.x.low);
    pen.fillText(tickText(fromScale(scales.x, place), state.x), x, height - bottom + 14);
  }
  pen.textAlign = "right";
  for (const place of ticks(scales.y)) {
    const y = top + (height - top - bottom) * (1 - (place - scales.y.low) / (scales.y.high - scales.y.low));
    pen.fillText(tickText(fromScale(scales.y, place), state.y), left - 6, y + 4);
  }
  pen.textAlign = "center";
  pen.fillText(titled(columnNamed(state.x)), left + (width - left - right) / 2, height - 2);
  pen.setTransform(1, 0, 0, 1, 0, 0);
}

function tickText(value, name) {
  return columnNamed(name).unit === "share" ? shortPercent(100 * value).replace(/\.0+$/, "") : tidy(value);
}

const tidy = (value) =>
  Math.abs(value) >= 1e-3 || value === 0 ? String(Number(value.toPrecision(2))) : shortNumber(value);

/** Three to six round places within a scale. */
function ticks({ low, high, log }) {
  if (log && high - low > 1.2) {
    const decades = whole(Math.floor(low), high, Math.max(1, Math.round((high - low) / 5)));
    const places = high - low < 3 ? decades.flatMap((place) => [place, place + Math.log10(3)]) : decades;
    return places.filter((place) => place >= low && place <= high);
  }
  const unit = 10 ** Math.floor(Math.log10(high - low));
  const step = [0.1, 0.2, 0.25, 0.5, 1].map((part) => part * unit).find((size) => (high - low) / size <= 5) ?? unit;
  return whole(low / step, high / step, 1).map((place) => place * step);
}

function whole(low, high, pace) {
  const found = [];
  for (let place = Math.ceil(low / pace) * pace; place <= high; place += pace) found.push(place);
  return found;
}

// ---- The box, the zoom, the dot that is meant ---------------------------------------------------------------------------

/** What lies at a point of the canvas, in the numbers of the axes' scales. */
function placeAt(x, y) {
  const { left, right, top, bottom } = MARGIN_PX;
  const { scales, width, height } = dots;
  return {
    x: scales.x.low + ((x - left) / (width - left - right)) * (scales.x.high - scales.x.low),
    y: scales.y.low + (1 - (y - top) / (height - top - bottom)) * (scales.y.high - scales.y.low),
  };
}

function pointOf(axis, value) {
  const { left, right, top, bottom } = MARGIN_PX;
  const { scales, width, height } = dots;
  const share = (toScale(scales[axis], value) - scales[axis].low) / (scales[axis].high - scales[axis].low);
  const known = Number.isFinite(share) ? clamp(share, 0, 1) : 0;
  return axis === "x" ? left + known * (width - left - right) : top + (1 - known) * (height - top - bottom);
}

function showBox() {
  const box = element("box");
  box.hidden = !state.box || !dots;
  if (box.hidden) return;
  const [left, right, bottom, top] = numbersIn(state.box);
  const [x, y] = [pointOf("x", left), pointOf("y", top)];
  frameBox(x, y, pointOf("x", right), pointOf("y", bottom));
}

function frameBox(left, top, right, bottom) {
  Object.assign(element("box").style, { left: `${left}px`, top: `${top}px` });
  Object.assign(element("box").style, { width: `${right - left}px`, height: `${bottom - top}px` });
  element("box").hidden = false;
}

const pointIn = (event) => {
  const frame = element("scatter").getBoundingClientRect();
  return { x: event.clientX - frame.left, y: event.clientY - frame.top };
};

function onScatterMove(event) {
  if (!dots) return;
  const here = pointIn(event);
  if (drag) {
    const [left, right] = [Math.min(drag.x, here.x), Math.max(drag.x, here.x)];
    frameBox(left, Math.min(drag.y, here.y), right, Math.max(drag.y, here.y));
    return;
  }
  const feature = dotAt(here);
  element("scatter").classList.toggle("meant", feature !== null);
  if (feature !== pointed && feature !== null) showPeek(feature);
  pointed = feature;
}

/** The listed feature whose dot is nearest, if it is near. */
function dotAt({ x, y }) {
  let [best, least] = [null, NEAR_PX ** 2];
  for (let feature = 0; feature < pages.d_sae; feature += 1) {
    if (positions[feature] < 0) continue;
    const distance = (dots.x[feature] - x) ** 2 + (dots.y[feature] - y) ** 2;
    if (distance < least && isInside(feature)) [best, least] = [feature, distance];
  }
  return best;
}

function onScatterUp(event) {
  if (!drag) return;
  const [from, to] = [drag, pointIn(event)];
  drag = null;
  if (Math.hypot(to.x - from.x, to.y - from.y) < CLICK_PX) {
    const feature = dotAt(to);
    showBox();
    if (feature !== null) openFeature(feature);
    return;
  }
  const [first, last] = [placeAt(from.x, from.y), placeAt(to.x, to.y)];
  const { scales } = dots;
  const side = (axis, pick) => fromScale(scales[axis], pick(first[axis], last[axis])).toPrecision(6);
  const sides = [side("x", Math.min), side("x", Math.max), side("y", Math.min), side("y", Math.max)];
  act(() => (state.box = sides.map(Number).join(",")));
}

/** Zoom by the wheel, the place under the pointer standing still. */
function onScatterWheel(event) {
  if (!dots) return;
  event.preventDefault();
  const here = pointIn(event);
  const place = placeAt(here.x, here.y);
  const factor = Math.exp(0.0015 * event.deltaY);
  const whole = { x: scaleOf(state.x), y: scaleOf(state.y) };
  const sides = ["x", "y"].flatMap((axis) => {
    const { low, high } = dots.scales[axis];
    const moved = [low, high].map((edge) => place[axis] + (edge - place[axis]) * factor);
    return [Math.max(moved[0], whole[axis].low), Math.min(moved[1], whole[axis].high)];
  });
  const out = sides.every(
    (side, index) => Math.abs(side - [whole.x.low, whole.x.high, whole.y.low, whole.y.high][index]) < 1e-9,
  );
  act(() => (state.view = out ? "" : sides.map((side) => Number(side.toPrecision(7))).join(",")));
}

/** A glance at a feature: its label and its pictures, without leaving the list. */
function showPeek(feature) {
  const peek = element("peek");
  if (feature === undefined || feature === null || peek.dataset.feature === `${state.stream} ${feature}`) return;
  peek.dataset.feature = `${state.stream} ${feature}`;
  const thumbs = Array.from({ length: pages.top_thumbnails }, makeThumb);
  thumbs.forEach((thumb, place) => paintThumb(thumb, feature, place));
  const name = make("a", { href: addressOf({ feature }), textContent: texts?.labels[feature] || `Feature ${feature}` });
  const words = make("p", { className: "note", textContent: texts?.words[feature] || "" });
  const facts = [`feature ${feature}`, densityWord(numberOf("frequency", feature))];
  facts.push(`largest ${formatted(numberOf("max_active", feature))}`);
  peek.replaceChildren(
    make("h2", {}, name),
    make("p", { className: "facts" }, ...facts.map((fact) => make("span", { textContent: fact }))),
    words,
    make("div", { className: "peek-strip" }, ...thumbs.map((thumb) => thumb.frame)),
  );
}

function listenToScatter() {
  const frame = element("scatter");
  frame.addEventListener("pointermove", onScatterMove);
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !dots) return;
    drag = pointIn(event);
    frame.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  frame.addEventListener("pointerup", onScatterUp);
  frame.addEventListener("pointercancel", () => {
    drag = null;
    showBox();
  });
  frame.addEventListener("wheel", onScatterWheel, { passive: false });
  frame.addEventListener("dblclick", () => act(() => (state.view = "")));
  element("whole").addEventListener("click", () => act(() => (state.view = "")));
  for (const axis of ["x", "y"])
    element(`axis-${axis}`).addEventListener("change", ({ target }) =>
      act(() => Object.assign(state, { [axis]: target.value, box: "", view: "" })),
    );
}
