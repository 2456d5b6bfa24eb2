/* One patch of one picture: the features that make it, strongest first, and what they leave unexplained. */
"use strict";

let patchKey = null; // what the panel shows

/** Look at a place on a picture. */
function inspect(image, token, step) {
  act(() => Object.assign(state, { picture: image, token, step }));
}

function closePatch() {
  act(() => Object.assign(state, { picture: null, token: null, step: null }));
}

async function showPatch() {
  const panel = element("patch");
  const open = state.picture !== null;
  panel.hidden = !open;
  element("featured").classList.toggle("inspected", open);
  for (const parts of shots) parts.shot?.classList.toggle("on", parts.example.image === state.picture);
  const key = JSON.stringify([current.key, state.picture, state.token, state.step, state.stream]);
  if (!open || key === patchKey) {
    if (!open) patchKey = null;
    return;
  }
  patchKey = key;
  try {
    const [patches, known] = await Promise.all([patchesOf(state.picture), loadImages([state.picture])]);
    const facts = known.get(state.picture);
    if (patchKey === key && facts) fillPatch(patches, facts);
    else if (patchKey === key) closePatch(); // an address of a picture that no feature shows
  } catch (error) {
    if (patchKey === key)
      panel.replaceChildren(patchHead(), make("p", { className: "note", textContent: error.message }));
  }
}

const patchesOf = (image) => (pages.patch_features ? loadPatches(state.stream, image) : Promise.resolve(null));

function fillPatch(patches, facts) {
  const stepIndex = Math.max(0, pages.steps.indexOf(state.step));
  const found = patches ? tokenFeatures(patches, stepIndex, state.token) : null;
  element("patch").replaceChildren(
    ...[
      patchHead(),
      largePicture(facts),
      stepChoice(),
      make("p", { className: "small", textContent: placeText(facts) }),
      found
        ? patchFeatures(found)
        : make("p", { className: "note", textContent: "These pages were written without the features of patches." }),
      make("p", { className: "prompt", dir: "auto", textContent: facts.prompt || "(no prompt)" }),
      make("p", { className: "facts" }, ...pictureFacts(facts).map((fact) => make("span", { textContent: fact }))),
    ].filter(Boolean),
  );
}

function patchHead() {
  const close = make("button", { type: "button", textContent: "Close" });
  close.append(" ", make("kbd", { textContent: "Esc" }));
  close.addEventListener("click", closePatch);
  const title = state.stream === "txt" ? "One token" : "One patch";
  return make("div", { className: "patch-head" }, make("h2", { textContent: title }), close);
}

function pictureFacts(facts) {
  const size = facts.width && facts.height ? `${facts.width} × ${facts.height} px` : null;
  return [facts.id, facts.seed === null ? null : `seed ${facts.seed}`, size].filter(Boolean);
}

function placeText(facts) {
  const step = pages.steps.length > 1 ? ` at step ${state.step}` : "";
  if (state.stream === "txt")
    return `token ${state.token}${facts.tokens?.[state.token] ? ` “${facts.tokens[state.token]}”` : ""}${step}`;
  if (!facts.rows) return `the whole picture${step}`;
  return `row ${Math.floor(state.token / facts.columns)}, column ${state.token % facts.columns}${step}`;
}

/** The picture in full size if it can still be found, the small one until then. */
function largePicture(facts) {
  const { shot, layer, canvas, peak } = makeShot(state.picture, facts);
  const example = shots.find((parts) => parts.example.image === state.picture)?.example;
  const map = example && current.record ? mapAt(current.record, example, facts) : null;
  if (state.stream === "img") paintMap(canvas, map);
  else canvas.hidden = true;
  if (facts.rows && state.stream === "img") placePeak({ peak, layer }, state.token, facts);
  peak.hidden = !facts.rows || state.stream === "txt";
  peak.classList.add("chosen");
  shot.classList.add("large");
  shot.setAttribute("aria-label", "Choose another patch");
  shot.addEventListener("click", (event) => act(() => (state.token = tokenAt(event, layer, facts, state.token))));
  if (pages.pictures && pages.originals && facts.picture) replaceWhenLoaded(layer, pages.originals + facts.picture);
  return shot;
}

function replaceWhenLoaded(layer, address) {
  const image = make("img", { src: address, alt: "", draggable: false });
  image.decode().then(
    () => layer.querySelector("img")?.replaceWith(image),
    () => {}, // moved or deleted: the small one stays
  );
}

function stepChoice() {
  if (pages.steps.length < 2) return null;
  const buttons = pages.steps.map((step) => {
    const button = make("button", { type: "button", textContent: `step ${step}` });
    button.setAttribute("aria-pressed", step === state.step);
    button.addEventListener("click", () => act(() => (state.step = step)));
    return button;
  });
  return make("div", { className: "choice steps" }, ...buttons);
}

function patchFeatures({ features, unexplained }) {
  if (!Number.isFinite(unexplained)) return make("p", { className: "note", textContent: "This token was not kept." });
  const strongest = Math.max(...features.map(({ value }) => value), 1e-9);
  const rows = features.map(({ feature, value }) => {
    const item = make(
      "li",
      {},
      featureLink(feature),
      valueBar(value, strongest),
      make("b", { className: "small", textContent: shortNumber(value) }),
    );
    item.classList.toggle("here", feature === state.feature);
    return item;
  });
  if (!rows.length) rows.push(make("li", { className: "note", textContent: "No feature fires here." }));
  return make("div", {}, make("ol", { className: "ranked near" }, ...rows), residualBar(unexplained));
}

/** Of the token's distance from the mean, the share that the autoencoder gives back, and the share it does not. */
function residualBar(unexplained) {
  const bar = make("div", { className: "residual" }, make("i"));
  bar.style.setProperty("--share", clamp(unexplained, 0, 1));
  const text = `${shortPercent(100 * unexplained)} % of this ${state.stream === "txt" ? "token" : "patch"} is left unexplained`;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", text);
  return make("div", {}, bar, make("p", { className: "small", textContent: text }));
}

/** The patch beside, within the picture. */
function movePatch(down, across) {
  const facts = imageFacts(state.picture);
  if (state.picture === null || !facts) return;
  const [rows, columns] = state.stream === "txt" ? [1, pages.of.txt.tokens] : [facts.rows ?? 1, facts.columns ?? 1];
  const row = clamp(Math.floor(state.token / columns) + down, 0, rows - 1);
  const column = clamp((state.token % columns) + across, 0, columns - 1);
  act(() => (state.token = row * columns + column));
}
