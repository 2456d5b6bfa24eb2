/* Data: scripts beside the page, loaded when they are needed and forgotten when they were not for long.

   From file:// neither modules nor fetch load anything, classic scripts do: each calls `received(name, value)` once. */
"use strict";

const pages = JSON.parse(element("pages-data").textContent);
const KEPT = { records: 24, patches: 12 }; // shards of records, pictures of patches; everything else is kept

const loads = new Map(); // name -> {promise, settle}, least recently used first

/** What a script beside the page calls: the value of that name is there. On window, where other scripts find it. */
window.received = (name, value) => loads.get(name)?.settle(value);

/** The value that the script `name`.js holds: a promise, which fails where there is no such file. */
function load(name) {
  const known = loads.get(name);
  if (known) {
    loads.delete(name); // a Map keeps the order of insertion: put in again, it is the one last used
    loads.set(name, known);
    return known.promise;
  }
  const entry = {};
  entry.promise = new Promise((resolve, reject) => {
    const script = make("script", { src: `${name}.js` });
    entry.settle = (value) => {
      script.remove(); // its text is as large as the value, and would stay with the page
      entry.value = value;
      resolve(value);
    };
    script.onerror = () => {
      script.remove();
      loads.delete(name);
      reject(new Error(`${name}.js could not be loaded`));
    };
    document.head.append(script);
  });
  loads.set(name, entry);
  forgetOldest(name.split("/")[0]);
  return entry.promise;
}

function forgetOldest(kind) {
  if (!KEPT[kind]) return;
  const names = [...loads.keys()].filter((name) => name.startsWith(`${kind}/`));
  for (const name of names.slice(0, -KEPT[kind])) loads.delete(name);
}

/** The value, if it is there already. */
const loaded = (name) => loads.get(name)?.value;

const numbered = (number, digits) => String(number).padStart(digits, "0");

// ---- Numbers in base64 --------------------------------------------------------------------------------------------------

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let index = 0; index < letters.length; index += 1) bytes[index] = letters.charCodeAt(index);
  return bytes;
}

const arrayOf = (Kind, text) => new Kind(bytesOf(text).buffer);

// ---- The list: a column per number, an entry per feature ---------------------------------------------------------------

/** Of one stream: columns by name, the pictures of each feature's largest values, and where on them these lie. */
async function loadList(stream) {
  const found = await load(`list-${stream}`);
  const values = arrayOf(Float32Array, found.columns);
  const columns = new Map();
  pages.of[stream].columns.forEach(({ name }, index) =>
    columns.set(name, values.subarray(index * pages.d_sae, (index + 1) * pages.d_sae)),
  );
  found.columns = null; // the text is not needed any more
  return { columns, top: arrayOf(Int32Array, found.top), peaks: bytesOf(found.peaks) };
}

/** Labels and words of all features, which the list shows and the search reads. */
async function loadTexts(stream) {
  const { labels, words } = await load(`texts-${stream}`);
  const plain = (text) => ` ${text.toLowerCase().replace(/[^\p{L}\d]+/gu, " ")}`; // so that " red" is not in "coloured"
  const searched = labels.map((label, feature) => plain(`${label} ${words[feature]}`));
  return { labels, words, searched };
}

/** Which features' largest pictures have a word in their prompts: `features[ptr[w]..ptr[w + 1]]` of word w. */
async function loadWords(stream) {
  const { words, ptr, features, counts } = await load(`words-${stream}`);
  return {
    words,
    ptr: arrayOf(Uint32Array, ptr),
    features: arrayOf(Uint32Array, features),
    counts: bytesOf(counts),
  };
}

// ---- One feature, one picture ------------------------------------------------------------------------------------------

const recordShard = (stream, feature) => `records/${stream}/${numbered(Math.floor(feature / pages.shards.records), 4)}`;

const EXAMPLE_FIELDS = ["image", "value", "token", "step", "maps"];

/** All that the page of a feature shows besides the numbers of the list. */
async function loadRecord(stream, feature) {
  const records = await load(recordShard(stream, feature));
  const record = JSON.parse(records[feature % pages.shards.records]);
  for (const group of record.groups) group.examples = group.examples.map((values) => named(EXAMPLE_FIELDS, values));
  return record;
}

const named = (names, values) => Object.fromEntries(names.map((name, index) => [name, values[index] ?? null]));

const IMAGE_FIELDS = ["id", "prompt", "seed", "width", "height", "rows", "columns", "picture", "tokens"];
const imageShard = (image) => `images/${numbered(Math.floor(image / pages.shards.images), 4)}`;

/** What is known of some pictures, by their numbers. */
async function loadImages(images) {
  await Promise.all([...new Set(images.map(imageShard))].map(load));
  return new Map(images.map((image) => [image, imageFacts(image)]));
}

/** The same of one, null where its shard has not been loaded. */
function imageFacts(image) {
  const values = loaded(imageShard(image))?.[image % pages.shards.images];
  return values ? named(IMAGE_FIELDS, values) : null;
}

/** Address of the small picture that all features share. */
function thumbnailUrl(image) {
  return `../thumbnails/${numbered(Math.floor(image / 1000), 3)}/${numbered(image, 6)}.webp`;
}

/** The strongest features of every token of a picture, at every step, and what they leave unexplained. */
async function loadPatches(stream, image) {
  const all = await load(`patches/${numbered(Math.floor(image / 1000), 3)}/${numbered(image, 6)}`);
  const found = all[stream];
  if (!found) return null;
  if (!found.feature.length || typeof found.feature !== "string") return found;
  const Kind = pages.d_sae > 65536 ? Uint32Array : Uint16Array;
  return Object.assign(found, {
    feature: arrayOf(Kind, found.feature),
    value: arrayOf(Uint16Array, found.value),
    unexplained: arrayOf(Float32Array, found.unexplained),
  });
}

/** The strongest features of one token, [{feature, value}], and the share of it that the autoencoder leaves out. */
function tokenFeatures(patches, stepIndex, token) {
  const at = stepIndex * patches.tokens + token;
  const features = [];
  for (let index = at * patches.top; index < (at + 1) * patches.top; index += 1) {
    const value = (patches.value[index] / 65535) * patches.scale;
    if (patches.value[index]) features.push({ feature: patches.feature[index], value });
  }
  return { features, unexplained: patches.unexplained[at] };
}
