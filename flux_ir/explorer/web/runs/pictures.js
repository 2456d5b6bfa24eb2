/* Pictures: thumbnails are cut from bands, large pictures are loaded when looked at. */
"use strict";

const inlined = new Map(); // address -> blob URL, never revoked: frames and backgrounds may name it at any time

/** The URL behind an address of the data: itself, or a blob of the element it names (null if that is not there yet). */
function urlOf(address) {
  if (!address?.startsWith("#")) return address;
  const holder = inlined.has(address) ? null : element(address.slice(1));
  if (holder) {
    const bytes = Uint8Array.from(atob(holder.textContent), (letter) => letter.charCodeAt(0));
    inlined.set(address, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
  }
  return inlined.get(address) ?? null;
}

function pictureUrl(run, lens, block, step) {
  const [kind, index] = run.blocks[block].split(".");
  const { pictures } = run.lenses[lens];
  return urlOf(pictures.replace("{kind}", kind).replace("{block}", index).replace("{step}", run.steps[step]));
}

const missing = new Map(); // run -> lens -> Set of "row,column"

function isMissing(run, lens, block, step) {
  if (!missing.has(run))
    missing.set(run, new Map(lensesOf(run).map((name) => [name, new Set(run.lenses[name].missing.map(String))])));
  return missing.get(run).get(lens).has(`${block},${step}`);
}

/** The blocks whose pictures make up a shot: one, or two to subtract; none where there is no such picture. */
function layersOf({ run, lens, mode, block, step }) {
  const blocks = mode === "difference" ? [block, block - 1] : [block];
  return blocks.every((index) => index >= 0 && !isMissing(run, lens, index, step)) ? blocks : [];
}

function bandOf(run, lens, block) {
  const { rows_per_band: most } = run.tiles;
  const index = Math.floor(block / most);
  const rows = Math.min(most, run.blocks.length - index * most);
  return { image: `url("${urlOf(run.lenses[lens].bands[index])}")`, row: block - index * most, rows };
}

/** Fill an element with one thumbnail, or with the difference of two. */
function paintCrop(crop, shot, layers) {
  const columns = shot.run.steps.length;
  const bands = layers.map((block) => bandOf(shot.run, shot.lens, block));
  const across = columns > 1 ? (100 * shot.step) / (columns - 1) : 0;
  crop.classList.toggle("difference", shot.mode === "difference");
  crop.style.backgroundImage = bands.map((band) => band.image).join(", ") || "none";
  crop.style.backgroundSize = bands.map((band) => `${100 * columns}% ${100 * band.rows}%`).join(", ");
  crop.style.backgroundPosition = bands
    .map((band) => `${across}% ${band.rows > 1 ? (100 * band.row) / (band.rows - 1) : 0}%`)
    .join(", ");
}

/** Show a shot in a frame: its thumbnail at once, then the large picture if it is wanted and still the one to show. */
function showShot(frame, shot, { large }) {
  const key = `${nameOf(shot)} ${large}`;
  if (frame.dataset.shot === key) return;
  frame.dataset.shot = key;
  const layers = layersOf(shot);
  const crop = frame.querySelector(".crop") ?? make("span", { className: "crop" });
  frame.replaceChildren(crop);
  frame.classList.toggle("difference", shot.mode === "difference");
  frame.setAttribute("role", "img");
  frame.setAttribute("aria-label", describe(shot, layers));
  paintCrop(crop, shot, layers);
  if (large && layers.length) setTimeout(() => showLarge(frame, key, shot, layers), REST_MS);
}

async function showLarge(frame, key, shot, layers) {
  if (frame.dataset.shot !== key) return;
  const urls = layers.map((block) => pictureUrl(shot.run, shot.lens, block, shot.step));
  if (urls.includes(null)) return; // inside the page, and not yet read
  const images = urls.map((url, index) => make("img", { src: url, alt: index ? "" : describe(shot, layers) }));
  try {
    // Decoded before they are put in: the thumbnail stays until then, and of a difference both parts come at once.
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    if (frame.dataset.shot === key) say(`The picture of ${placeOf(shot)} could not be loaded`);
    return;
  }
  // While the page loads a shot may be asked for twice (`showAgain`): a second pair would be subtracted once more.
  if (frame.dataset.shot === key && !frame.querySelector("img")) frame.append(...images);
}

function describe(shot, layers) {
  if (!layers.length) return `${placeOf(shot)}: no picture`;
  const what = {
    euler: "the state the sampler would go to",
    x0: "the clean image it believes in",
    tuned: "the clean image it believes in, through a tuned lens",
    jacobian: "the clean image it points at, by the mean Jacobian of each patch’s own token",
    jacobian_summed: "the clean image it points at, by the mean Jacobian summed over patches",
  }[shot.mode];
  return `${placeOf(shot)}: ${what ?? `what it changed (${modeOf(shot)})`}`;
}
