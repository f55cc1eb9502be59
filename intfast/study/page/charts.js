"use strict";
const LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 26;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= raw * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

// One chart. lines: {label, color, points: [[x, y, low?, high?]], dots?}; a point without y is a gap.
function chart({ title, help, lines, logX, unit = "", xName = "step", from0, wide }) {
  const [W, H] = wide && innerWidth > 700 ? [640, 270] : [360, 190];
  const points = lines.flatMap((line) => line.points).filter((p) => p[1] !== null && p[1] !== undefined);
  if (!points.length) return null;
  const xs = points.map((p) => p[0]);
  const ys = points.flatMap((p) => [p[1], p[2] ?? p[1], p[3] ?? p[1]]);
  const place = logX ? Math.log2 : (x) => x;
  let [x0, x1] = [place(min(xs)), place(max(xs))];
  let [y0, y1] = [from0 ? Math.min(0, min(ys)) : min(ys), max(ys)];
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 0.1; y1 += pad; if (y0 !== 0) y0 -= pad; }
  const X = (x) => LEFT + (place(x) - x0) / (x1 - x0) * (W - LEFT - RIGHT);
  const Y = (y) => H - BOTTOM - (y - y0) / (y1 - y0) * (H - TOP - BOTTOM);
  const marksX = logX ? [...new Set(xs)].sort((a, b) => a - b)
    : ticks(x0, x1, 5).filter((v) => v === Math.round(v));
  const every = Math.ceil(marksX.length / 8);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title },
    ticks(y0, y1, 4).map((v) => [
      s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: Y(v), y2: Y(v) }),
      s("text", { x: LEFT - 6, y: Y(v) + 4, "text-anchor": "end" }, short(v) + unit)]),
    marksX.filter((_, i) => i % every === 0).map((v) =>
      s("text", { x: X(v), y: H - 10, "text-anchor": "middle" }, short(v))),
    lines.map((line) => drawLine(line, X, Y)));
  const readout = h("div", { class: "readout", "aria-live": "off" });
  const cursor = s("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const all = [...new Set(xs)].sort((a, b) => a - b);
  const show = (event) => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W;
    const x = all.reduce((best, v) => Math.abs(X(v) - at) < Math.abs(X(best) - at) ? v : best, all[0]);
    fill(cursor, { x1: X(x), x2: X(x), visibility: "visible" }, []);
    const cells = lines.map((line) => {
      const p = line.points.find((q) => q[0] === x);
      if (!p || p[1] === null || p[1] === undefined) return null;
      const range = p[2] !== undefined && p[2] !== null ? ` [${short(p[2])}, ${short(p[3])}]` : "";
      const of = p[4] ? ` of ${p[4]} problems` : "";
      return [h("i", { class: "dot", style: { background: line.color } }), `${short(p[1])}${unit}${range}${of}  `];
    });
    readout.replaceChildren(`${xName} ${x}:  `, ...cells.flat().filter(Boolean));
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  return h("figure", null, h("figcaption", null, h("b", null, title), help), svg, readout);
}

// Math.min(...xs) overflows the stack on long runs.
const min = (xs) => xs.reduce((a, b) => (a < b ? a : b));
const max = (xs) => xs.reduce((a, b) => (a > b ? a : b));

function drawLine(line, X, Y) {
  const path = (points, pick) => {
    let pen = "M", d = "";
    for (const p of points) {
      const y = pick(p);
      if (y === null || y === undefined) { pen = "M"; continue; }
      d += `${pen}${X(p[0]).toFixed(1)} ${Y(y).toFixed(1)}`;
      pen = "L";
    }
    return d;
  };
  const { points, color: stroke } = line;
  const drawn = [];
  const ranged = points.filter((p) => p[2] !== undefined && p[2] !== null);
  if (ranged.length > 1) {
    const back = [...ranged].reverse();
    drawn.push(s("path", { class: "band", style: { fill: stroke },
      d: path(ranged, (p) => p[3]) + path(back, (p) => p[2]).replace("M", "L") + "Z" }));
  }
  const smooth = line.window > 1 ? rolling(points, line.window) : points;
  if (line.window > 1) drawn.push(s("path", { class: "raw", style: { stroke }, d: path(points, (p) => p[1]) }));
  drawn.push(s("path", { class: "line", style: { stroke }, d: path(smooth, (p) => p[1]),
    "stroke-dasharray": line.dash || null }));
  if (line.dots || points.filter((p) => p[1] !== null).length < 2) {
    for (const p of points) if (p[1] !== null && p[1] !== undefined) drawn.push(s("circle", { cx: X(p[0]), cy: Y(p[1]), r: line.dots && points.length > 12 ? 2 : 3, style: { fill: stroke } }));
  }
  return drawn;
}

// Centred mean of `window` neighbours; gaps are left out of it.
function rolling(points, window) {
  const half = Math.floor(window / 2);
  return points.map((p, i) => {
    const near = points.slice(Math.max(0, i - half), i + half + 1).map((q) => q[1]).filter((y) => y !== null && y !== undefined);
    return [p[0], near.length ? near.reduce((a, b) => a + b, 0) / near.length : null];
  });
}

// A value with its interval on a common scale, for a table cell; dots: [[text, value]] under it.
function whisker(e, top, stroke, dots = []) {
  if (!e) return "";
  const X = (v) => 4 + v / (top || 1) * 152;
  return s("svg", { viewBox: `0 0 160 ${dots.length ? 20 : 16}`, style: { width: "8rem" }, "aria-hidden": "true" },
    s("line", { class: "grid", x1: 4, x2: 156, y1: 8, y2: 8 }),
    s("line", { x1: X(e[1]), x2: X(e[2]), y1: 8, y2: 8, style: { stroke, "stroke-width": 3 } }),
    s("circle", { cx: X(e[0]), cy: 8, r: 4.5, style: { fill: stroke } }),
    dots.map(([text, value]) => s("circle", { class: "seed", cx: X(value), cy: 16.5, r: 2.4 }, s("title", null, text))));
}

const CURVES = [
  ["reward", "Reward", "mean over the scored rollouts that a step drew, on training problems", true],
  ["zero_advantage", "Zero-advantage share", "share of a step's groups whose rollouts all got the same reward: they teach nothing", true],
  ["all_wrong", "All-wrong groups", "share of a step's groups without a right rollout", true],
  ["all_right", "All-right groups", "share of a step's groups without a wrong rollout", true],
  ["length", "Length", "mean tokens of a rollout", true],
  ["truncated", "Truncated", "share of rollouts that hit the length limit", true],
  ["unscored", "Unscored", "share of rollouts that the grader could not decide", true],
  ["entropy_mean", "Entropy", "of the policy, nats, mean over the loss tokens", true],
  ["entropy_sampled", "Entropy while sampling", "of the policy, nats, mean over the sampled tokens", true],
  ["nll_mean", "Negative log-likelihood", "nats per loss token, on the examples of the step", true],
  ["loss", "Loss", "as minimised: the sum over tokens by its divisor; an RL loss is no measure of progress", false],
  ["grad_norm", "Gradient norm", "before clipping", true],
  ["lr", "Learning rate", "after warm-up and schedule", true],
  ["kl_mean", "Divergence from the start", "estimate, nats per loss token", false],
  ["ratio_mean", "Ratio to the old policy", "mean over the loss tokens", false],
  ["clip_low_mean", "Clipped below", "share of the loss tokens", true],
  ["clip_high_mean", "Clipped above", "share of the loss tokens", true],
  ["sampler_diff_mean", "Sampler mismatch", "mean |log-prob of the trainer - of the sampler|, nats", true],
  ["sampler_diff_max", "Largest sampler mismatch", "nats, over the loss tokens of a step", true],
  ["sampler_ratio_max", "Largest sampler ratio", "trainer by sampler, before any truncation", true],
  ["corrected_mean", "Corrected", "share of the loss tokens whose sampler ratio was truncated or masked", true],
  ["updates", "Updates", "optimizer steps of a rollout step; 0 where no group had variance", true],
  ["skipped", "Skipped updates", "gradient not finite", true],
];

// Charts of the stages that `wanted` accepts, one line per run and stage.
function curves(runs, wanted) {
  const sources = runs.flatMap((run, r) => Object.entries(run.curves)
    .filter(([stage]) => wanted(stage))
    .map(([stage, found]) => ({ found, label: runs.length > 1 ? `${run.name}: ${found.label}` : found.label,
      color: lineColor(runs, r, stage) })));
  let window = 1;
  const figures = CURVES.map(([key, title, help, from0]) => {
    const lines = sources.filter(({ found }) => found.series[key]).map(({ found, label, color: stroke }) => {
      const points = found.steps.map((x, i) => [x, found.series[key][i]]).filter((p) => p[1] !== null);
      // Where most steps have no value, a mean of neighbours would hide which have.
      const sparse = points.length < 0.9 * found.steps.length;
      const own = points.length >= 20 && !sparse ? 2 * Math.round(points.length / 40) + 1 : 1;
      window = Math.max(window, own);
      return { label, color: stroke, points, window: own, dots: sparse };
    });
    const quiet = ["skipped", "unscored"].includes(key) && lines.every((line) => line.points.every((p) => !p[1]));
    return quiet ? null : chart({ title, help, lines, from0 });
  }).filter(Boolean);
  return { figures, window, legend: legend(sources) };
}

// Weights keep their colour over the page; in one run the usual four have fixed ones.
const STAGES = ["base", "base_rl", "int", "int_rl"], painted = new Map();
function lineColor(runs, r, stage) {
  const name = stage.split("@")[0], key = `${r}/${name}`;
  if (runs.length === 1 && STAGES.includes(name)) return color(STAGES.indexOf(name));
  if (!painted.has(key)) painted.set(key, painted.size + (runs.length === 1 ? STAGES.length : 0));
  return color(painted.get(key));
}
const legend = (lines) => h("div", { class: "legend" }, lines.map((line) =>
  h("span", null, h("i", { class: "dot", style: { background: line.color } }), line.label)));
