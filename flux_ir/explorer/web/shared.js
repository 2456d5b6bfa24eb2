/* What the scripts of all pages share. Texts from runs reach a page as textContent alone. */
"use strict";

const element = (id) => document.getElementById(id);
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(tag, attributes, text = "") {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) drawn.setAttribute(name, value);
  drawn.textContent = text;
  return drawn;
}

/** Tell a screen reader. */
function say(text) {
  element("status").textContent = text;
}
