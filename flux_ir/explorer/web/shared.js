/* What the scripts of all pages share. Texts from runs reach a page as textContent alone. */
"use strict";

const element = (id) => document.getElementById(id);
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Tell a screen reader. */
function say(text) {
  element("status").textContent = text;
}

/** A function that draws at the next frame, once, however often it is called until then. */
function oncePerFrame(drawAll) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawAll();
    });
  };
}

const ADDRESS_MS = 200; // browsers refuse more than about 200 changes of the address in 30 s
let addressTimer = null;

/** Put what `addressNow` gives into the address bar once nothing has called this for a moment. */
function replaceAddressSoon(addressNow) {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => history.replaceState(null, "", addressNow()), ADDRESS_MS);
}

/** Give `onKey` every key that no dialog and no shortcut of the browser takes; buttons with data-key press theirs. */
function listenToKeys(onKey, keys) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    onKey(event);
  });
  for (const button of document.querySelectorAll("button[data-key]"))
    button.addEventListener("click", () => keys[button.dataset.key]());
}
