/* The head. */
"use strict";

function factsOf(run) {
  const day = /^(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)/.exec(run.timestamp ?? "");
  return [
    run.model,
    run.weights,
    run.seed === null ? null : `seed ${run.seed}`,
    run.num_steps === null ? null : `${run.num_steps} steps`,
    run.guidance === null ? null : `guidance ${run.guidance}`,
    run.width && run.height ? `${run.width} × ${run.height} px` : null,
    day && `${day[1]}-${day[2]}-${day[3]} ${day[4]}:${day[5]}`,
    run.id,
  ].filter(Boolean);
}

const factList = (facts) => facts.map((fact) => make("span", { textContent: fact }));

function showHead() {
  const { run } = state;
  const finished = element("finished");
  finished.hidden = run.picture === null;
  if (run.picture !== null) finished.src = urlOf(run.picture);
  finished.alt = `The finished picture of generation ${run.id}`;
  element("prompt").textContent = run.prompt || "(no prompt)";
  element("facts").replaceChildren(...factList(factsOf(run)));
  unfoldPrompt(false);
}

function unfoldPrompt(whole) {
  const prompt = element("prompt");
  prompt.classList.toggle("whole", whole);
  element("more").setAttribute("aria-expanded", whole);
  element("more").textContent = whole ? "Show less" : "Show all";
  element("more").hidden = !whole && prompt.scrollHeight <= prompt.clientHeight + 2;
}

function showTools() {
  for (const button of element("modes").children) {
    const there = modesOf(state.run).includes(button.dataset.mode);
    button.disabled = !there;
    button.hidden = "fitted" in button.dataset && !there; // it takes a lens that few runs have
    button.title = there
      ? ""
      : `not decoded: flux-ir lens --generation_id ${state.run.id} --lens ${button.dataset.mode}`;
    button.setAttribute("aria-pressed", button.dataset.mode === state.mode);
  }
  element("mode-note").textContent = NOTES[state.mode] + (state.mode === "difference" ? ` (${state.lens}).` : "");
  element("wall").hidden = runs.length < 2;
  element("wall").setAttribute("aria-pressed", state.wall);
  element("play").setAttribute("aria-pressed", playing !== null);
  element("play").textContent = playing === null ? "Play" : "Stop";
  element("room").classList.toggle("wall", state.wall);
}
