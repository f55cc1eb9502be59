"""The page's training curves, and what SFT did to the likelihood of texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from intfast.labels import Weights, label
from intfast.study.analysis import text_table
from intfast.study.charts import Line, Point, chart, legend, percent
from intfast.study.page_data import RunData, Section
from intfast.study.tables import element, note

_TABLE = """\
reward | Reward | mean over the scored rollouts of a step, on training problems
zero_advantage | Zero-advantage share | of a step's groups: all rewards equal, nothing to learn
all_wrong | All-wrong groups | share of a step's groups without a right rollout
all_right | All-right groups | share of a step's groups without a wrong rollout
length | Length | mean tokens of a rollout
truncated | Truncated | share of rollouts that hit the length limit
unscored | Unscored | share of rollouts that the grader could not decide
entropy_mean | Entropy | of the policy, nats, mean over the loss tokens
entropy_sampled | Entropy while sampling | of the policy, nats, mean over the sampled tokens
nll_mean | Negative log-likelihood | nats per loss token, on the examples of the step
loss | Loss | as minimised: the sum over tokens by its divisor; an RL loss is no measure of progress
grad_norm | Gradient norm | before clipping
lr | Learning rate | after warm-up and schedule
kl_mean | Divergence from the start | estimate, nats per loss token
ratio_mean | Ratio to the old policy | mean over the loss tokens
clip_low_mean | Clipped below | share of the loss tokens
clip_high_mean | Clipped above | share of the loss tokens
sampler_diff_mean | Sampler mismatch | mean |log-prob of the trainer - of the sampler|, nats
sampler_diff_max | Largest sampler mismatch | nats, over the loss tokens of a step
sampler_ratio_max | Largest sampler ratio | trainer by sampler, before any truncation
corrected_mean | Corrected | share of the loss tokens whose sampler ratio was truncated or masked
updates | Updates | optimizer steps of a rollout step; 0 where no group had variance
skipped | Skipped updates | gradient not finite
"""
CURVES = {name: text for name, *text in (line.split(" | ") for line in _TABLE.splitlines())}
"""Name in a row of metrics.jsonl -> title and description of its chart, as the page has them."""
NOT_FROM_ZERO = ("loss", "kl_mean", "ratio_mean")
RARE = ("skipped", "unscored")
SMOOTH_FROM = 20
"""Steps from which on a curve is drawn as a centred mean."""
LIKELY = (
    "Nats per token, mean over texts, 95 % bootstrap interval over texts; p = exp(-NLL); "
    "\u201cintervention\u201d rows measure the replacement step alone."
)


def training(runs: Sequence[RunData]) -> Section:
    """Accuracy during RL, the curves of RL and SFT, the likelihood of texts."""
    parts = _accuracy_during(runs)
    for title, rl in (("Reinforcement learning", True), ("Fine-tuning", False)):
        parts += _curves(title, runs, rl)
    parts = parts or [note("No training step yet.")]
    for run in runs:
        if texts := run.analysis.get("texts"):
            title = f"{run.prefix}How likely the texts are, before and after SFT"
            parts += [element("h3", title), text_table(texts), note(LIKELY)]
    return Section("training", "Training", "Training", parts)


def _accuracy_during(runs: Sequence[RunData]) -> list[Any]:
    lines = []
    for run in runs:
        points: dict[str, list[Point]] = defaultdict(list)
        for key, evaluation in run.evaluations.items():
            weights = Weights.parse(key)
            if weights.step is not None and evaluation.accuracies():
                accuracy = evaluation.summary([]).accuracy
                points[weights.stage].append(percent(weights.step, accuracy))
        lines += [
            Line(run.prefix + label(stage), run.colors[stage], found, dots=True)
            for stage, found in points.items()
        ]
    about = "same problems and counting as the results; bands are 95 % intervals"
    figure = chart("Held-out accuracy during RL", about, lines, unit=" %", wide=True)
    return [legend(lines), figure] if figure else []


def _curves(title: str, runs: Sequence[RunData], rl: bool) -> list[Any]:
    """Charts of RL, or of the other stages, one line per run and stage."""
    sources = []
    for run in runs:
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in run.metrics:
            # Only training has a gradient, and only RL a reward.
            is_training = "grad_norm" in row or "nll_mean" in row or "reward" in row
            if is_training and Weights.parse(row["stage"]).rl == rl:
                rows[row["stage"]].append(row)
        sources += [(run.prefix + label(s), run.colors[s], found) for s, found in rows.items()]
    found = {key: [_line(*source, key) for source in sources] for key in CURVES}
    figures = figures_of(found)
    if not figures:
        return []
    window = max(line.window for lines in found.values() for line in lines)
    smooth = f"Faint: every step. Line: centred mean of up to {window} steps. "
    about = f"{smooth if window > 1 else ''}Point at a chart for the values of a step."
    return [element("h3", title), legend(sources), note(about), figures]


def figures_of(found: Mapping[str, Sequence[Line]], reward: str = "") -> Markup | None:
    """Charts of named curves; reward: another description of it."""
    figures = []
    for key, lines in found.items():
        title, about = CURVES[key]
        about = reward if reward and key == "reward" else about
        # What hardly ever happens is shown when it does.
        if key not in RARE or any(p.y for line in lines for p in line.points):
            kept = [line for line in lines if line.points]
            figures.append(chart(title, about, kept, from_zero=key not in NOT_FROM_ZERO))
    return element("div", figures, class_="charts") if any(figures) else None


def _line(text: str, place: int, rows: Sequence[dict[str, Any]], key: str) -> Line:
    points = [
        Point(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)
    ]
    # Where most steps have no value, a mean of neighbours would hide which have.
    sparse = len(points) < 0.9 * len(rows)
    is_smooth = len(points) >= SMOOTH_FROM and not sparse
    window = 2 * round(len(points) / 40) + 1 if is_smooth else 1
    return Line(text, place, points, window, dots=sparse)
