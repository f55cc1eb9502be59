"use strict";
const ROW = 56;
const state = { runs: [], run: 0, data: null, shown: [], at: -1, gate: "", query: "", order: "file", paint: "difference", open: new Set() };
const loaded = new Map();

// A promise of the texts of a run.
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
  const [problem, answer, reference] = data.problems[item.problem] || ["", "", ""];
  const [steps, reason] = data.attempts[`${item.problem}/${item.attempt}`] || [[], ""];
  Object.assign(item, { question: problem, answer, reference, steps, attemptReason: reason });
  item.share = (start) => {
    const marks = item.chips[start] ? item.chips[start][0].replaceAll("u", "") : "";
    return marks.length ? [marks.replaceAll("w", "").length, marks.length] : null;
  };
  item.hay = () => (item.lower ??= [item.id, problem, answer, reference, steps.join(""), item.content, item.reply, item.guided,
    item.reason].join("\n").toLowerCase());
}

const ratio = (pair) => (pair ? pair[0] / pair[1] : -1);
const ORDERS = {
  file: ["in the order of the file", null],
  right: ["most right continuations first", (item) => -ratio(item.share("intervention"))],
  gain: ["largest gain over the wrong step first", (item) => -(item.share("error") ? ratio(item.share("intervention")) - ratio(item.share("error")) : -2)],
  early: ["earliest error first", (item) => (item.location ? item.location / item.steps.length : 2)],
};

// --- the list ----------------------------------------------------------------------------------

function filterItems(keep) {
  const words = state.query.toLowerCase().trim();
  const found = state.data.items.filter((item) => (!state.gate || item.gate === state.gate) && (!words || item.hay().includes(words)));
  const key = ORDERS[state.order][1];
  if (key) found.sort((a, b) => key(a) - key(b));
  state.shown = found;
  const place = keep ? found.indexOf(keep) : -1;
  ui.count.textContent = `${whole(found.length)} of ${whole(state.data.items.length)}`;
  for (const button of ui.gates.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.gate === state.gate));
  ui.inner.style.height = `${found.length * ROW}px`;
  select(found.length ? Math.max(0, place) : -1, false);
}

function drawRows() {
  const from = Math.max(0, Math.floor(ui.list.scrollTop / ROW) - 6);
  const to = Math.min(state.shown.length, from + Math.ceil(ui.list.clientHeight / ROW) + 12);
  ui.inner.replaceChildren(...state.shown.slice(from, to).map((item, i) => row(item, from + i)));
}

function row(item, place) {
  const shares = ["intervention", "error"].map((start) => item.share(start));
  return h("div", { class: "row", role: "option", id: `row-${place}`, "aria-selected": String(place === state.at), "aria-posinset": place + 1,
    "aria-setsize": state.shown.length, style: { top: `${place * ROW}px` }, onclick: () => { select(place, true); reveal(); } },
  h("span", null, h("b", null, item.id), h("i", { class: `gate ${item.gate}`, style: { "font-style": "normal" } }, item.gate)),
  h("span", { class: "muted" }, item.location ? `step ${item.location} of ${item.steps.length}` : "no step located",
    h("span", null, shares[0] ? `\u2713 ${shares[0].join("/")}` : "", shares[1] ? ` vs ${shares[1].join("/")}` : "")));
}

function select(place, follow) {
  state.at = place;
  const item = state.shown[place];
  if (item && (place * ROW < ui.list.scrollTop || (place + 1) * ROW > ui.list.scrollTop + ui.list.clientHeight)) {
    ui.list.scrollTop = place * ROW - ui.list.clientHeight / 2 + ROW / 2;
  }
  drawRows();
  ui.list.setAttribute("aria-activedescendant", item ? `row-${place}` : "");
  ui.detail.replaceChildren(...(item ? detail(item) : [note("Nothing matches. Clear the search or the filter.")]));
  if (item && follow) history.replaceState(null, "", link(item));
}

const link = (item) => `#i/${state.run}/${encodeURIComponent(item.id)}`;
const move = (by) => state.shown.length && select(Math.min(state.shown.length - 1, Math.max(0, state.at + by)), true);
// On a narrow screen the list stands above what it opens.
const reveal = () => { if (matchMedia("(max-width: 52rem)").matches) ui.detail.scrollIntoView(); };

// --- one intervention --------------------------------------------------------------------------

// Text with the search marked in it.
function marked(text) {
  const words = state.query.toLowerCase().trim();
  if (!words) return [text];
  const lower = text.toLowerCase(), parts = [];
  if (lower.length !== text.length) return [text];
  let from = 0;
  for (let at = lower.indexOf(words); at >= 0 && parts.length < 2000; at = lower.indexOf(words, from)) {
    parts.push(text.slice(from, at), h("mark", null, text.slice(at, at + words.length)));
    from = at + words.length;
  }
  return [...parts, text.slice(from)];
}
const says = (text) => h("div", { class: "says" }, marked(text));

function fold(name, title, extra, body, open) {
  const node = h("details", { class: "block", open: Boolean(state.open.has(name) || open) },
    h("summary", null, title, " ", h("span", { class: "muted" }, extra)), h("div", { class: "body" }, body));
  node.querySelector("summary").addEventListener("click", () => (node.open ? state.open.delete(name) : state.open.add(name)));
  return node;
}
const size = (text) => `${whole(text.length)} characters`;
const hits = (text) => state.query.trim() && text.toLowerCase().includes(state.query.toLowerCase().trim());

function detail(item) {
  const gate = (state.runs[state.run].intervention.gates.find(([name]) => name === item.gate) || [])[2] || "";
  return [
    h("div", { class: "bartop" }, h("h3", null, item.id, " ", h("span", { class: `gate ${item.gate}` }, item.gate)),
      h("button", { onclick: () => move(-1), disabled: state.at <= 0, title: "previous (k)", "aria-label": "previous" }, "\u2190", h("span", { class: "word" }, " previous")),
      h("button", { onclick: () => move(1), disabled: state.at >= state.shown.length - 1, title: "next (j)", "aria-label": "next" }, h("span", { class: "word" }, "next "), "\u2192"),
      h("a", { href: link(item), class: "note" }, "link")),
    h("p", { class: "facts" }, `Gate: ${item.gate}${gate ? ` (${gate})` : ""}. `, item.reason ? `${item.reason}. ` : "",
      `Attempt ${item.attempt}, graded ${item.attemptReason || "unknown"}; `,
      item.location ? `first wrong step by the model's own verification: ${item.location} of ${item.steps.length}; ` : "no step located; ",
      `${whole(item.num_tokens)} tokens generated for this candidate.`),
    fold("problem", "Problem", "", [says(item.question), h("p", { class: "note" }, "Answer: ", h("code", null, item.answer))], item.question.length < 1500),
    item.reference ? fold("reference", "Reference solution", size(item.reference), says(item.reference), hits(item.reference)) : null,
    h("div", { class: "block" }, h("div", { class: "head" }, "The attempt, and the intervention in it ",
      h("span", { class: "muted" }, `${item.steps.length} steps`)), attempt(item)),
    item.guided ? fold("guided", "Solution along the reference", size(item.guided), says(item.guided), hits(item.guided)) : null,
    fold("reply", "The model's verification", size(item.reply), item.reply ? says(item.reply) : note("none"), !item.location || item.reply.length < 600 || hits(item.reply)),
    continuations(item), tokens(item)].filter(Boolean);
}

function attempt(item) {
  const trim = (text) => text.replace(/^\s+|\s+$/g, "");
  const hasNew = item.location && item.content;
  const line = (cls, n, ...children) => h("li", { class: cls }, h("span", { class: "n" }, n), h("div", null, children));
  const list = item.steps.map((step, i) => {
    const n = i + 1, text = trim(step);
    if (n !== item.location || !item.location) return line(item.location && n > item.location ? "after" : "", n, says(text));
    // A search marks its words in whole texts.
    const diff = hasNew && !state.query.trim() ? wordDiff(text, trim(item.content)) : null;
    return [line("cut", n, h("span", { class: "tag" }, "first wrong step: replaced"), diff ? h("div", { class: "says" }, diff[0]) : says(text)),
      hasNew ? line("new", "+", h("span", { class: "tag" }, "intervention"), diff ? h("div", { class: "says" }, diff[1]) : says(trim(item.content))) : null];
  });
  const outside = hasNew && item.location > item.steps.length
    ? line("new", "+", h("span", { class: "tag" }, `replacement for step ${item.location}, which the attempt does not have`), says(trim(item.content))) : null;
  return h("ol", { class: "steps body" }, list, outside);
}

// [old, new] with the words that differ set off; null where the texts are long or have little in common.
function wordDiff(before, after) {
  const [a, b] = [before.split(/(\s+)/), after.split(/(\s+)/)];
  if (a.length * b.length > 250000) return null;
  const width = b.length + 1, common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) {
    common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1 : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  }
  if (common[0] < Math.min(a.length, b.length) * 0.4) return null;
  const [old, fresh] = [[], []];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { old.push(a[i++]); fresh.push(b[j++]); }
    else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) old.push(h("del", null, a[i++]));
    else fresh.push(h("ins", null, b[j++]));
  }
  return [old, fresh];
}

const STARTS = [["intervention", "prefix + intervention"], ["error", "prefix + wrong step"], ["prefix", "prefix alone"]];
const GRADES = { c: ["correct", "\u2713", "right"], w: ["wrong", "\u2717", "wrong"], u: ["unscored", "?", "unscored"] };

function continuations(item) {
  const drawn = STARTS.filter(([start]) => item.chips[start]);
  if (!drawn.length) return null;
  const box = h("div", { style: { "margin-top": ".7rem" } });
  let pressed = null;
  const chip = (start, name, mark, i) => {
    const [cls, sign, word] = GRADES[mark], text = item.chips[start][1][i];
    const button = h("button", { class: `chip ${cls}`, title: `sample ${i}: ${word}`, "aria-label": `${name}, sample ${i}: ${word}`, "aria-pressed": "false",
      onclick: () => {
        if (pressed) pressed.setAttribute("aria-pressed", "false");
        if (pressed === button) { pressed = null; box.replaceChildren(); return; }
        pressed = button;
        button.setAttribute("aria-pressed", "true");
        box.replaceChildren(note(`Continuation ${i} from ${name}: ${word}.`),
          text === undefined ? note("Its text is left out of this page to keep it small; it is in continuations.jsonl.") : says(text.trim()));
      } }, sign);
    return button;
  };
  return h("div", { class: "block" },
    h("div", { class: "head" }, "Continuations ", h("span", { class: "muted" }, "press one to read it; brackets are 95 % Wilson intervals of this attempt alone")),
    h("div", { class: "body" }, h("div", { class: "starts" }, drawn.map(([start, name]) => {
      const pair = item.share(start), range = pair && wilson(...pair);
      return [h("div", null, name), h("div", { class: "chips" }, [...item.chips[start][0]].map((mark, i) => chip(start, name, mark, i))),
        h("div", { class: "num" }, pair ? [`${pair[0]} of ${pair[1]} right `, h("span", { class: "ci muted" }, `[${percent(range[0], 0)}, ${percent(range[1], 0)}] %`)] : "none scored")];
    })), box));
}

// --- tokens ------------------------------------------------------------------------------------

const PAINTS = {
  weights: ["loss weight", "The weight of each token in the SFT loss. Tokens without colour carry none."],
  difference: ["log-prob difference", "Log-probability after SFT minus that under the base, nats. Blue: more likely after SFT; orange: less likely."],
  base: ["log-prob, base", "Log-probability under the base. Orange: the base found it unlikely."],
  trained: ["log-prob, after SFT", "Log-probability after SFT. Orange: still unlikely."],
};

function tokens(item) {
  const run = state.runs[state.run];
  if (item.tokens) return tokenBlock(item.tokens, "tokens");
  if (!run.scored || !["kept", "unsolved", "passed"].includes(item.gate)) return null;
  const { examples } = state.data.left_out;
  return note(`Token colours: not among the ${whole(run.scored)} SFT examples that were scored (metrics.example_logprobs), or not trained on`,
    examples ? `; those of ${whole(examples)} examples are left out to keep this page small.` : ".");
}

function tokenBlock(streamsOf, id) {
  const [pieces, weights, base, trained] = streamsOf;
  const difference = base.map((v, i) => (v === null || trained[i] === null ? null : trained[i] - v));
  const streams = { weights, difference, base, trained }, values = streams[state.paint];
  const sizes = values.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  const top = sizes.length ? sizes[Math.floor((sizes.length - 1) * 0.98)] || 1 : 1;
  const tint = (v) => {
    if (v === null || v === 0) return null;
    return `rgb(var(--${v > 0 ? "up" : "down"}) / ${(0.62 * Math.min(1, Math.abs(v) / top)).toFixed(3)})`;
  };
  const sum = (xs) => xs.reduce((a, v) => a + (v ?? 0), 0), n = base.filter((v) => v !== null).length || 1;
  const show = (v) => (v === null || v === undefined ? "none" : v.toFixed(3));
  const readout = h("div", { class: "readout" }, "Point at a token for its numbers.");
  const body = h("div", { class: "says" }, pieces.map((piece, i) => h("span", { class: "tok", style: { background: tint(values[i]) || "transparent" },
    "data-i": i }, piece)));
  const tell = (event) => {
    const i = event.target.dataset && event.target.dataset.i;
    if (i !== undefined) readout.textContent = `weight ${weights[i]}, log-prob ${show(base[i])} \u2192 ${show(trained[i])}, difference ${show(difference[i])}`;
  };
  body.addEventListener("pointerover", tell);
  body.addEventListener("pointerdown", tell);
  const redraw = (name) => { state.paint = name; const fresh = tokenBlock(streamsOf, id); node.replaceWith(fresh); fresh.querySelector('[aria-pressed="true"]').focus(); };
  const both = state.paint === "difference";
  const node = h("div", { class: "block", id },
    h("div", { class: "head" }, "What SFT trained, token by token ",
      h("span", { class: "muted" }, `mean log-prob ${(sum(base) / n).toFixed(3)} \u2192 ${(sum(trained) / n).toFixed(3)} nats over ${n} loss tokens`)),
    h("div", { class: "body" },
      h("div", { class: "tools" }, Object.entries(PAINTS).map(([name, [text]]) =>
        h("button", { "aria-pressed": String(state.paint === name), onclick: () => redraw(name) }, text))),
      note(PAINTS[state.paint][1], h("br"), both ? `\u2212${short(top)}` : state.paint === "weights" ? "0" : `\u2212${short(top)}`,
        h("i", { class: "scale", style: { background: state.paint === "weights" ? "linear-gradient(90deg, transparent, rgb(var(--up) / .62))"
          : both ? "linear-gradient(90deg, rgb(var(--down) / .62), transparent, rgb(var(--up) / .62))" : "linear-gradient(90deg, rgb(var(--down) / .62), transparent)" } }),
        both ? `+${short(top)}` : state.paint === "weights" ? short(top) : "0"),
      body, readout));
  return node;
}

// --- SFT data that are no interventions --------------------------------------------------------

const KINDS = { reference: "reference solution", reflection: "self-reflection", rft: "right attempt", star: "rationalisation", prefix: "beginning of an attempt" };

// Every example is a fold; its tokens are drawn when it is opened first.
function examples(runs) {
  return runs.map((run, r) => {
    if (!run.trained.length) return null;
    const folds = run.trained.map(([problem, kind, num, before, after], i) => {
      const body = h("div", { class: "body" });
      return h("details", { class: "block", ontoggle: async () => { if (!body.firstChild) body.replaceChildren(...example(await load(r), problem, i)); } },
        h("summary", null, problem, " ", h("span", { class: "muted" }, `${KINDS[kind] || kind}, ${whole(num)} loss tokens`,
          before === null ? "" : `, mean log-prob ${before.toFixed(3)} \u2192 ${after.toFixed(3)} nats`)), body);
    });
    return [many(runs) ? h("h3", null, run.name) : null,
      note(`${whole(run.trained.length)} examples, spread over all that SFT saw, with what it did to the log-probability of each token. `,
        "Open one to see its tokens."), folds];
  });
}

function example(data, problem, i) {
  const [text, answer] = data.problems[problem] || ["", ""];
  return [says(text), h("p", { class: "note" }, "Answer: ", h("code", null, answer)), tokenBlock(data.examples[i], null)];
}
