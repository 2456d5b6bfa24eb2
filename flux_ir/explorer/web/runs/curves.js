/* Curves: distance to the final answer, or to another run, by depth; one line per step. */
"use strict";

let curves = null; // {x, y, paths}: how the lines of this run were drawn

function buildCurves() {
  const svg = element("curves");
  const distances = state.run.numbers[curveOf(state.run)];
  showCurveChoice();
  element("no-curves").hidden = Boolean(distances);
  svg.toggleAttribute("hidden", !distances);
  element("legend").hidden = !distances || state.run.steps.length < 2;
  curves = null;
  if (!distances || !svg.clientWidth) return;
  const { height, left, right, top, bottom } = CURVES_PX;
  const last = Math.max(1, state.run.blocks.length - 1);
  const most = niceCeiling(Math.max(...distances.flat().filter((value) => value !== null)));
  const x = (block) => left + ((svg.clientWidth - left - right) * block) / last;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
  const paths = state.run.steps.map((_, step) =>
    pathOf(
      distances.map((values) => values[step]),
      x,
      y,
    ),
  );
  const lines = paths.map((path) => draw("path", { class: "line", d: path }));
  lines.forEach((line, step) =>
    line.style.setProperty("--progress", `${(100 * step) / Math.max(1, lines.length - 1)}%`),
  );
  svg.setAttribute("viewBox", `0 0 ${svg.clientWidth} ${height}`);
  svg.replaceChildren(...axes(x, y, most, svg.clientWidth - right), ...lines, draw("g", { class: "marks" }));
  element("legend").firstElementChild.textContent = `step ${state.run.steps[0]}`;
  element("legend").lastElementChild.textContent = state.run.steps.at(-1);
  curves = { x, y, paths, width: svg.clientWidth };
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value || 1));
  const ceiling = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((one) => one >= value) ?? 1;
  // Distances to the final answer share one scale, up to 1; another run may be much nearer.
  return curveOf(state.run) === CURVES.final ? Math.max(1, ceiling) : ceiling;
}

/** Two runs that were compared have curves of their own, beside those that every run has. */
function showCurveChoice() {
  const { other, numbers } = state.run;
  element("curve-choice").hidden = !numbers.other_distance;
  for (const button of element("curve-choice").children)
    button.setAttribute("aria-pressed", CURVES[button.dataset.curve] === curveOf(state.run));
  const shown = curveOf(state.run) === CURVES.other ? "other" : "final";
  element("curve-title").textContent =
    shown === "other" ? "Where do the two runs differ?" : "Where does the picture appear?";
  const fed = other?.mode === "forced" ? " The second model was evaluated at the first one’s states." : "";
  element("curve-note").textContent = CURVE_NOTES[shown] + (shown === "other" ? fed : "");
}

function changeCurve(curve) {
  act(() => (state.curve = curve));
  buildCurves();
  showCurveMarks();
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
  if (!curves) return;
  const here = looked();
  const { x, y, paths, width } = curves;
  const distance = number(here, curveOf(here.run));
  const step = here.run.steps[here.step];
  const marks = [draw("line", { class: "guide", x1: x(here.block), x2: x(here.block), y1: CURVES_PX.top, y2: y(0) })];
  marks.push(draw("path", { class: "here", d: paths[here.step] }));
  if (distance !== undefined) {
    const flip = x(here.block) > width * 0.7;
    marks.push(draw("circle", { cx: x(here.block), cy: y(distance), r: 5 }));
    const place = { class: "say", x: x(here.block) + (flip ? -10 : 10), y: Math.max(22, y(distance) - 8) };
    marks.push(draw("text", { ...place, "text-anchor": flip ? "end" : "start" }, `step ${step}: ${digits(distance)}`));
  }
  element("curves").lastElementChild.replaceChildren(...marks);
  const said = distance === undefined ? "unknown" : digits(distance);
  element("curves").setAttribute(
    "aria-label",
    `Relative distance to the ${curveOf(here.run) === CURVES.other ? "other run" : "final answer"} by depth. ${placeOf(here)}: ${said}.`,
  );
}

/** The cell whose point on the curves is nearest to the pointer: first the block, then the step. */
function cellNear(event) {
  if (!curves) return null;
  const box = element("curves").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const { blocks, steps, numbers } = state.run;
  const block = nearest(blocks.length, (index) => Math.abs(curves.x(index) - x));
  const values = numbers[curveOf(state.run)][block];
  const step = nearest(steps.length, (index) =>
    values[index] === null ? Infinity : Math.abs(curves.y(values[index]) - y),
  );
  return { block, step };
}

const digits = (distance) => distance.toFixed(distance < 0.01 ? 4 : 3);

function nearest(count, distance) {
  let best = 0;
  for (let index = 1; index < count; index += 1) if (distance(index) < distance(best)) best = index;
  return best;
}
