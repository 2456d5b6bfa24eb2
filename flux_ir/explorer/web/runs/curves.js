/* Curves by depth: distance to the final answer or to another run, a line per step; at one step, a line per lens. */
"use strict";

let curves = null; // {key, x, y, lines, width}: how the lines were drawn, and of what

const PLAIN = "relative_distance"; // of the velocity that euler and x0 share
const lensNumbers = (run) =>
  [PLAIN, ...Object.keys(FITTED).map((lens) => `${lens}_${PLAIN}`)].filter((name) => run.numbers[name]);
const canCompareLenses = (run) => lensNumbers(run).length > 1;

/** What the curves show of a run: how far it is from its final answer, by step or lens, or from another run. */
function curveOf(run) {
  const there = { final: true, lenses: canCompareLenses(run), other: Boolean(run.numbers.other_distance) };
  return there[state.curve] ? state.curve : "final";
}

const lensNamed = (name) => (name === PLAIN ? "plain" : FITTED[name.replace(`_${PLAIN}`, "")]);

/** The number that the lens looked through has, or that of the plain one; or the one that two runs have. */
function chartedNumber(shot) {
  if (curveOf(shot.run) === "other") return "other_distance";
  const own = velocityNumber(shot, PLAIN);
  return shot.run.numbers[own] ? own : PLAIN;
}

/** What is drawn: {name, label, values by block}, in the order of lenses or steps. */
function linesOf(shot) {
  const { run } = shot;
  if (curveOf(run) === "lenses")
    return lensNumbers(run).map((name) => {
      const values = run.numbers[name].map((steps) => steps[shot.step]);
      return { name, label: lensNamed(name), values };
    });
  const name = chartedNumber(shot);
  return run.steps.map((number, step) => {
    const values = run.numbers[name].map((steps) => steps[step]);
    return { name, label: `step ${number}`, values };
  });
}

const lineLooked = (shot) =>
  curveOf(shot.run) === "lenses" ? lensNumbers(shot.run).indexOf(chartedNumber(shot)) : shot.step;

/** Draws the curves again if they are of something else than what is looked at, or of another width. */
function buildCurves() {
  const svg = element("curves");
  const shot = looked();
  const curve = curveOf(shot.run);
  const known = Boolean(shot.run.numbers[chartedNumber(shot)]);
  showCurveHead(shot, curve, known);
  svg.toggleAttribute("hidden", !known);
  const key = [shot.run.id, curve, curve === "lenses" ? shot.step : chartedNumber(shot), svg.clientWidth].join(" ");
  if (curves?.key === key) return;
  curves = null;
  if (!known || !svg.clientWidth) return;
  const { height, left, right, top, bottom } = CURVES_PX;
  const last = Math.max(1, shot.run.blocks.length - 1);
  const lines = linesOf(shot);
  // The same scale at every step: lines that fall from one step to the next are seen to.
  const names = curve === "lenses" ? lensNumbers(shot.run) : [lines[0].name];
  const every = names.flatMap((name) => shot.run.numbers[name].flat());
  const most = niceCeiling(Math.max(...every.filter((value) => value !== null)));
  const x = (block) => left + ((svg.clientWidth - left - right) * block) / last;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
  const paths = lines.map((line, index) => {
    const path = draw("path", {
      class: curve === "lenses" ? `line of-${line.name}` : "line",
      d: pathOf(line.values, x, y),
    });
    path.style.setProperty("--progress", `${(100 * index) / Math.max(1, lines.length - 1)}%`);
    return path;
  });
  svg.setAttribute("viewBox", `0 0 ${svg.clientWidth} ${height}`);
  svg.replaceChildren(...axes(x, y, most, svg.clientWidth - right), ...paths, draw("g", { class: "marks" }));
  curves = { key, x, y, lines, width: svg.clientWidth };
}

/** What the curves show, as words; runs with fitted lenses, or that were compared, have a choice of it. */
function showCurveHead(shot, curve, known) {
  const { run } = shot;
  const lenses = lensNumbers(run);
  element("no-curves").hidden = known;
  element("curve-choice").hidden = lenses.length < 2 && !run.numbers.other_distance;
  for (const button of element("curve-choice").children) {
    button.setAttribute("aria-pressed", button.dataset.curve === curve);
    button.hidden =
      (button.dataset.curve === "lenses" && lenses.length < 2) ||
      (button.dataset.curve === "other" && !run.numbers.other_distance);
  }
  element("curve-title").textContent =
    curve === "other" ? "Where do the two runs differ?" : "Where does the picture appear?";
  const fed = run.other?.mode === "forced" ? " The second model was evaluated at the first one’s states." : "";
  const through = lenses.length > 1 ? ` Through the ${lensNamed(chartedNumber(shot))} lens.` : "";
  const more = { final: through, lenses: ` Step ${run.steps[shot.step]}.`, other: fed }[curve];
  element("curve-note").textContent = CURVE_NOTES[curve] + more;
  element("legend").hidden = !known || curve === "lenses" || run.steps.length < 2;
  element("legend").firstElementChild.textContent = `step ${run.steps[0]}`;
  element("legend").lastElementChild.textContent = run.steps.at(-1);
  element("lens-legend").hidden = curve !== "lenses";
  if (curve === "lenses")
    element("lens-legend").replaceChildren(
      ...lenses.map((name) => make("span", { className: `of-${name}`, textContent: lensNamed(name) })),
    );
}

function changeCurve(curve) {
  act(() => (state.curve = curve));
}

/** To the next of the curves that the run has. */
function nextCurve() {
  const there = [...element("curve-choice").children].filter((button) => !button.hidden);
  const at = there.findIndex((button) => button.getAttribute("aria-pressed") === "true");
  if (there.length) changeCurve(there[(at + 1) % there.length].dataset.curve);
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value || 1));
  const ceiling = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((one) => one >= value) ?? 1;
  // Distances to the final answer share one scale, up to 1; another run may be much nearer.
  return curveOf(state.run) === "other" ? ceiling : Math.max(1, ceiling);
}

function pathOf(values, x, y) {
  let pen = "M";
  let path = "";
  values.forEach((value, block) => {
    if (value !== null) path += `${pen}${x(block).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value === null ? "M" : "L";
  });
  return path;
}

function axes(x, y, most, end) {
  const { blocks } = state.run;
  const every = [1, 2, 5, 10].find((pace) => blocks.length / pace <= 24) ?? 20;
  const first = blocks.findIndex((block) => block.startsWith("single"));
  const marks = [0, most / 2, most].flatMap((value) => [
    draw("line", { class: value ? "axis mid" : "axis", x1: x(0), x2: end, y1: y(value), y2: y(value) }),
    draw("text", { x: x(0) - 8, y: y(value) + 4, "text-anchor": "end" }, String(value)),
  ]);
  blocks.forEach((block, index) => {
    const digits = block.split(".")[1];
    if (digits % every === 0) marks.push(draw("text", { x: x(index), y: y(0) + 14, "text-anchor": "middle" }, digits));
  });
  if (first !== 0) marks.push(draw("text", { x: x(0), y: y(0) + 28, "text-anchor": "start" }, "double"));
  if (first > 0)
    marks.push(draw("line", { class: "axis", x1: x(first - 0.5), x2: x(first - 0.5), y1: y(most), y2: y(0) + 28 }));
  if (first >= 0) marks.push(draw("text", { x: x(first), y: y(0) + 28, "text-anchor": "start" }, "single"));
  return marks;
}

function showCurveMarks() {
  buildCurves();
  if (!curves) return;
  const here = looked();
  const { x, y, lines, width } = curves;
  const at = lineLooked(here);
  const line = lines[at];
  const distance = line.values[here.block] ?? undefined;
  const marks = [draw("line", { class: "guide", x1: x(here.block), x2: x(here.block), y1: CURVES_PX.top, y2: y(0) })];
  const other = curveOf(here.run) === "lenses" ? ` of-${line.name}` : "";
  marks.push(draw("path", { class: `here${other}`, d: pathOf(line.values, x, y) }));
  if (distance !== undefined) {
    const flip = x(here.block) > width * 0.7;
    marks.push(draw("circle", { cx: x(here.block), cy: y(distance), r: 5 }));
    const place = { class: "say", x: x(here.block) + (flip ? -10 : 10), y: Math.max(22, y(distance) - 8) };
    marks.push(draw("text", { ...place, "text-anchor": flip ? "end" : "start" }, `${line.label}: ${digits(distance)}`));
  }
  element("curves").lastElementChild.replaceChildren(...marks);
  const values = curveOf(here.run) === "lenses" ? lines : [{ label: "", values: line.values }];
  const said = values.map(({ label, values }) => {
    const value = values[here.block] ?? undefined;
    return `${label} ${value === undefined ? "unknown" : digits(value)}`.trim();
  });
  element("curves").setAttribute(
    "aria-label",
    `Relative distance to the ${curveOf(here.run) === "other" ? "other run" : "final answer"} by depth. ${placeOf(here)}: ${said.join(", ")}.`,
  );
}

/** The cell whose point on the curves is nearest to the pointer: first the block, then the step if lines are steps. */
function cellNear(event) {
  if (!curves) return null;
  const box = element("curves").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const block = nearest(state.run.blocks.length, (index) => Math.abs(curves.x(index) - x));
  if (curveOf(state.run) === "lenses") return { block, step: state.step };
  const step = nearest(curves.lines.length, (index) => {
    const value = curves.lines[index].values[block];
    return value === null ? Infinity : Math.abs(curves.y(value) - y);
  });
  return { block, step };
}

const digits = (distance) => distance.toFixed(distance < 0.01 ? 4 : 3);

function nearest(count, distance) {
  let best = 0;
  for (let index = 1; index < count; index += 1) if (distance(index) < distance(best)) best = index;
  return best;
}
