// One picture of the page: a click looks at a patch, painting marks the region of an edit. Gradio calls this with
// `element`, `props`, `trigger` and `watch`. What the user does is in `props.value`; what is shown comes from Python, in
// `props.shot` (the picture) and `props.marks` (the patch looked at, and where a feature is active).

const frame = element.querySelector(".frame");
const image = element.querySelector("img");
const canvas = element.querySelector("canvas");
const empty = element.querySelector(".empty");
const title = element.querySelector(".title");
const tools = element.querySelector(".tools");
const STOPS = [
  [70, 20, 160],
  [180, 30, 150],
  [238, 68, 72],
  [255, 150, 0],
  [255, 228, 20],
];
let token = null;
let under = null; // the patch under the pointer, or the keyboard's
let painting = null; // true: a stroke adds patches, false: it takes them away
let mode = "look";
let region = new Set(props.value?.region ?? []);

const patches = () => props.shot.columns * props.shot.rows;

function tokenAt(event) {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * props.shot.columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * props.shot.rows);
  const inside = column >= 0 && row >= 0 && column < props.shot.columns && row < props.shot.rows;
  return inside ? row * props.shot.columns + column : null;
}

function cellOf(at) {
  const wide = canvas.width / props.shot.columns;
  const high = canvas.height / props.shot.rows;
  return [(at % props.shot.columns) * wide, Math.floor(at / props.shot.columns) * high, wide, high];
}

function heatColour(share) {
  const place = Math.min(share, 1) * (STOPS.length - 1);
  const first = Math.min(Math.floor(place), STOPS.length - 2);
  const mixed = STOPS[first].map((level, i) => level + (STOPS[first + 1][i] - level) * (place - first));
  return `rgb(${mixed.join(" ")} / ${0.8 * Math.sqrt(Math.min(share, 1))})`;
}

function draw() {
  const box = frame.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(box.width * devicePixelRatio));
  canvas.height = Math.max(1, Math.round(box.height * devicePixelRatio));
  if (!props.shot.picture) return;
  const pen = canvas.getContext("2d");
  const accent = getComputedStyle(element).getPropertyValue("--accent");
  const heat = props.marks.heat;
  for (let at = 0; heat && at < patches(); at++) {
    if (heat[at] > 0) {
      pen.fillStyle = heatColour(heat[at]);
      pen.fillRect(...cellOf(at));
    }
  }
  pen.fillStyle = `color-mix(in srgb, ${accent} 38%, transparent)`;
  for (const at of region) pen.fillRect(...cellOf(at));
  outlineRegion(pen, accent);
  outline(pen, under, "rgb(255 255 255 / 0.55)", "rgb(0 0 0 / 0.35)");
  outline(pen, token, "#ffffff", "#000000");
}

function outlineRegion(pen, accent) {
  const columns = props.shot.columns;
  pen.strokeStyle = accent;
  pen.lineWidth = 2 * devicePixelRatio;
  pen.beginPath();
  for (const at of region) {
    const [x, y, wide, high] = cellOf(at);
    const edges = [
      [at - columns, x, y, x + wide, y],
      [at + columns, x, y + high, x + wide, y + high],
      [at % columns ? at - 1 : -1, x, y, x, y + high],
      [(at + 1) % columns ? at + 1 : -1, x + wide, y, x + wide, y + high],
    ];
    for (const [neighbour, ...line] of edges) {
      if (region.has(neighbour)) continue;
      pen.moveTo(line[0], line[1]);
      pen.lineTo(line[2], line[3]);
    }
  }
  pen.stroke();
}

function outline(pen, at, inner, outer) {
  if (at === null || at >= patches()) return;
  const [x, y, wide, high] = cellOf(at);
  const thick = Math.max(2, Math.round(1.5 * devicePixelRatio));
  pen.lineWidth = thick;
  pen.strokeStyle = outer;
  pen.strokeRect(x - thick / 2, y - thick / 2, wide + thick, high + thick);
  pen.strokeStyle = inner;
  pen.strokeRect(x + thick / 2, y + thick / 2, wide - thick, high - thick);
}

function paint(at) {
  if (at === null) return;
  if (painting) region.add(at);
  else region.delete(at);
}

function tell(event) {
  props.value = { token, region: [...region].sort((a, b) => a - b) };
  sayRegion();
  draw();
  trigger(event);
}

function look(at) {
  token = at;
  tell("select");
}

function sayRegion() {
  const said = region.size ? `${region.size} of ${patches()} patches` : "whole picture";
  const where = tools.querySelector(".region");
  if (where) where.textContent = `Region: ${said}`;
  const clear = tools.querySelector("[data-do=clear]");
  if (clear) clear.disabled = !region.size;
}

function show() {
  const has = Boolean(props.shot.picture);
  title.textContent = props.shot.title;
  frame.style.aspectRatio = `${props.shot.width} / ${props.shot.height}`;
  image.hidden = !has;
  canvas.hidden = !has;
  empty.hidden = has;
  empty.textContent = props.shot.empty ?? "";
  frame.tabIndex = has ? 0 : -1;
  tools.hidden = !has || !props.shot.paints;
  if (has) {
    image.src = props.shot.picture;
    image.alt = props.shot.alt;
    image.classList.toggle("small", props.shot.width < 512);
    region = new Set([...region].filter((at) => at < patches()));
  }
  sayRegion();
  draw();
}

tools.addEventListener("click", (event) => {
  const wish = event.target.dataset?.do;
  if (wish === "clear") {
    region.clear();
    tell("input");
  } else if (wish) {
    mode = wish;
    for (const button of tools.querySelectorAll("[aria-pressed]")) {
      button.setAttribute("aria-pressed", String(button.dataset.do === mode));
    }
    frame.classList.toggle("paints", mode === "paint");
  }
});

canvas.addEventListener("pointerdown", (event) => {
  const at = tokenAt(event);
  if (at === null || event.button !== 0) return;
  if (mode === "look") {
    look(at);
    return;
  }
  canvas.setPointerCapture(event.pointerId);
  painting = !region.has(at);
  paint(at);
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  under = tokenAt(event);
  if (painting !== null) paint(under);
  draw();
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (painting === null) return;
    painting = null;
    tell("input");
  });
}
canvas.addEventListener("pointerleave", () => {
  under = null;
  draw();
});

frame.addEventListener("keydown", (event) => {
  const columns = props.shot.columns;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (event.key in moves) {
    const next = under === null ? (token ?? 0) : under + moves[event.key];
    if (next >= 0 && next < patches()) under = next;
    draw();
  } else if ((event.key === "Enter" || event.key === " ") && under !== null) {
    if (mode === "look") look(under);
    else {
      painting = !region.has(under);
      paint(under);
      painting = null;
      tell("input");
    }
  } else return;
  event.preventDefault();
});

watch("shot", show);
watch("marks", () => {
  token = props.marks.token;
  draw();
});
new ResizeObserver(draw).observe(frame);
show();
