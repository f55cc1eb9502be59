"use strict";
// The browser of interventions: list, search, filters, keys, links. All else is drawn already.
// Text of a model reaches the page through text nodes only: nothing here parses HTML.

function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name !== "style") node.setAttribute(name, value === true ? "" : value);
    else for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
  }
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
  return node;
}
const note = (...children) => h("p", { class: "note" }, children);
const whole = (n) => Math.round(n).toLocaleString("en-US");
const byId = (id) => document.getElementById(id);

const { runs, gates, starts } = JSON.parse(byId("runs").textContent);
const ROW = 56;
const loaded = new Map(), ui = {};
const state = { run: 0, data: null, shown: [], at: -1, gate: "", query: "", order: "file",
  paint: "difference", open: new Set() };

// --- the texts of a run ------------------------------------------------------------------------

async function unpack(id) {
  const packed = atob(byId(id).textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function load(run) {
  if (!loaded.has(run)) {
    loaded.set(run, unpack(`items-${run}`).then((data) => {
      for (const item of data.items) prepare(data, item);
      return data;
    }));
  }
  return loaded.get(run);
}

function prepare(data, item) {
  const [question, answer, reference] = data.problems[item.problem] || ["", "", ""];
  const [steps, attemptReason] = data.attempts[`${item.problem}/${item.attempt}`] || [[], ""];
  Object.assign(item, { question, answer, reference, steps, attemptReason });
  item.share = (start) => {
    const marks = item.chips[start] ? item.chips[start][0].replaceAll("u", "") : "";
    return marks.length ? [marks.replaceAll("w", "").length, marks.length] : null;
  };
  item.hay = () => (item.lower ??= [item.id, question, answer, reference, steps.join(""),
    item.content, item.reply, item.guided, item.reason].join("\n").toLowerCase());
}

const ratio = (pair) => (pair ? pair[0] / pair[1] : -1);
const gain = (item) => (item.share("error")
  ? ratio(item.share("intervention")) - ratio(item.share("error")) : -2);
const ORDERS = {
  file: ["in the order of the file", null],
  right: ["most right continuations first", (item) => -ratio(item.share("intervention"))],
  gain: ["largest gain over the wrong step first", (item) => -gain(item)],
  early: ["earliest error first", (item) => item.location / item.steps.length || 2],
};

// --- the list ----------------------------------------------------------------------------------

function filterItems(keep = state.shown[state.at]) {
  const words = state.query.toLowerCase().trim();
  const fits = (item) => (!state.gate || item.gate === state.gate)
    && (!words || item.hay().includes(words));
  state.shown = state.data.items.filter(fits);
  const key = ORDERS[state.order][1];
  if (key) state.shown.sort((a, b) => key(a) - key(b));
  const num = state.shown.length, place = state.shown.indexOf(keep);
  ui.count.textContent = `${whole(num)} of ${whole(state.data.items.length)}`;
  for (const button of ui.gates.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.gate === state.gate));
  }
  ui.inner.style.height = `${num * ROW}px`;
  select(num ? Math.max(0, place) : -1, false);
}

// Only the rows in sight are drawn.
function drawRows() {
  const from = Math.max(0, Math.floor(ui.list.scrollTop / ROW) - 6);
  const to = Math.min(state.shown.length, from + Math.ceil(ui.list.clientHeight / ROW) + 12);
  ui.inner.replaceChildren(...state.shown.slice(from, to).map((item, i) => row(item, from + i)));
}

function row(item, place) {
  const [ours, theirs] = ["intervention", "error"].map(item.share);
  const where = item.location ? `step ${item.location} of ${item.steps.length}` : "no step located";
  const right = [ours ? `\u2713 ${ours.join("/")}` : "", theirs ? ` vs ${theirs.join("/")}` : ""];
  return h("div", { class: "row", role: "option", id: `row-${place}`,
    "aria-selected": String(place === state.at), "aria-posinset": place + 1,
    "aria-setsize": state.shown.length, style: { top: `${place * ROW}px` },
    onclick: () => { select(place, true); reveal(); } },
  h("span", null, h("b", null, item.id), h("i", { class: `gate ${item.gate}` }, item.gate)),
  h("span", { class: "muted" }, where, h("span", null, right)));
}

function select(place, follow) {
  state.at = place;
  const item = state.shown[place], top = place * ROW, { list } = ui;
  if (item && (top < list.scrollTop || top + ROW > list.scrollTop + list.clientHeight)) {
    list.scrollTop = top - list.clientHeight / 2 + ROW / 2;
  }
  drawRows();
  list.setAttribute("aria-activedescendant", item ? `row-${place}` : "");
  ui.detail.replaceChildren(
    ...(item ? detail(item) : [note("Nothing matches. Clear the search or the filter.")]));
  if (item && follow) history.replaceState(null, "", link(item));
}

const link = (item) => `#i/${state.run}/${encodeURIComponent(item.id)}`;
const move = (by) => state.shown.length
  && select(Math.min(state.shown.length - 1, Math.max(0, state.at + by)), true);
// On a narrow screen the list stands above what it opens.
const reveal = () => matchMedia("(max-width: 52rem)").matches && ui.detail.scrollIntoView();

// --- the frame ---------------------------------------------------------------------------------

function frame() {
  ui.search = h("input", { type: "search", "aria-label": "search",
    placeholder: "search problems, attempts, verifications, replacements",
    oninput: () => { state.query = ui.search.value; filterItems(); } });
  ui.gates = h("div", { class: "tools", role: "group", "aria-label": "filter by gate" });
  ui.count = h("span", { class: "note", role: "status" });
  const order = h("select", { "aria-label": "order",
    onchange: (event) => { state.order = event.target.value; filterItems(); } },
  Object.entries(ORDERS).map(([name, [text]]) => h("option", { value: name }, text)));
  ui.pick = h("select", { "aria-label": "run",
    onchange: (event) => openRun(Number(event.target.value)) },
  runs.map((run, i) => (run.candidates ? h("option", { value: i }, run.name) : null)));
  ui.inner = h("div");
  ui.list = h("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "interventions",
    onscroll: drawRows, onkeydown: onListKey }, ui.inner);
  ui.left = h("div");
  ui.detail = h("div", { class: "detail" });
  const keys = { "j k": "next, previous", "/": "search", f: "unfold or fold all",
    t: "next token colour", Esc: "clear" };
  const help = Object.entries(keys).map(([key, text]) =>
    [key.split(" ").map((k) => [h("kbd", null, k), " "]), `${text}   `]);
  byId("browser").replaceChildren(
    h("div", { class: "tools" }, runs.length > 1 ? ui.pick : null, ui.search, order, ui.count),
    ui.gates, ui.left, h("p", { class: "note keys" }, help),
    h("div", { class: "browser" }, ui.list, ui.detail));
}

async function openRun(run, gate = "") {
  state.run = run;
  const data = await load(run);
  if (state.run !== run) return;
  Object.assign(state, { data, gate });
  ui.pick.value = String(run);
  const counts = {};
  for (const item of data.items) counts[item.gate] = (counts[item.gate] || 0) + 1;
  const rank = (name) => (name === "kept" ? -Infinity : -counts[name]);
  const names = Object.keys(counts).sort((a, b) => rank(a) - rank(b));
  const button = (name, text) => h("button", { "data-gate": name,
    onclick: () => { state.gate = name; filterItems(); } }, text);
  ui.gates.replaceChildren(button("", `all ${whole(data.items.length)}`),
    ...names.map((name) => button(name, `${name} ${whole(counts[name])}`)));
  const { candidates, texts } = data.left_out, left = [];
  if (candidates) left.push(`${whole(candidates)} candidates that got least far`);
  if (texts) left.push(`the texts of ${whole(texts)} continuations (their grades are all here)`);
  ui.left.replaceChildren(...(left.length ? [note("To keep this page small it leaves out ",
    left.join(" and "), ". The journals in the run folder have everything.")] : []));
  // The first one worth reading, where the list begins with others.
  filterItems(data.items.find((item) => item.gate === "kept"));
}

async function openLink() {
  const [kind, run, id] = location.hash.slice(1).split("/");
  if (kind !== "i" || !runs[run] || !runs[run].candidates || id === undefined) return false;
  let wanted;
  try { wanted = decodeURIComponent(id); } catch { return false; }
  ui.search.value = state.query = "";
  await openRun(Number(run));
  const place = state.shown.findIndex((item) => item.id === wanted);
  if (place < 0) return false;
  select(place, false);
  byId("browse").scrollIntoView();
  return true;
}

// --- keys --------------------------------------------------------------------------------------

function onListKey(event) {
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
  if (by[event.key]) { event.preventDefault(); move(by[event.key]); }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.data) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key !== "Escape") return;
    ui.search.value = state.query = "";
    filterItems();
    event.target.blur();
    return;
  }
  const act = {
    j: () => move(1),
    k: () => move(-1),
    "/": () => ui.search.focus(),
    f: foldAll,
    t: () => {
      const names = Object.keys(PAINTS);
      state.paint = names[(names.indexOf(state.paint) + 1) % names.length];
      select(state.at, false);
    },
    Escape: () => { state.gate = state.query = ui.search.value = ""; filterItems(); },
  }[event.key];
  if (act) { event.preventDefault(); act(); }
}

function foldAll() {
  const folds = [...ui.detail.querySelectorAll("details")];
  const open = folds.some((node) => !node.open);
  for (const node of folds) node.open = open;
  state.open = new Set(open ? ["problem", "reference", "guided", "reply"] : []);
}
