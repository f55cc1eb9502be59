"use strict";
const ui = {};

function browser(runs) {
  if (runs.every((run) => !run.intervention.candidates)) return note("No intervention yet: the run trains without them, or has not come to them.");
  ui.search = h("input", { type: "search", placeholder: "search problems, attempts, verifications, replacements", "aria-label": "search",
    oninput: () => { state.query = ui.search.value; filterItems(state.shown[state.at]); } });
  ui.gates = h("div", { class: "tools", role: "group", "aria-label": "filter by gate" });
  ui.count = h("span", { class: "note", role: "status" });
  const order = h("select", { "aria-label": "order", onchange: (event) => { state.order = event.target.value; filterItems(state.shown[state.at]); } },
    Object.entries(ORDERS).map(([name, [text]]) => h("option", { value: name }, text)));
  ui.pick = h("select", { "aria-label": "run", onchange: (event) => openRun(Number(event.target.value)) },
    runs.map((run, i) => (run.intervention.candidates ? h("option", { value: i }, run.name) : null)));
  ui.inner = h("div");
  ui.list = h("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "interventions", onscroll: drawRows, onkeydown: (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (by) { event.preventDefault(); move(by); }
  } }, ui.inner);
  ui.left = h("div");
  ui.detail = h("div", { class: "detail" });
  return [h("div", { class: "tools" }, many(runs) ? ui.pick : null, ui.search, order, ui.count), ui.gates, ui.left,
    h("p", { class: "note keys" }, h("kbd", null, "j"), " ", h("kbd", null, "k"), " next, previous   ", h("kbd", null, "/"), " search   ",
      h("kbd", null, "f"), " unfold or fold all   ", h("kbd", null, "t"), " next token colour   ", h("kbd", null, "Esc"), " clear"),
    h("div", { class: "browser" }, ui.list, ui.detail)];
}

async function openRun(run, gate = "") {
  state.run = run;
  const data = await load(run);
  if (state.run !== run) return;
  Object.assign(state, { data, gate });
  ui.pick.value = String(run);
  const counts = new Map();
  for (const item of state.data.items) counts.set(item.gate, (counts.get(item.gate) || 0) + 1);
  const names = [...counts.keys()].sort((a, b) => (a === "kept" ? -1 : b === "kept" ? 1 : counts.get(b) - counts.get(a)));
  const button = (name, text) => h("button", { "data-gate": name, onclick: () => { state.gate = name; filterItems(state.shown[state.at]); } }, text);
  ui.gates.replaceChildren(button("", `all ${whole(state.data.items.length)}`), ...names.map((name) => button(name, `${name} ${whole(counts.get(name))}`)));
  const { candidates, texts } = state.data.left_out;
  ui.left.replaceChildren(...(candidates || texts ? [note("To keep this page small it leaves out ",
    candidates ? `${whole(candidates)} candidates that got least far` : "", candidates && texts ? " and " : "",
    texts ? `the texts of ${whole(texts)} continuations (their grades are all here)` : "", ". The journals in the run folder have everything.")] : []));
  // The first one worth reading, where the list begins with others.
  filterItems(state.data.items.find((item) => item.gate === "kept"));
}

async function openLink() {
  const [kind, run, id] = location.hash.slice(1).split("/");
  if (kind !== "i" || !state.runs[run] || !state.runs[run].intervention.candidates || id === undefined) return false;
  const wanted = decodeURIComponent(id);
  ui.search.value = state.query = "";
  await openRun(Number(run));
  const place = state.shown.findIndex((item) => item.id === wanted);
  if (place < 0) return false;
  select(place, false);
  document.getElementById("browse").scrollIntoView();
  return true;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.data) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") { ui.search.value = state.query = ""; filterItems(state.shown[state.at]); event.target.blur(); }
    return;
  }
  const paints = Object.keys(PAINTS);
  const act = {
    j: () => move(1), k: () => move(-1), "/": () => ui.search.focus(),
    f: () => {
      const folds = [...ui.detail.querySelectorAll("details")], open = folds.some((node) => !node.open);
      for (const node of folds) node.open = open;
      state.open = new Set(open ? ["problem", "reference", "guided", "reply"] : []);
    },
    t: () => { state.paint = paints[(paints.indexOf(state.paint) + 1) % paints.length]; select(state.at, false); },
    Escape: () => { state.gate = state.query = ui.search.value = ""; filterItems(state.shown[state.at]); },
  }[event.key];
  if (act) { event.preventDefault(); act(); }
}

function themeButton() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "";
  const apply = () => { root.dataset.theme = chosen || (system.matches ? "dark" : "light"); };
  system.addEventListener("change", apply);
  apply();
  return h("button", { "aria-label": "light or dark", title: "light or dark", onclick: () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark"; apply(); } }, "\u25D0");
}

// [id, name in the navigation, element]
function sectionsOf(found, pick) {
  const { runs } = found, about = found.comparison;
  const read = [["interventions", "Interventions", section("interventions", "Interventions in numbers", runs.some((run) => run.intervention.candidates) ? funnel(runs, pick) : note("None: this run trains without them, or has not come to them."))],
    ["browse", "Browser", section("browse", "Read the interventions", browser(runs))]];
  if (runs.some((run) => run.trained.length)) read.push(["trained", "SFT examples", section("trained", "Read what SFT learned from", examples(runs))]);
  if (about) {
    const [steps, tokens] = compareResults(about);
    return [["results", "Equal steps", steps], ["tokens", "Equal tokens", tokens], ["training", "Training", compareTraining(about)],
      ...(runs.length ? read : []), ["settings", "Settings", compareSettings(about)]].filter(([, , node]) => node);
  }
  return [["results", "Results", results(runs, found.across, found.pooled)], ...read, ["training", "Training", training(runs)],
    ["time", "Time", time(runs)], ["grading", "Grading", grading(runs)], ["settings", "Settings", settings(runs)]];
}

function start() {
  const found = readData("runs"), { runs } = found;
  state.runs = runs;
  const theme = themeButton();
  const pick = async (run, gate) => { await openRun(run, gate); document.getElementById("browse").scrollIntoView(); };
  const parts = sectionsOf(found, pick);
  document.getElementById("page").append(found.comparison ? compareHeader(found.comparison) : header(runs),
    h("nav", { "aria-label": "sections" }, parts.map(([id, text]) => h("a", { href: `#${id}` }, text)), theme),
    ...parts.map(([, , node]) => node));
  document.addEventListener("keydown", onKey);
  addEventListener("resize", () => state.data && drawRows());
  addEventListener("hashchange", openLink);
  // The texts stand behind this script: the figures do not wait for them.
  document.addEventListener("DOMContentLoaded", async () => {
    const first = runs.findIndex((run) => run.intervention.candidates);
    if (first >= 0 && !window.DecompressionStream) ui.detail.replaceChildren(note("This browser is too old to unpack the texts; the figures are complete."));
    else if (first >= 0 && !(await openLink())) await openRun(first);
    document.documentElement.dataset.ready = "yes";
  });
}
start();
