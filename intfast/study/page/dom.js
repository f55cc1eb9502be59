"use strict";
// Text of a model reaches the page through text nodes only: nothing here parses HTML.

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const s = (tag, props, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

const readData = (id) => JSON.parse(document.getElementById(id).textContent);
async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
const whole = (n) => Math.round(n).toLocaleString("en-US");
const percent = (x, digits = 1) => (100 * x).toFixed(digits);
const color = (i) => `var(--c${i % 8})`;

function short(x) {
  if (x === null || x === undefined) return "";
  const size = Math.abs(x);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return x.toExponential(1);
  return String(Number(x.toPrecision(3)));
}

// [value, low, high, n] in percent with its interval.
const estimate = (e, digits = 1) => e
  ? [percent(e[0], digits), " ", h("span", { class: "ci" }, `[${percent(e[1], digits)}, ${percent(e[2], digits)}]`)]
  : "";

function table(heads, rows, cls) {
  const head = heads.map((t) => typeof t === "string" && t.startsWith(">")
    ? h("th", { class: "num", scope: "col" }, t.slice(1)) : h("th", { scope: "col" }, t));
  const body = rows.map((row) => h("tr", null, row.map((cell, i) =>
    cell instanceof HTMLTableCellElement ? cell
      : h("td", { class: String(heads[i]).startsWith(">") ? "num" : null }, cell))));
  return h("div", { class: "wide", tabindex: 0 },
    h("table", { class: cls }, h("thead", null, h("tr", null, head)), h("tbody", null, body)));
}

const section = (id, title, ...children) =>
  h("section", { id, "aria-label": title }, h("h2", null, title), children);
const note = (...children) => h("p", { class: "note" }, children);

// Score interval of a share, as evaluate.wilson.
function wilson(right, n) {
  const z = 1.959964, p = right / n, d = z * z / n;
  const centre = p + d / 2, half = z * Math.sqrt(p * (1 - p) / n + d / (4 * n));
  return [Math.max(0, (centre - half) / (1 + d)), Math.min(1, (centre + half) / (1 + d))];
}
