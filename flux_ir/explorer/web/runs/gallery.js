/* Generations: prompt, model, seed, the finished picture, and the same block of each. */
"use strict";

const cards = new Map(); // run -> its parts

function buildGallery() {
  element("gallery").hidden = runs.length < 2;
  element("room").classList.toggle("many", runs.length > 1);
  if (runs.length > 1) element("gallery").replaceChildren(...runs.map(buildCard));
}

function buildCard(run) {
  const finished = make("span", { className: "frame" });
  if (run.picture) finished.append(make("img", { src: urlOf(run.picture), alt: "", loading: "lazy" }));
  const frame = make("span", { className: "frame shot" });
  frame.style.position = "relative";
  const caption = make("span");
  const button = make(
    "button",
    { type: "button" },
    finished,
    frame,
    make("span", { textContent: "finished" }),
    caption,
  );
  button.style.setProperty("--aspect", run.tiles.tile_width_px / run.tiles.tile_height_px);
  button.setAttribute("aria-label", `Show generation ${run.id}`);
  button.addEventListener("click", () => act(() => openRun(run)));
  const facts = make("p", { className: "facts" }, ...factList([run.model, `seed ${run.seed}`, run.id]));
  const chosen = make("p", { className: "facts chosen", textContent: "shown in the grid" });
  const text = make("p", { className: "text", dir: "auto", textContent: run.prompt || "(no prompt)" });
  const card = make("article", { className: "card" }, button, text, facts, chosen);
  cards.set(run, { card, button, frame, caption, chosen });
  return card;
}

function showGallery() {
  if (runs.length < 2) return;
  const here = looked();
  for (const [run, { card, button, frame, caption, chosen }] of cards) {
    const shot = sameCell(run, here);
    card.classList.toggle("on", run === state.run);
    chosen.hidden = run !== state.run;
    button.setAttribute("aria-current", run === state.run);
    caption.textContent = shot ? `${placeOf(shot)}, ${modeOf(shot)}` : "no such block or step";
    if (shot) showShot(frame, shot, { large: state.wall });
    else clearFrame(frame);
  }
}

function clearFrame(frame) {
  frame.replaceChildren();
  delete frame.dataset.shot;
}

function openRun(run) {
  const same = sameCell(run, shotAt(state));
  state.run = run;
  if (!modesOf(run).includes(state.mode)) defaultMode();
  select(same?.block ?? state.block, same?.step ?? state.step);
  showRun();
}
