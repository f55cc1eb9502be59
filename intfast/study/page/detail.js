// One intervention: the attempt with what replaces its wrong step, continuations, token colours.

// Text with the search marked in it.
function marked(text) {
  const words = state.query.toLowerCase().trim(), lower = text.toLowerCase();
  if (!words || lower.length !== text.length) return [text];
  const parts = [];
  let from = 0;
  for (let at = lower.indexOf(words); at >= 0 && parts.length < 2000;
    at = lower.indexOf(words, from)) {
    parts.push(text.slice(from, at), h("mark", null, text.slice(at, at + words.length)));
    from = at + words.length;
  }
  return [...parts, text.slice(from)];
}
const says = (text) => h("div", { class: "says" }, marked(text));
const muted = (text) => h("span", { class: "muted" }, text);
const size = (text) => `${whole(text.length)} characters`;
const hits = (text) => state.query.trim()
  && text.toLowerCase().includes(state.query.toLowerCase().trim());

function fold(name, title, extra, body, open) {
  const node = h("details", { class: "block", open: Boolean(state.open.has(name) || open) },
    h("summary", null, title, " ", muted(extra)), h("div", { class: "body" }, body));
  node.querySelector("summary").addEventListener("click",
    () => (node.open ? state.open.delete(name) : state.open.add(name)));
  return node;
}

function detail(item) {
  const step = (by, key, text, off) => h("button", { onclick: () => move(by), disabled: off,
    title: `${text} (${key})`, "aria-label": text }, by < 0 ? "\u2190 " : "",
  h("span", { class: "word" }, text), by > 0 ? " \u2192" : "");
  const where = item.location ? "first wrong step by the model's own verification: "
    + `${item.location} of ${item.steps.length}` : "no step located";
  const answer = h("p", { class: "note" }, "Answer: ", h("code", null, item.answer));
  return [
    h("div", { class: "bartop" },
      h("h3", null, item.id, " ", h("span", { class: `gate ${item.gate}` }, item.gate)),
      step(-1, "k", "previous", state.at <= 0),
      step(1, "j", "next", state.at >= state.shown.length - 1),
      h("a", { href: link(item), class: "note" }, "link")),
    h("p", { class: "facts" },
      `Gate: ${item.gate}${gates[item.gate] ? ` (${gates[item.gate]})` : ""}. `,
      item.reason ? `${item.reason}. ` : "",
      `Attempt ${item.attempt}, graded ${item.attemptReason || "unknown"}; ${where}; `,
      `${whole(item.num_tokens)} tokens generated for this candidate.`),
    fold("problem", "Problem", "", [says(item.question), answer], item.question.length < 1500),
    item.reference ? fold("reference", "Reference solution", size(item.reference),
      says(item.reference), hits(item.reference)) : null,
    h("div", { class: "block" }, h("div", { class: "head" },
      "The attempt, and the intervention in it ", muted(`${item.steps.length} steps`)),
    attempt(item)),
    item.guided ? fold("guided", "Solution along the reference", size(item.guided),
      says(item.guided), hits(item.guided)) : null,
    fold("reply", "The model's verification", size(item.reply),
      item.reply ? says(item.reply) : note("none"),
      !item.location || item.reply.length < 600 || hits(item.reply)),
    continuations(item), tokens(item)].filter(Boolean);
}

function attempt(item) {
  const hasNew = item.location && item.content, fix = item.content.trim();
  const line = (cls, n, ...children) =>
    h("li", { class: cls }, h("span", { class: "n" }, n), h("div", null, children));
  const tagged = (cls, n, tag, body) => line(cls, n, h("span", { class: "tag" }, tag), body);
  const list = item.steps.map((step, i) => {
    const n = i + 1, text = step.trim(), isLater = item.location && n > item.location;
    if (n !== item.location) return line(isLater ? "after" : "", n, says(text));
    // A search marks its words in whole texts.
    const diff = hasNew && !state.query.trim() ? wordDiff(text, fix) : null;
    const [before, after] = diff ? diff.map((words) => h("div", { class: "says" }, words))
      : [says(text), says(fix)];
    return [tagged("cut", n, "first wrong step: replaced", before),
      hasNew ? tagged("new", "+", "intervention", after) : null];
  });
  const absent = `replacement for step ${item.location}, which the attempt does not have`;
  return h("ol", { class: "steps body" }, list,
    hasNew && item.location > item.steps.length ? tagged("new", "+", absent, says(fix)) : null);
}

// [old, new] with the words that differ set off; null for texts that are long, or too different.
function wordDiff(before, after) {
  const [a, b] = [before.split(/(\s+)/), after.split(/(\s+)/)], width = b.length + 1;
  if (a.length * b.length > 250000) return null;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      common[at] = a[i] === b[j] ? common[at + width + 1] + 1
        : Math.max(common[at + width], common[at + 1]);
    }
  }
  if (common[0] < Math.min(a.length, b.length) * 0.4) return null;
  const old = [], fresh = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    const at = i * width + j;
    if (i < a.length && j < b.length && a[i] === b[j]) { old.push(a[i++]); fresh.push(b[j++]); }
    else if (j >= b.length || (i < a.length && common[at + width] >= common[at + 1])) {
      old.push(h("del", null, a[i++]));
    } else fresh.push(h("ins", null, b[j++]));
  }
  return [old, fresh];
}

const GRADES = { c: ["correct", "\u2713", "right"], w: ["wrong", "\u2717", "wrong"],
  u: ["unscored", "?", "unscored"] };

function continuations(item) {
  const drawn = Object.entries(starts).filter(([start]) => item.chips[start]);
  if (!drawn.length) return null;
  const box = h("div", { class: "said" });
  const press = (button, name, word, i, text) => {
    const again = button.getAttribute("aria-pressed") === "true";
    for (const chip of node.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", "false");
    if (again) { box.replaceChildren(); return; }
    button.setAttribute("aria-pressed", "true");
    box.replaceChildren(note(`Continuation ${i} from ${name}: ${word}.`), text !== undefined
      ? says(text.trim())
      : note("Its text is left out to keep this page small; it is in continuations.jsonl."));
  };
  const rows = drawn.map(([start, name]) => {
    const [marks, texts, range] = item.chips[start], pair = item.share(start);
    const chips = [...marks].map((mark, i) => {
      const [cls, sign, word] = GRADES[mark], about = `sample ${i}: ${word}`;
      return h("button", { class: `chip ${cls}`, title: about, "aria-label": `${name}, ${about}`,
        "aria-pressed": "false",
        onclick: (event) => press(event.currentTarget, name, word, i, texts[i]) }, sign);
    });
    const ends = range ? range.map((x) => (100 * x).toFixed(0)).join(", ") : "";
    return [h("div", null, name), h("div", { class: "chips" }, chips), h("div", { class: "num" },
      pair ? [`${pair[0]} of ${pair[1]} right `, h("span", { class: "ci" }, `[${ends}] %`)]
        : "none scored")];
  });
  const about = "press one to read it; brackets are 95 % Wilson intervals of this attempt alone";
  const node = h("div", { class: "block" },
    h("div", { class: "head" }, "Continuations ", muted(about)),
    h("div", { class: "body" }, h("div", { class: "starts" }, rows), box));
  return node;
}

// --- tokens ------------------------------------------------------------------------------------

const PAINTS = {
  weights: ["loss weight",
    "The weight of each token in the SFT loss. Tokens without colour carry none."],
  difference: ["log-prob difference", "Log-probability after SFT minus that under the base, nats. "
    + "Blue: more likely after SFT; orange: less likely."],
  base: ["log-prob, base", "Log-probability under the base. Orange: the base found it unlikely."],
  trained: ["log-prob, after SFT", "Log-probability after SFT. Orange: still unlikely."],
};

function tokens(item) {
  const { scored } = runs[state.run], { examples } = state.data.left_out;
  if (item.tokens) return tokenBlock(item.tokens, "tokens");
  if (!scored || !["kept", "unsolved", "passed"].includes(item.gate)) return null;
  return note(`Token colours: not among the ${whole(scored)} SFT examples that were scored `,
    "(metrics.example_logprobs), or not trained on", examples
      ? `; those of ${whole(examples)} examples are left out to keep this page small.` : ".");
}

// The scale of a colour: what 98 % of the values stay below.
function topOf(values) {
  const sizes = values.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  return sizes[Math.floor((sizes.length - 1) * 0.98)] || 1;
}

function tint(value, top) {
  if (value === null || value === 0) return "transparent";
  const alpha = 0.62 * Math.min(1, Math.abs(value) / top);
  return `rgb(var(--${value > 0 ? "up" : "down"}) / ${alpha.toFixed(3)})`;
}

function tokenBlock(streams, id) {
  const [pieces, weights, base, trained] = streams;
  const known = (i) => base[i] !== null && trained[i] !== null;
  const difference = base.map((v, i) => (known(i) ? trained[i] - v : null));
  const values = { weights, difference, base, trained }[state.paint], top = topOf(values);
  const num = base.filter((v) => v !== null).length || 1;
  const mean = (xs) => (xs.reduce((a, v) => a + (v ?? 0), 0) / num).toFixed(3);
  const show = (v) => (v === null || v === undefined ? "none" : v.toFixed(3));
  const readout = h("div", { class: "readout" }, "Point at a token for its numbers.");
  const tell = (event) => {
    const i = event.target.dataset.i;
    if (i === undefined) return;
    readout.textContent = `weight ${weights[i]}, log-prob ${show(base[i])} \u2192 `
      + `${show(trained[i])}, difference ${show(difference[i])}`;
  };
  const body = h("div", { class: "says", onpointerover: tell, onpointerdown: tell },
    pieces.map((piece, i) => h("span", { class: "tok", "data-i": i,
      style: { background: tint(values[i], top) } }, piece)));
  const redraw = (name) => {
    state.paint = name;
    const fresh = tokenBlock(streams, id);
    node.replaceWith(fresh);
    fresh.querySelector('[aria-pressed="true"]').focus();
  };
  const buttons = Object.entries(PAINTS).map(([name, [text]]) => h("button",
    { "aria-pressed": String(state.paint === name), onclick: () => redraw(name) }, text));
  const end = Number(top.toPrecision(3)), isWeight = state.paint === "weights";
  const node = h("div", { class: "block", id },
    h("div", { class: "head" }, "What SFT trained, token by token ",
      muted(`mean log-prob ${mean(base)} \u2192 ${mean(trained)} nats over ${num} loss tokens`)),
    h("div", { class: "body" }, h("div", { class: "tools" }, buttons),
      note(PAINTS[state.paint][1], h("br"), isWeight ? "0" : `\u2212${end}`,
        h("i", { class: `scale ${state.paint}` }),
        isWeight ? end : state.paint === "difference" ? `+${end}` : "0"),
      body, readout));
  return node;
}

// --- SFT examples that are no interventions, and the page --------------------------------------

async function openExample(place) {
  const { run, example } = place.dataset, data = await load(Number(run));
  if (place.firstChild) return;
  const [problem] = data.trained[example], [text, answer] = data.problems[problem] || ["", ""];
  place.replaceChildren(says(text),
    h("p", { class: "note" }, "Answer: ", h("code", null, answer)),
    tokenBlock(data.examples[example], null));
}

function theme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "";
  const apply = () => { root.dataset.theme = chosen || (system.matches ? "dark" : "light"); };
  system.addEventListener("change", apply);
  apply();
  byId("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    apply();
  });
}

function start() {
  theme();
  for (const place of document.querySelectorAll("[data-example]")) {
    place.parentElement.addEventListener("toggle", () => openExample(place));
  }
  if (!byId("browser")) return;
  frame();
  for (const button of document.querySelectorAll("button[data-run]")) {
    button.addEventListener("click", async () => {
      await openRun(Number(button.dataset.run), button.dataset.gate);
      byId("browse").scrollIntoView();
    });
  }
  document.addEventListener("keydown", onKey);
  addEventListener("resize", () => state.data && drawRows());
  addEventListener("hashchange", openLink);
}
start();

// The texts stand behind this script: the figures do not wait for them.
document.addEventListener("DOMContentLoaded", async () => {
  const first = runs.findIndex((run) => run.candidates);
  if (first >= 0 && !window.DecompressionStream) {
    ui.detail.replaceChildren(
      note("This browser is too old to unpack the texts; the figures are complete."));
  } else if (first >= 0 && !(await openLink())) await openRun(first);
  document.documentElement.dataset.ready = "yes";
});
