// The strongest features of a patch. `props.rows` comes from Python; a click puts what is wished into `props.value`.

const list = element.querySelector(".features");
const said = element.querySelector(".said");

function wish(action, row) {
  props.value = { action, dictionary: row.dictionary, feature: row.feature, at: Date.now() };
  trigger("input");
}

function button(text, label, action, row, pressed) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", `${label} ${row.feature}`);
  if (pressed !== undefined) made.setAttribute("aria-pressed", String(pressed));
  made.addEventListener("click", () => wish(action, row));
  return made;
}

function part(name, content) {
  const made = document.createElement("span");
  made.className = name;
  made.append(...[content].flat());
  return made;
}

function line(row) {
  const made = document.createElement("li");
  made.dataset.feature = row.feature;
  const bar = part("bar", part("fill", ""));
  bar.firstChild.style.width = `${100 * Math.min(row.share ?? row.length, 1)}%`;
  const pictures = row.examples.map((source) => {
    const picture = document.createElement("img");
    picture.src = source;
    picture.alt = "";
    return picture;
  });
  made.append(
    part("number", String(row.feature)),
    part("what", [part("label", row.label ?? "no label"), bar]),
    part("value", row.said),
    part("examples", pictures),
    part("actions", [
      button("where", "show where it is active: feature", "where", row, row.shown),
      button(row.turned ? "turned" : "turn", "turn feature", "turn", row, row.turned),
    ]),
  );
  if (!row.label) made.classList.add("unlabelled");
  return made;
}

function show() {
  said.textContent = props.rows.said;
  const lines = [];
  let group = null;
  for (const row of props.rows.rows) {
    if (props.rows.several && row.site !== group) {
      group = row.site;
      const head = document.createElement("li");
      head.className = "site";
      head.textContent = group;
      lines.push(head);
    }
    lines.push(line(row));
  }
  list.replaceChildren(...lines);
}

watch("rows", show);
show();
