/* The grid: every block at every step on one canvas, a cell for each map. The first row and column are means. */
"use strict";

const GAP_PX = 2;
const CELL_PX = { least: 24, most: 64 };
const LABELS_PX = 90; // the names of the blocks
const tile = { width: 0, height: 0 };

/** Cells in the shape of the picture, all steps in the room there is, unless they are too many. */
function layOutGrid() {
  const room = element("scroller").parentElement.clientWidth - LABELS_PX;
  const longest = clamp(Math.floor(room / STEPS.length) - GAP_PX, CELL_PX.least, CELL_PX.most);
  const scale = longest / Math.max(data.grid[0], data.grid[1]);
  [tile.width, tile.height] = [COLUMNS, ROWS].map(
    (count) => Math.max(8, Math.round(count * data.pool * scale)) + GAP_PX,
  );
  const canvas = element("grid");
  const fine = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [STEPS.length * tile.width * fine, BLOCKS.length * tile.height * fine];
  canvas.style.width = `${STEPS.length * tile.width}px`;
  canvas.style.height = `${BLOCKS.length * tile.height}px`;
  element("steps").replaceChildren(...STEPS.map((name) => make("span", { textContent: name })));
  element("blocks").replaceChildren(...BLOCKS.map((name) => make("span", { textContent: spoken(name) })));
  for (const label of element("steps").children) label.style.width = `${tile.width}px`;
  for (const label of element("blocks").children) label.style.height = `${tile.height}px`;
  Object.assign(element("here").style, { width: `${tile.width}px`, height: `${tile.height}px` });
}

function drawGrid() {
  const canvas = element("grid");
  const pen = canvas.getContext("2d");
  const fine = window.devicePixelRatio || 1;
  const small = new OffscreenCanvas(COLUMNS, ROWS);
  pen.setTransform(fine, 0, 0, fine, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = false;
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--empty");
  BLOCKS.forEach((_, block) =>
    STEPS.forEach((_, step) => {
      const [left, top] = [step * tile.width, block * tile.height];
      pen.fillRect(left, top, tile.width - GAP_PX, tile.height - GAP_PX);
      const map = maps?.[block][step];
      if (!map) return;
      small.getContext("2d").putImageData(coloured(map, 1), 0, 0);
      pen.drawImage(small, left, top, tile.width - GAP_PX, tile.height - GAP_PX);
    }),
  );
}

/** A map as an image of one pixel per token: the stronger the value, the lighter and the more opaque. */
function coloured(map, opacity) {
  const picture = new ImageData(COLUMNS, ROWS);
  const scale = scaleOf(map);
  map.values.forEach((value, cell) => {
    const shade = level(value, scale);
    for (let channel = 0; channel < 3; channel += 1) picture.data[4 * cell + channel] = COLOURS[3 * shade + channel];
    picture.data[4 * cell + 3] = Math.round(255 * opacity * Math.sqrt(shade / 255));
  });
  return picture;
}

/** Mark the cell that is selected, and have it seen. */
function showHere() {
  element("here").style.transform = `translate(${state.step * tile.width - 1}px, ${state.block * tile.height - 1}px)`;
  for (const [id, here] of [
    ["steps", state.step],
    ["blocks", state.block],
  ]) {
    [...element(id).children].forEach((label, index) => label.classList.toggle("here", index === here));
  }
  const room = element("scroller");
  const margin = { left: element("blocks").offsetWidth, top: element("steps").offsetHeight };
  const [left, top] = [state.step * tile.width, state.block * tile.height];
  room.scrollLeft = clamp(room.scrollLeft, left + tile.width + margin.left - room.clientWidth, left);
  room.scrollTop = clamp(room.scrollTop, top + tile.height + margin.top - room.clientHeight, top);
}

/** The cell under the pointer. */
function cellAt(event) {
  const frame = element("grid").getBoundingClientRect();
  return {
    block: clamp(Math.floor((event.clientY - frame.top) / tile.height), 0, BLOCKS.length - 1),
    step: clamp(Math.floor((event.clientX - frame.left) / tile.width), 0, STEPS.length - 1),
  };
}
