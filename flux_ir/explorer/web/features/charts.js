/* Small charts of one feature: how strong, at which steps, and where. Each is a picture and a sentence that says it. */
"use strict";

const CHART_PX = { width: 300, height: 96, left: 4, right: 4, top: 6, bottom: 18 };

function chart(label, ...marks) {
  const { width, height } = CHART_PX;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  svg.append(...marks);
  return svg;
}

/** How many activations there are of each size, both on logarithmic scales. */
function histogramChart(record) {
  const counts = record.histogram;
  const first = counts.findIndex((count) => count > 0);
  if (first < 0) return null;
  const last = counts.length - 1 - [...counts].reverse().findIndex((count) => count > 0);
  const [from, to] = [Math.max(0, first - 1), Math.min(counts.length - 1, last + 1)];
  const { width, height, left, right, top, bottom } = CHART_PX;
  const step = (width - left - right) / (to - from + 1);
  const most = Math.log1p(Math.max(...counts));
  const ground = height - bottom;
  const bars = [];
  for (let bin = from; bin <= to; bin += 1) {
    const high = ((ground - top) * Math.log1p(counts[bin])) / most;
    const place = { x: left + (bin - from) * step + 0.5, y: ground - high, width: Math.max(1, step - 1), height: high };
    bars.push(draw("rect", { class: "bin", fill: binColour(bin, record.scale), ...place }));
  }
  const edges = pages.of[state.stream].edges;
  const texts = [from, Math.round((from + to + 1) / 2), to + 1].map((edge, index) =>
    draw(
      "text",
      { x: left + (edge - from) * step, y: height - 4, "text-anchor": ["start", "middle", "end"][index] },
      shortNumber(edges[edge]),
    ),
  );
  const said = `${grouped(counts.reduce((sum, count) => sum + count, 0))} activations`;
  return chart(
    `${said}, by size, from ${shortNumber(edges[first])} to ${shortNumber(edges[last + 1])}`,
    axis(ground),
    ...bars,
    ...texts,
  );
}

const axis = (y) => draw("line", { class: "axis", x1: 0, x2: CHART_PX.width, y1: y + 0.5, y2: y + 0.5 });

function binColour(bin, scale) {
  const middle = pages.of[state.stream].edges[bin] * 1.09; // four bins to an octave
  const place = 3 * clamp(Math.round((255 * middle) / scale), 1, 255);
  return `rgb(${COLOURS[place]} ${COLOURS[place + 1]} ${COLOURS[place + 2]})`;
}

/** How often it fires at each step (the bars), and how strong it is on average (the line). */
function profileChart(record) {
  const { steps } = pages;
  const { frequency, mean } = record.profile;
  const { width, height, left, right, top, bottom } = CHART_PX;
  const ground = height - bottom;
  const step = (width - left - right) / steps.length;
  const wide = Math.min(44, 0.7 * step);
  const middle = (index) => left + (index + 0.5) * step;
  const up = (value, all) => ((ground - top) * value) / (Math.max(...all) || 1);
  const marks = frequency.map((value, index) =>
    draw("rect", {
      class: "often",
      x: middle(index) - wide / 2,
      y: ground - up(value, frequency),
      width: wide,
      height: up(value, frequency),
    }),
  );
  const line = mean.map((value, index) => `${middle(index).toFixed(1)} ${(ground - up(value, mean)).toFixed(1)}`);
  if (steps.length > 1) marks.push(draw("path", { class: "strong", d: `M${line.join("L")}` }));
  mean.forEach((value, index) =>
    marks.push(draw("circle", { class: "strong-dot", cx: middle(index), cy: ground - up(value, mean), r: 3 })),
  );
  const every = Math.ceil(steps.length / 12);
  steps.forEach((number, index) => {
    if (index % every === 0)
      marks.push(draw("text", { x: middle(index), y: height - 4, "text-anchor": "middle" }, String(number)));
  });
  const said = steps
    .map((number, index) => `step ${number} ${shortPercent(100 * frequency[index])} percent`)
    .join(", ");
  return chart(`Share of the tokens it fires on: ${said}`, axis(ground), ...marks);
}

/** The mean of the maps of its top pictures, with the centre and the spread of all its activation. */
function placeChart(record, facts) {
  const top = record.groups.find((group) => group.kind === "top")?.examples ?? [];
  const first = facts.get(top[0]?.image);
  const maps = top.map((example) => [mapAt(record, example, facts.get(example.image)), facts.get(example.image)]);
  const alike = maps.filter(([map, known]) => map && known.rows === first.rows && known.columns === first.columns);
  if (!alike.length) return null;
  const mean = new Float32Array(alike[0][0].values.length);
  for (const [{ values }] of alike) values.forEach((value, token) => (mean[token] += value / alike.length));
  const most = Math.max(...mean) || 1;
  const map = { ...alike[0][0], values: Uint8Array.from(mean, (value) => Math.round((255 * value) / most)) };
  const frame = make("div", { className: "place" });
  frame.style.setProperty(
    "--aspect",
    first.width && first.height ? first.width / first.height : first.columns / first.rows,
  );
  const canvas = make("canvas", { width: map.columns, height: map.rows });
  const picture = new ImageData(map.columns, map.rows);
  map.values.forEach((value, token) => writeHeat(picture.data, 4 * token, value));
  canvas.getContext("2d").putImageData(picture, 0, 0);
  frame.append(canvas, ...centreMark(first));
  frame.setAttribute("role", "img");
  frame.setAttribute("aria-label", "Where its top pictures have it, and the centre and spread of all its activation");
  return frame;
}

function centreMark({ rows, columns }) {
  const [x, y, spread] = ["centre_x", "centre_y", "spread"].map((name) => numberOf(name));
  if (![x, y, spread].every(Number.isFinite)) return [];
  const ring = make("i", { className: "ring" });
  const longer = Math.max(rows, columns);
  Object.assign(ring.style, { left: `${100 * x}%`, top: `${100 * y}%` });
  Object.assign(ring.style, {
    width: `${(200 * spread * longer) / columns}%`,
    height: `${(200 * spread * longer) / rows}%`,
  });
  return [ring];
}
