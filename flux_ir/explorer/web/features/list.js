/* The list: a head that sorts, and rows of which only those in view exist. */
"use strict";

const ROW_PX = 60;
const REST_MS = 60; // rows that fly by load no pictures
const STRIP = 4; // pictures of a row

let cursor = 0; // place in the order of the row that the keyboard is at
let pool = []; // rows that exist; the row of place p is pool[p % pool.length]
let stripTimer = null;

function buildListHead() {
  element("list-name").textContent = pages.site ? `Features of ${pages.site}` : `Features of ${pages.name}`;
  element("list-facts").replaceChildren(...pages.facts.map((fact) => make("span", { textContent: fact })));
  for (const id of ["list-streams", "feature-streams"]) buildStreams(element(id));
}

function buildStreams(group) {
  group.hidden = pages.streams.length < 2;
  const names = { img: "image tokens", txt: "text tokens" };
  group.replaceChildren(
    ...pages.streams.map((stream) => {
      const button = make("button", { type: "button", textContent: names[stream] });
      button.dataset.stream = stream;
      button.addEventListener("click", () => openStream(stream));
      return button;
    }),
  );
}

/** The head of the table; a click sorts by a column, largest first, a second the other way round. */
function showColumns() {
  const columns = shownColumns();
  const { name, down } = sorting();
  element("columns").replaceChildren(
    headCell(FEATURE, name, down),
    make("span", { className: "head-text", textContent: "what it fires on" }),
    ...columns.map((column) => headCell(column, name, down)),
  );
  element("list-view").style.setProperty("--numbers", columns.length);
}

function headCell(column, sortedName, down) {
  const here = column.name === sortedName;
  const button = make("button", { type: "button", className: "sorter", title: column.about });
  button.append(
    make("span", { textContent: column.title }),
    make("i", { textContent: here ? (down ? "↓" : "↑") : "" }),
  );
  button.dataset.column = column.name;
  button.setAttribute("aria-pressed", here);
  button.addEventListener("click", () => sortBy(column.name));
  return button;
}

function sortBy(name) {
  const { name: now, down } = sorting();
  const first = name === "feature" ? name : `-${name}`;
  const other = name === "feature" ? `-${name}` : name;
  act(() => (state.sort = now === name && down === first.startsWith("-") ? other : first));
  cursor = 0;
  element("rows").scrollTop = 0;
}

function showChips() {
  const find = parseFind(state.find);
  const chips = [["", "all", pages.d_sae], ...Object.entries(flagCounts()).map(([flag, count]) => [flag, flag, count])];
  element("chips").replaceChildren(
    ...chips.map(([flag, word, count]) => {
      const chip = make("button", { type: "button", className: "chip" }, make("span", { textContent: word }));
      chip.append(make("small", { textContent: grouped(count) }));
      chip.dataset.flag = flag;
      chip.setAttribute("aria-pressed", flag ? find.flags.includes(flag) : !find.flags.length);
      chip.addEventListener("click", () => chooseFlag(flag));
      return chip;
    }),
  );
  const listed = `${grouped(order.length)} of ${grouped(pages.d_sae)} features`;
  const note = find.problems.length ? find.problems.join("; ") : state.find || state.box ? listed : "";
  element("find-note").textContent = note;
  element("find-note").classList.toggle("problem", find.problems.length > 0);
  if (state.box) element("find-note").append(boxChip());
  if (element("find").value.trim() !== state.find) element("find").value = state.find;
}

function boxChip() {
  const chip = make("button", { type: "button", className: "chip", textContent: "inside the box  ×", id: "box-chip" });
  chip.setAttribute("aria-label", "List those outside the box too");
  chip.addEventListener("click", () => act(() => (state.box = "")));
  return chip;
}

const counted = new Map(); // stream -> {flag: count}, and again once labels are known

function flagCounts() {
  const key = `${state.stream} ${Boolean(texts)}`;
  if (!counted.has(key)) {
    const counts = Object.fromEntries(Object.keys(FLAGS).map((flag) => [flag, 0]));
    for (let feature = 0; feature < pages.d_sae; feature += 1)
      for (const flag in counts) if (FLAGS[flag](feature)) counts[flag] += 1;
    counted.set(key, Object.fromEntries(Object.entries(counts).filter(([, count]) => count > 0)));
  }
  return counted.get(key);
}

/** A chip stands for `is:flag` in the search; only one of them holds at a time. */
function chooseFlag(flag) {
  const others = state.find.replace(/(^|\s)is:\S+/g, "").trim();
  act(() => (state.find = [others, flag && `is:${flag}`].filter(Boolean).join(" ")));
}

// ---- Rows ---------------------------------------------------------------------------------------------------------------

function sizeRows() {
  const scrollbar = element("rows").offsetWidth - element("rows").clientWidth;
  element("columns").style.setProperty("--scrollbar", `${scrollbar}px`);
  const needed = Math.ceil(element("rows").clientHeight / ROW_PX) + 3;
  if (pool.length === needed) return;
  pool = Array.from({ length: needed }, makeRow);
  element("rows-inside").replaceChildren(...pool.map((row) => row.link));
}

function makeRow() {
  const thumbs = Array.from({ length: STRIP }, () => makeThumb());
  const [number, name, words] = ["number", "label", "words"].map((className) => make("span", { className }));
  const strip = make("span", { className: "strip" }, ...thumbs.map((thumb) => thumb.frame));
  const numbers = make("span", { className: "numbers" });
  const link = make(
    "a",
    { className: "row" },
    number,
    strip,
    make("span", { className: "text" }, name, words),
    numbers,
  );
  link.setAttribute("role", "listitem");
  link.tabIndex = -1;
  return { link, number, name, words, numbers, thumbs, feature: null, key: "", painted: null };
}

/** A small picture with a mark where its largest value is. */
function makeThumb() {
  const image = make("img", { alt: "", decoding: "async" });
  const peak = make("i", { className: "peak" });
  return { frame: make("span", { className: "thumb" }, image, peak), image, peak };
}

function paintThumb({ frame, image, peak }, feature, place) {
  const at = feature * pages.top_thumbnails + place;
  const picture = list.top[at];
  frame.hidden = picture < 0 || !pages.pictures;
  if (frame.hidden) return;
  image.src = thumbnailUrl(picture);
  peak.hidden = !pages.of[state.stream].maps;
  peak.style.left = `${list.peaks[2 * at] / 2.55}%`;
  peak.style.top = `${list.peaks[2 * at + 1] / 2.55}%`;
}

function showRows() {
  const scroller = element("rows");
  sizeRows();
  element("rows-inside").style.height = `${order.length * ROW_PX}px`;
  element("no-rows").hidden = order.length > 0;
  const first = clamp(Math.floor(scroller.scrollTop / ROW_PX) - 1, 0, Math.max(0, order.length - pool.length));
  const columns = shownColumns();
  const key = columns.map((column) => column.name).join();
  pool.forEach((row) => (row.place = null));
  for (let place = first; place < Math.min(first + pool.length, order.length); place += 1)
    showRow(pool[place % pool.length], place, columns, key);
  for (const row of pool) row.link.hidden = row.place === null;
  clearTimeout(stripTimer);
  stripTimer = setTimeout(paintStrips, REST_MS);
}

function showRow(row, place, columns, key) {
  const feature = order[place];
  row.place = place;
  row.link.style.transform = `translateY(${place * ROW_PX}px)`;
  row.link.classList.toggle("on", place === cursor);
  row.link.setAttribute("aria-setsize", order.length);
  row.link.setAttribute("aria-posinset", place + 1);
  const wanted = `${feature} ${key} ${Boolean(texts)} ${state.find} ${state.stream}`;
  if (row.key === wanted) return;
  row.key = wanted;
  row.feature = feature;
  row.painted = null;
  row.link.href = addressOf({ feature });
  row.number.textContent = feature;
  row.name.textContent = texts?.labels[feature] || "";
  row.words.textContent = texts?.words[feature] || "";
  row.link.classList.toggle("dead", !(numberOf("frequency", feature) > 0));
  row.numbers.replaceChildren(...columns.map((column) => make("span", { textContent: listedNumber(column, feature) })));
  for (const thumb of row.thumbs) thumb.frame.hidden = true;
}

function listedNumber(column, feature) {
  if (column === MATCH) return matches ? `${Math.max(0, matches[feature])}` : "";
  return formatted(numberOf(column.name, feature), column.unit);
}

function paintStrips() {
  for (const row of pool) {
    if (row.place === null || row.painted === row.key) continue;
    row.painted = row.key;
    row.thumbs.forEach((thumb, place) => paintThumb(thumb, row.feature, place));
  }
}

function moveCursor(by) {
  cursor = clamp(cursor + by, 0, Math.max(0, order.length - 1));
  const scroller = element("rows");
  const top = cursor * ROW_PX;
  if (top < scroller.scrollTop) scroller.scrollTop = top;
  else if (top + ROW_PX > scroller.scrollTop + scroller.clientHeight)
    scroller.scrollTop = top + ROW_PX - scroller.clientHeight;
  showRows();
  showPeek(order[cursor]);
}

// ---- Which numbers the list shows ---------------------------------------------------------------------------------------

function buildGlossary() {
  const shown = new Set(shownColumns().map((column) => column.name));
  element("glossary").replaceChildren(
    ...columnsOf().map((column) => {
      const box = make("input", { type: "checkbox", checked: shown.has(column.name), value: column.name });
      const name = make("b", { textContent: titled(column) });
      return make("label", {}, box, make("span", {}, name, make("small", { textContent: column.about })));
    }),
  );
}

function chooseColumns() {
  const boxes = [...element("glossary").querySelectorAll("input:checked")];
  const names = boxes.map((box) => box.value).join(",");
  act(() => (state.columns = names === pages.of[state.stream].shown.join(",") ? "" : names));
}
