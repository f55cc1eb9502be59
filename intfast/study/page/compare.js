"use strict";
// The page of a comparison: arms as rows, seeds as dots.
const FAMILIES = { base: 0, rl: 1, reference: 2, int: 3, reflection: 4, hint_rl: 5, fixed_hint_rl: 6, hint: 5, fixed_hint: 6, rft: 1, star: 5, prefix: 6 };
const DASHED = ["rft", "star", "prefix"];
const armColor = (arm) => arm.color || color(FAMILIES[arm.family] ?? 7);
const armLine = (arm, points) => ({ label: arm.label, color: armColor(arm), dash: DASHED.includes(arm.family) ? "5 3" : null, points });
const isRl = (arm) => arm.accuracy_tokens !== null;
const seedDots = (pairs) => pairs.map(([seed, value]) => [`seed ${seed}: ${percent(value)} %`, value]);
const reading = (e) => (!e ? "" : e[1] > 0 ? "ahead" : e[2] < 0 ? "behind" : "not told apart");

function compareHeader(about) {
  const { manifest } = about, seeds = about.seeds.join(", ");
  const shown = about.arms.find((arm) => arm.accuracy);
  return h("header", null, h("h1", null, about.name),
    h("p", { class: "muted" }, `${about.arms.length} arms of a comparison, from `, h("code", null, about.model),
      manifest.num_parameters ? `, ${whole(manifest.num_parameters)} parameters` : "", manifest.device ? `, on ${manifest.device}` : "",
      `, with ${about.seeds.length === 1 ? "seed" : "seeds"} ${seeds}.`),
    shown ? h("p", null, `Measured: ${whole(shown.accuracy[3])} held-out problems, ${whole(about.samples)} samples of each and seed, drawn at temperature `,
      `${about.sampling.temperature}, top-p ${about.sampling.top_p}, ${about.sampling.top_k ? `top-k ${about.sampling.top_k}, ` : ""}at most ${whole(about.sampling.max_new_tokens)} tokens.`) : null);
}

// What of it is ahead, behind, or neither, in words.
function verdicts(about, key) {
  const judged = about.arms.filter((arm) => arm[key]);
  const named = (word) => judged.filter((arm) => reading(arm[key]) === word).map((arm) => arm.label);
  const part = (text, labels) => (labels.length ? h("li", null, h("b", null, text), `: ${labels.join("; ")}.`) : null);
  return judged.length ? h("ul", { class: "verdicts" }, part("clearly ahead of", named("ahead")), part("not told apart from", named("not told apart")), part("behind", named("behind"))) : null;
}

function armTable(about, arms, keys, more) {
  const top = Math.max(...arms.map((arm) => (arm[keys.accuracy] ? arm[keys.accuracy][2] : 0))) || 1;
  const ks = keys.pass ? about.ks.filter((k) => k > 1) : [];
  const pass = (arm, k) => { const found = arm.pass.find((p) => p[0] === k); return found && found.slice(1); };
  const ours = about.compared_with ? about.arms.find((arm) => arm.name === about.compared_with).label : "";
  const compared = arms.some((arm) => arm[keys.ahead]);
  return table([about.rows || "arm", ">accuracy %", `0 to ${short(100 * top)} %, dots: seeds`, ...ks.map((k) => `>pass@${k} %`),
    ...(compared ? [`>${ours} ahead by, points`, `${ours} is`] : []), ...more.map(([name]) => name)],
  arms.map((arm) => [h("td", { class: "name" }, dot(armColor(arm)), arm.label,
    arm.without_examples && arm.without_examples.length ? h("div", { class: "note" }, `no example with seed ${arm.without_examples.join(", ")}`) : null),
  [estimate(arm[keys.accuracy])], [whisker(arm[keys.accuracy], top, armColor(arm), seedDots(arm[keys.seeds]))],
  ...ks.map((k) => [estimate(pass(arm, k))]),
  ...(compared ? [[estimate(arm[keys.ahead])], reading(arm[keys.ahead])] : []),
  ...more.map(([, value]) => value(arm))]), "arms");
}

function compareResults(about) {
  const { arms } = about, over = about.seeds.length > 1 ? "seeds and problems" : "problems";
  const ours = about.compared_with ? about.arms.find((arm) => arm.name === about.compared_with).label : "";
  const bySeed = (key) => (arm) => arm[key].map(([, value]) => percent(value)).join("  ");
  const tokens = arms.filter(isRl);
  const steps = arms.find(isRl);
  return [section("results", "At equal RL steps",
    ours ? [h("p", null, h("b", null, `${ours} is, in accuracy at equal steps,`)), verdicts(about, "ahead")] : null,
    armTable(about, arms, { accuracy: "accuracy", seeds: "by_seed", ahead: "ahead", pass: true },
      [[`>by seed ${about.seeds.join(", ")}`, bySeed("by_seed")], [">SFT examples", (arm) => (arm.examples ? whole(arm.examples) : "")]]),
    h("details", { class: "block", open: true }, h("summary", null, "How these were counted"), h("div", { class: "body" }, note(
      `In brackets: 95 % intervals, by drawing ${over} again with replacement (bootstrap, 2,000 times)`, about.seeds.length > 1 ? "; of few seeds an interval tells little more than their spread. " : "; they say nothing of another seed. ",
      "Accuracy is the mean over seeds and problems of the share of right samples; pass@k the unbiased estimate that one of k samples is right. ",
      "Unscored samples, which the grader could not decide, are in neither numerator nor denominator. ",
      ours ? `\u201c${ours} ahead by\u201d is its accuracy minus that of the arm, paired by seed and problem; \u201cnot told apart\u201d: the interval holds zero. Each interval stands alone; among many some exclude zero by chance. ` : "",
      "Arms without RL have no RL steps; those after RL had ", steps ? `${whole(about.steps)}. ` : "none. ",
      "An interval without width says that all problems gave the same, not that it is certain."))),
    passFigures(arms)),
  tokens.length ? section("tokens", "At equal generated tokens",
    note("RL of the others goes on until they have generated as many tokens as ", ours || "InT + RL", ", with attempts, verifications, continuations, rewrites, hints and rollouts counted; evaluations only measure and are not in it."),
    ours ? [h("p", null, h("b", null, `${ours} is, in accuracy at equal tokens,`)), verdicts(about, "ahead_tokens")] : null,
    armTable(about, tokens, { accuracy: "accuracy_tokens", seeds: "by_seed_tokens", ahead: "ahead_tokens" },
      [[`>by seed ${about.seeds.join(", ")}`, bySeed("by_seed_tokens")], [">RL steps", (arm) => arm.steps[1].toFixed(0)]]),
    tokenTable(tokens)) : null];
}

function passFigures(arms) {
  const lines = (wanted) => arms.filter(wanted).map((arm) => ({ ...armLine(arm, arm.pass.map(([k, v, low, high, n]) => [k, 100 * v, 100 * low, 100 * high, n])), dots: true })).filter((line) => line.points.length);
  const base = (arm) => arm.name === "base";
  const block = (title, wanted) => {
    const drawn = lines(wanted);
    const figure = drawn.length > 1 && chart({ title, help: "unbiased, mean over seeds, logarithmic in k; bands: 95 % intervals", lines: drawn, logX: true, unit: " %", xName: "k =", from0: true });
    return figure ? h("div", null, figure, legend(drawn)) : null;
  };
  const figures = [block("pass@k before RL", (arm) => base(arm) || !isRl(arm)), block("pass@k after RL, at equal steps", (arm) => base(arm) || isRl(arm))].filter(Boolean);
  return figures.length ? [h("h3", null, "What more samples would solve"), h("div", { class: "charts two" }, figures)] : null;
}

const PURPOSES = [["attempts", "attempts"], ["verify", "verification"], ["continue", "continuations"], ["guided", "rewrites and hints"]];

function tokenTable(arms) {
  const parts = (arm) => [...PURPOSES.map(([key]) => arm.collection[key] || 0), arm.rollouts[1]];
  const sum = (xs) => xs.reduce((a, b) => a + b, 0), top = Math.max(...arms.map((arm) => sum(parts(arm)))) || 1;
  const names = [...PURPOSES.map(([, text]) => text), "rollouts of RL"], paint = (i) => color([0, 4, 2, 5, 3][i]);
  return [h("h3", null, "Tokens by purpose"), h("div", { class: "legend" }, names.map((text, i) => h("span", null, h("i", { class: "swatch", style: { background: paint(i) } }), text))),
    table(["arm", ">tokens", "split", ...names.map((text) => `>${text}`), ">rollouts at equal steps"], arms.map((arm) => [
      h("td", { class: "name" }, dot(armColor(arm)), arm.label), whole(sum(parts(arm))),
      h("div", { class: "bar" }, parts(arm).map((n, i) => (n ? h("i", { title: `${names[i]}: ${whole(n)}`, style: { width: `${100 * n / top}%`, background: paint(i) } }) : null))),
      ...parts(arm).map((n) => (n ? whole(n) : "")), whole(arm.rollouts[0])]), "arms"),
    note("Means of seeds. What an arm collected is the same at equal steps; only the rollouts grow.")];
}

function compareTraining(about) {
  const trained = about.arms.filter((arm) => arm.training);
  const lined = about.arms.filter((arm) => about.curves[arm.name]);
  if (!trained.length) return section("training", "Training", note("No arm with RL."));
  const figures = CURVES.map(([key, title, help, from0]) => {
    const lines = lined.filter((arm) => (about.curves[arm.name][key] || []).length).map((arm) => armLine(arm, about.curves[arm.name][key]));
    if (!lines.length || (key === "truncated" && lines.every((line) => line.points.every((p) => !p[1])))) return null;
    return chart({ title, help: key === "reward" ? "mean of a step's rollouts without a hint, on training problems" : help, lines, from0 });
  }).filter(Boolean);
  return section("training", "Training",
    note("Apart from the results, because it is measured on the training problems: it says nothing of others. Last quarter of the steps up to ", whole(about.steps), "; means of seeds."),
    table(["arm", ">training reward", ">zero-advantage share of the groups"], trained.map((arm) => [
      h("td", { class: "name" }, dot(armColor(arm)), arm.label), arm.training.reward.toFixed(3), arm.training.zero_advantage.toFixed(3)]), "arms"),
    h("h3", null, "Step by step"), legend(lined.map((arm) => armLine(arm, []))),
    note("Mean over the seeds; the band spans them. Where RL goes on for equal tokens, up to the last step that every seed has."),
    h("div", { class: "charts" }, figures));
}

function compareSettings(about) {
  const given = Object.entries(about.given), label = (name) => (about.arms.find((arm) => arm.name === name) || { label: name }).label;
  const link = (seed, run, state) => [h("td", { class: "code" }, state === "finished"
    ? h("a", { href: `seed-${encodeURIComponent(seed)}/${encodeURIComponent(run)}/report.html` }, `seed-${seed}/${run}`) : `seed-${seed}/${run}`), state];
  return section("settings", "Settings, run folders, versions",
    given.length ? [h("h3", null, "Given to single arms"), table(["arm", "settings"], given.map(([name, words]) => [label(name), h("td", { class: "code" }, words.join("  "))]), "plain")] : null,
    h("h3", null, "What makes each arm"), note("Settings in which a run differs from ", h("code", null, about.standard), ", with the first seed; ", h("code", null, "rl.until_tokens"), " makes it go on for equal tokens."),
    table(["run", "rows", "settings"], about.own.map(([run, rows, words]) => [h("td", { class: "code" }, run), rows.map(label).join("; "), h("td", { class: "code" }, words.join("  ") || "none")]), "plain"),
    h("details", { class: "block" }, h("summary", null, `What all share: settings of ${about.standard} that differ from the defaults`),
      h("div", { class: "body" }, table(["setting", "default", "here"], about.settings.map((row) => row.map((text) => h("td", { class: "code" }, text))), "plain"))),
    h("h3", null, "Run folders"), note("Each is an ordinary run; a link opens its own page where it lies beside this one."),
    h("details", { class: "block", open: about.folders.length < 10 }, h("summary", null, `${about.folders.length} folders`), h("div", { class: "body" }, table(["folder", "state"], about.folders.map((row) => link(...row)), "plain"))),
    h("h3", null, "Versions, hardware, data"), versions([about]));
}

// --- runs that differ in their seed alone ------------------------------------------------------

function pooledResults(groups, ks) {
  return (groups || []).map((group) => {
    const arms = group.rows.map((row, i) => ({ ...row, color: color(STAGES.includes(row.name) ? STAGES.indexOf(row.name) : i) }));
    const rows = group.differences.map(([more, less, ...e]) => [h("td", { class: "name" }, `${more} \u2212 ${less}`), [estimate(e)], e[3], e[1] > 0 ? "higher" : e[2] < 0 ? "lower" : "not told apart"]);
    return [h("h3", null, `Over seeds ${group.seeds.join(", ")}`),
      note(`${group.names.join(", ")} differ in their seed alone. Means over seeds and problems; 95 % intervals by drawing both again with replacement (bootstrap, 2,000 times); `,
        "of few seeds they tell little more than their spread. Differences are paired by seed and problem."),
      armTable({ ks, arms, rows: "weights", compared_with: null }, arms, { accuracy: "accuracy", seeds: "by_seed", pass: true },
        [[">by seed", (arm) => arm.by_seed.map(([, value]) => percent(value)).join("  ")]]),
      rows.length ? table(["weights", ">points [95 %]", ">problems", "reading"], rows) : null];
  });
}
