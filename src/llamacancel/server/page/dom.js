// Elements and words. Whatever comes from a request is set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, attributes, children);
}

/** The same for SVG. */
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The element with an id. */
export const at = (id) => document.getElementById(id);

/** Set an element's text if it is another one, so that nothing is announced or drawn twice. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Seconds in words that keep their width: "40 µs", "3.2 ms", "48 ms", "1.25 s", "12.5 s", "3 min 05 s". */
export function seconds(value) {
  if (value < 0.00095) return `${Math.round(value * 1e6)} µs`;
  if (value < 0.00995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1e3)} ms`;
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

/** A count with its thousands set apart. */
export const count = (value) => value.toLocaleString("en-US");

/** "1 token", "2 tokens". */
export const some = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
