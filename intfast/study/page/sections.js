"use strict";
const many = (runs) => runs.length > 1;
const named = (runs, run, text) => (many(runs) ? `${run.name}: ${text}` : text);
const finals = (run) => run.evaluations.filter((e) => !e.name.includes("@"));
const dot = (stroke) => h("i", { class: "dot", style: { background: stroke } });

function header(runs) {
  const run = runs[0], about = run.manifest;
  return h("header", null,
    h("h1", null, many(runs) ? `${runs.length} runs, side by side` : run.name),
    h("p", { class: "muted" }, many(runs) ? runs.map((r) => r.name).join(", ")
      : ["A run of intfast from ", h("code", null, run.model),
        about.num_parameters ? `, ${whole(about.num_parameters)} parameters` : "",
        about.device ? `, on ${about.device}` : "", `, seed ${run.seed}.`]),
    runs.map((r) => missing(runs, r)), testSets(runs));
}

function missing(runs, run) {
  if (!run.missing.length) return null;
  const open = run.missing.some(([name]) => name === "summary.json");
  return h("div", { class: "warn", "data-missing": run.missing.map(([name]) => name).join(" ") },
    h("b", null, named(runs, run, open ? "this run has not finished." : "some files are not in the run folder.")),
    " The page shows what is there. Missing:",
    h("ul", null, run.missing.map(([name, text]) => h("li", null, h("code", null, name), `: ${text}`))));
}

function testSets(runs) {
  const sets = new Set(runs.map((run) => run.manifest.test && run.manifest.test.hash).filter(Boolean));
  return sets.size < 2 ? null : h("div", { class: "warn" },
    h("b", null, "These runs were evaluated on different problems."), " Their rows cannot be compared with each other.");
}

// --- results -----------------------------------------------------------------------------------

function results(runs, across, groups) {
  const rows = runs.flatMap((run, r) => finals(run).map((e) => ({ run, e, stroke: lineColor(runs, r, e.name) })));
  if (!rows.length) return section("results", "Results", note("No evaluation: the run has no test problems, or has not come to them yet."));
  const ks = [...new Set(runs.flatMap((run) => run.ks))].filter((k) => k > 1).sort((a, b) => a - b);
  const top = Math.max(...rows.map(({ e }) => (e.accuracy ? e.accuracy[2] : 0))) || 1;
  const pass = (e, k) => { const found = (e.pass || []).find((p) => p[0] === k); return found && found.slice(1); };
  return section("results", "Results on held-out problems", runs.map((run) => measured(runs, run)), pooledResults(groups, ks),
    groups && groups.length ? h("h3", null, "Each run") : null,
    table(["weights", ">accuracy %", `0 to ${short(100 * top)} %`, ...ks.map((k) => `>pass@${k} %`), ">ever solved %",
      ">tokens", ">cut, unscored %"],
    rows.map(({ run, e, stroke }) => [h("td", { class: "name" }, dot(stroke), named(runs, run, e.label)),
      [estimate(e.accuracy)], [whisker(e.accuracy, top, stroke)], ...ks.map((k) => [estimate(pass(e, k))]), [estimate(e.coverage)],
      e.tokens ? whole(e.tokens) : "", `${e.accuracy ? percent(e.truncated) : ""}, ${percent(e.unscored)}`])),
    counted(), differences(runs, across), passCurves(rows, many(runs)), ablations(runs));
}

function measured(runs, run) {
  const all = finals(run);
  if (!all.length) return null;
  const { problems, samples } = all[0], how = run.sampling;
  const graded = all.reduce((sum, e) => sum + e.samples, 0);
  return h("p", null, many(runs) ? h("b", null, `${run.name}: `) : "",
    `${all.length} sets of weights on the same ${whole(problems)} problems, ${whole(samples / problems)} samples of each `,
    `(${whole(graded)} graded answers in all), drawn at temperature ${how.temperature}, top-p ${how.top_p}, `,
    how.top_k ? `top-k ${how.top_k}, ` : "", `at most ${whole(how.max_new_tokens)} tokens. Training seed ${run.seed}.`);
}

const counted = () => h("details", { class: "block", open: true },
  h("summary", null, "How these were counted"),
  h("div", { class: "body" },
    note("In brackets: 95 % intervals. They describe the spread between problems and say nothing about another training seed. ",
      "Accuracy is the mean over problems of the share of right samples (avg@n); pass@k is the unbiased estimate that one of k samples ",
      "is right, from the same samples; both intervals draw the problems again with replacement (bootstrap, 2,000 times). ",
      "\u201cEver solved\u201d counts problems with a right sample among all of theirs (Wilson interval). ",
      "Tokens: mean length of a sample; cut: samples that hit the length limit. ",
      "Unscored samples, which the grader could not decide, are in neither numerator nor denominator. ",
      "A bootstrap interval without width says that all problems gave the same, not that it is certain.")));

function differences(runs, across) {
  const rows = (list) => table(["weights", ">points [95 %]", ">problems", "reading"], list.map(([more, less, ...e]) =>
    [h("td", { class: "name" }, `${more} \u2212 ${less}`), [estimate(e)], e[3], e[1] > 0 ? "higher" : e[2] < 0 ? "lower" : "not told apart"]));
  const within = runs.flatMap((run) => run.differences.map(([more, less, ...e]) => [named(runs, run, more), less, ...e]));
  if (!within.length && !across.length) return null;
  const help = note("Paired by problem, so the spread between problems cancels; intervals by bootstrap over problems. ",
    "\u201cNot told apart\u201d: the interval holds zero. Each interval stands alone; among many pairs some exclude zero by chance.");
  return [h("h3", null, "Differences in accuracy"), across.length ? rows(across) : null,
    !within.length ? null : !many(runs) ? rows(within)
      : h("details", { class: "block" }, h("summary", null, "Within each run"), h("div", { class: "body" }, rows(within))), help];
}

function passCurves(rows, several) {
  const lines = rows.map(({ run, e, stroke }) => ({ label: several ? `${run.name}: ${e.label}` : e.label, color: stroke, dots: true,
    points: (e.pass || []).map(([k, v, low, high, n]) => [k, 100 * v, 100 * low, 100 * high, n]) })).filter((line) => line.points.length);
  const figure = chart({ title: "pass@k", help: "unbiased, over held-out problems, logarithmic in k; bands are 95 % bootstrap intervals over problems",
    lines, logX: true, unit: " %", xName: "k =", from0: true, wide: true });
  return figure && [h("h3", null, "What more samples would solve"), legend(lines), h("div", { class: "big" }, figure)];
}

function ablations(runs) {
  return runs.map((run) => {
    if (!run.ablations.length) return null;
    const measured = run.ablations.filter((row) => row.accuracy), top = Math.max(...measured.map((row) => row.accuracy[2])) || 1;
    const covered = (e) => [estimate(e), ` of ${whole(e[3])}`];
    return [h("h3", null, named(runs, run, "What of the SFT target does the work")),
      table(["SFT on", ">examples", ">loss tokens", ">accuracy %", `0 to ${short(100 * top)} %`, ">ever solved %", "settings"], run.ablations.map((row) => [
        row.name, whole(row.examples), whole(row.loss_tokens), ...(row.accuracy
          ? [[estimate(row.accuracy)], [whisker(row.accuracy, top, "var(--c2)")], [covered(row.coverage)]] : ["", "", ""]),
        h("td", { class: "code" }, row.settings.join("  ") || "the recipe")])),
      note("SFT and evaluation repeated on this run's own records (intfast.ablate), one seed, before RL; ",
        measured.length ? `${short(measured[0].samples)} samples of each held-out problem; counted as above.` : "not evaluated.")];
  });
}

// --- training ----------------------------------------------------------------------------------

function training(runs) {
  const isRl = (stage) => stage.endsWith("_rl"), isSft = (stage) => !isRl(stage) && runs.some((run) =>
    run.curves[stage] && run.curves[stage].series.nll_mean);
  const blocks = [["Reinforcement learning", isRl], ["Fine-tuning", isSft]].map(([title, wanted]) => {
    const { figures, window, legend: names } = curves(runs, wanted);
    return figures.length ? [h("h3", null, title), names, window > 1 ? note(
      `Faint: every step. Line: centred mean of up to ${window} steps. Touch or point at a chart for the values of a step.`) : null,
    h("div", { class: "charts" }, figures)] : null;
  });
  const during = accuracyDuring(runs);
  const empty = !during && blocks.every((block) => !block);
  return section("training", "Training", empty ? note("No training step yet.") : [during, blocks], texts(runs));
}

function accuracyDuring(runs) {
  const lines = runs.flatMap((run, r) => {
    const stages = [...new Set(run.evaluations.filter((e) => e.name.includes("@")).map((e) => e.name.split("@")[0]))];
    return stages.map((stage) => ({ label: named(runs, run, stage), color: lineColor(runs, r, stage), dots: true,
      points: run.evaluations.filter((e) => e.name.startsWith(`${stage}@`) && e.accuracy)
        .map((e) => [Number(e.name.split("@")[1]), ...e.accuracy.slice(0, 3).map((v) => 100 * v), e.problems]) }));
  });
  const figure = chart({ title: "Held-out accuracy during RL", help: "same problems and counting as the results; bands are 95 % intervals", lines, unit: " %", wide: true });
  return figure && [legend(lines), h("div", { class: "big" }, figure)];
}

// --- interventions, in numbers -----------------------------------------------------------------

function funnel(runs, pick) {
  return runs.map((run, r) => {
    const found = run.intervention;
    if (!found.candidates) return null;
    const cost = found.cost;
    return [many(runs) ? h("h3", null, run.name) : null,
      h("p", null, `${whole(found.candidates)} candidate interventions for ${whole(found.attempts)} wrong attempts at ${whole(found.problems)} problems; `,
        `${whole(found.unlocked)} problems have a kept one`, cost ? `, at ${whole(cost)} generated tokens each (verification and continuations)` : "", ". ",
        "A candidate stops at the first gate that it does not pass."),
      table(["gate", ">candidates", ">%", "share", "meaning"], found.gates.filter(([, count]) => count).map(([gate, count, text]) => [
        h("button", { onclick: () => pick(r, gate) }, gate), whole(count), percent(count / found.candidates),
        h("span", { class: "meter" }, h("i", { style: { width: `${100 * count / found.candidates}%` } })), text])),
      found.starts.length ? [
        h("h3", null, "Does the intervention help the model go on?"),
        table(["continued from", ">accuracy %", ">attempts with a right one %", ">problems with a right one %", ">continuations"],
          [...alone(found.alone), ...found.starts.map((row) => [row.start, [estimate(row.accuracy, 2)],
            [estimate(row.attempt_coverage), ` of ${whole(row.attempt_coverage[3])}`],
            [estimate(row.problem_coverage), ` of ${whole(row.problem_coverage[3])}`],
            `${whole(row.num)} (${short(row.each)} each)`])]),
        note("Of the attempts whose intervention came to this point. Accuracy: mean over problems, 95 % bootstrap interval over problems; ",
          found.first ? `where continuations end early, of the first ${found.first} of each attempt; ` : "",
          "shares of attempts and problems: 95 % Wilson intervals (those of attempts take attempts at one problem as independent). ",
          "The other starts are the model without an intervention.")] : null, places(found)];
  });
}

// The attempts themselves as a row of that table.
function alone(found) {
  if (!found) return [];
  const list = (e) => [e.value, e.low, e.high, e.num_problems];
  return [["the problem alone: the attempts", found.zero_by_selection ? "0 by selection" : [estimate(list(found.accuracy), 2)], "",
    [estimate(list(found.problem_coverage)), ` of ${whole(found.problem_coverage.num_problems)}`],
    `${whole(found.attempts)} (${short(found.per_problem)} a problem)`]];
}

// Where in the attempts the located steps lie: ten bars, one per tenth.
function places(found) {
  const total = found.places.reduce((a, b) => a + b, 0), top = max(found.places);
  if (!total) return null;
  const bars = found.places.map((count, i) => [
    s("rect", { x: 10 + i * 34, y: 80 - 66 * count / top, width: 28, height: 66 * count / top, style: { fill: "var(--c2)" } }),
    s("text", { x: 24 + i * 34, y: 75 - 66 * count / top, "text-anchor": "middle" }, count || "")]);
  return [h("h3", null, "Where the first wrong step was found"), h("div", { class: "charts" }, h("figure", null,
    h("figcaption", null, `${whole(total)} located steps by their place among the steps of the attempt, in tenths; the location is the model's own`),
    s("svg", { viewBox: "0 0 360 100", role: "img", "aria-label": `located steps by tenth: ${found.places.join(", ")}` }, bars,
      s("line", { class: "grid", x1: 8, x2: 350, y1: 80.5, y2: 80.5 }), s("text", { x: 10, y: 95 }, "first steps"),
      s("text", { x: 344, y: 95, "text-anchor": "end" }, "last steps"))))];
}

function texts(runs) {
  return runs.map((run) => {
    if (!run.texts.length) return null;
    const names = Object.keys(run.texts[0][3]);
    const nats = (e) => [e[0].toFixed(3), " ", h("span", { class: "ci" }, `[${e[1].toFixed(3)}, ${e[2].toFixed(3)}]`)];
    return [h("h3", null, named(runs, run, "How likely the texts are, before and after SFT")),
      table(["text", ">texts", ">tokens", ...names.map((n) => `>NLL, ${n}`), ...names.map((n) => `>entropy, ${n}`)],
        run.texts.map(([kind, num, count, nll, entropy]) => [kind, whole(num), whole(count),
          ...names.map((n) => [nats(nll[n])]), ...names.map((n) => entropy[n].toFixed(3))])),
      note("Nats per token, mean over texts, 95 % bootstrap interval over texts; \u201cintervention\u201d rows measure the replacement step alone.")];
  });
}

// --- time, grading, settings -------------------------------------------------------------------

function time(runs) {
  const blocks = runs.map((run) => {
    const total = run.seconds.reduce((sum, [, phases]) => sum + add(phases), 0);
    if (!total) return null;
    const names = [...new Set(run.seconds.flatMap(([, phases]) => Object.keys(phases)))]
      .sort((a, b) => spent(run, b) - spent(run, a));
    const paint = (name) => color((names.indexOf(name) + 2) % 8);
    return [many(runs) ? h("h3", null, run.name) : null,
      h("p", null, `${duration(total)} inside the phases below, interruptions not counted.`),
      h("div", { class: "legend" }, names.map((name) => h("span", null, h("i", { class: "swatch", style: { background: paint(name) } }),
        `${name} ${percent(spent(run, name) / total)} %`))),
      table(["stage", ">time", ">%", "split", ...names.map((name) => `>${name} s`)],
        [["all", Object.fromEntries(names.map((name) => [name, spent(run, name)]))], ...run.seconds].map(([stage, phases]) => [
          stage, duration(add(phases)), percent(add(phases) / total),
          h("div", { class: "bar" }, names.map((name) => phases[name] ? h("i", { title: `${name}: ${duration(phases[name])}`,
            style: { width: `${100 * phases[name] / add(phases)}%`, background: paint(name) } }) : null)),
          ...names.map((name) => (phases[name] ? phases[name].toFixed(1) : ""))])),
      run.generated.length ? [h("h3", null, "Tokens generated"),
        table(["for", ">tokens"], run.generated.filter(([, count]) => count).map(([name, count]) => [name, whole(count)])),
        note("Those that make training data or choose problems, and the rollouts of RL. Evaluations and the continuations without intervention only measure, and are not in it.")] : null];
  });
  return section("time", "Where the time and the tokens went", blocks.some(Boolean) ? blocks : note("No row with seconds yet."));
}
const add = (phases) => Object.values(phases).reduce((a, b) => a + b, 0);
const spent = (run, name) => run.seconds.reduce((sum, [, phases]) => sum + (phases[name] || 0), 0);
function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(1)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function grading(runs) {
  const blocks = runs.map((run) => {
    const reasons = [...new Set(run.outcomes.flatMap(([, counts]) => Object.keys(counts)))];
    if (!reasons.length) return null;
    return [many(runs) ? h("h3", null, run.name) : null, table(["what was graded", ">answers", ...reasons.map((reason) => `>${reason}`)],
      run.outcomes.map(([what, counts]) => [what, whole(add(counts)), ...reasons.map((reason) => (counts[reason] ? whole(counts[reason]) : ""))]))];
  });
  return section("grading", "Grading", note("Every graded answer by the reason of its grade. A time-out is not counted as wrong: it is unscored."),
    blocks.some(Boolean) ? blocks : note("Nothing is graded yet."));
}

function settings(runs) {
  const keys = [...new Set(runs.flatMap((run) => run.settings.map(([key]) => key)))];
  const of = (run, key) => run.settings.find(([name]) => name === key);
  const rows = keys.map((key) => {
    const standard = runs.map((run) => of(run, key)).find(Boolean)[1];
    const values = runs.map((run) => (of(run, key) || [key, standard, standard])[2]);
    const differ = new Set(values).size > 1;
    return [h("td", { class: "code" }, key), h("td", { class: "code muted" }, standard),
      ...values.map((value) => h("td", { class: differ ? "code changed" : "code" }, value))];
  });
  return section("settings", "Settings and versions",
    h("h3", null, "Settings that differ from the defaults"),
    table(["setting", "default", ...runs.map((run) => (many(runs) ? run.name : "this run"))], rows, "plain"),
    many(runs) ? note("In colour: settings in which these runs differ.") : null,
    h("h3", null, "Versions, hardware, data"), versions(runs));
}

function versions(runs) {
  const flat = (value, path = "") => Object.entries(value || {}).flatMap(([key, v]) =>
    v && typeof v === "object" ? flat(v, `${path}${key}.`) : [[path + key, v]]);
  const tables = runs.map((run) => new Map(flat(run.manifest)));
  const keys = [...new Set(tables.flatMap((found) => [...found.keys()]))];
  if (!keys.length) return note("No manifest.json.");
  const text = (value) => (value === null || value === undefined ? "unknown" : String(value));
  return table(["", ...runs.map((run) => run.name)], keys.map((key) => [h("td", { class: "code" }, key),
    ...tables.map((found) => h("td", { class: new Set(tables.map((t) => t.get(key))).size > 1 ? "code changed" : "code" }, text(found.get(key))))]), "plain");
}
