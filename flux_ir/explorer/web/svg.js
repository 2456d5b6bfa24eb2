/* Elements of a drawing, for the pages that have charts. */
"use strict";

function draw(tag, attributes, text = "") {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) drawn.setAttribute(name, value);
  drawn.textContent = text;
  return drawn;
}
