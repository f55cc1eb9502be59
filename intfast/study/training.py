"""The page's training curves, and what SFT did to the likelihood of texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from intfast.labels import Weights, label
from intfast.study.analysis import text_table
from intfast.study.charts import Line, Point, chart, legend
from intfast.study.page_data import RunData, Section, colors, named
from intfast.study.tables import element, note


class Curve(NamedTuple):
    """A figure of the rows of metrics.jsonl, for a reader."""

    title: str
    about: str


_CURVES = """\
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
CURVES = {
    name: Curve(*text) for name, *text in (line.split(" | ") for line in _CURVES.splitlines())
}
"""Name in a row -> its chart, in the order of the page."""
NOT_FROM_ZERO = ("loss", "kl_mean", "ratio_mean")
SMOOTH_FROM = 20
"""Steps from which on a curve is drawn as a centred mean."""


def training(runs: Sequence[RunData]) -> Section:
    """Accuracy during RL, the curves of RL and SFT, the likelihood of texts."""
    parts = _accuracy_during(runs)
    parts += _block("Reinforcement learning", runs, lambda weights: weights.rl)
    parts += _block("Fine-tuning", runs, lambda weights: not weights.rl)
    parts = parts or [note("No training step yet.")]
    for run in runs:
        if texts := run.analysis.get("texts"):
            title = named(runs, run, "How likely the texts are, before and after SFT")
            about = (
                "Nats per token, mean over texts, 95 % bootstrap interval over texts; p = "
                "exp(-NLL); \u201cintervention\u201d rows measure the replacement step alone."
            )
            parts += [element("h3", title), text_table(texts), note(about)]
    return Section("training", "Training", "Training", parts)


def _accuracy_during(runs: Sequence[RunData]) -> list[Any]:
    painted = colors(runs)
    points: dict[tuple[str, str], list[Point]] = defaultdict(list)
    lines = []
    for run in runs:
        for key, evaluation in run.evaluations.items():
            weights = Weights.parse(key)
            if weights.step is not None and evaluation.accuracies():
                e = evaluation.summary([]).accuracy
                interval = (100 * e.value, 100 * e.low, 100 * e.high)
                place = (run.name, weights.stage)
                points[place].append(Point(weights.step, *interval, e.num_problems))
        for (name, stage), found in points.items():
            if name == run.name:
                text = named(runs, run, label(stage))
                lines.append(Line(text, painted[name, stage], found, dots=True))
    about = "same problems and counting as the results; bands are 95 % intervals"
    figure = chart("Held-out accuracy during RL", about, lines, unit=" %", wide=True)
    return [legend([(line.label, line.color) for line in lines]), figure] if figure else []


def _block(title: str, runs: Sequence[RunData], wanted: Callable[[Weights], bool]) -> list[Any]:
    """Charts of the stages that are wanted, one line per run and stage."""
    painted = colors(runs)
    sources = []
    for run in runs:
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in run.metrics:
            # Only training has a gradient, and only RL a reward.
            if "grad_norm" in row or "nll_mean" in row or "reward" in row:
                rows[row["stage"]].append(row)
        for stage, found in rows.items():
            if wanted(Weights.parse(stage)):
                sources.append((named(runs, run, label(stage)), painted[run.name, stage], found))
    figures, window = [], 1
    for key, curve in CURVES.items():
        lines = [line for source in sources if (line := _line(*source, key)).points]
        # What hardly ever happens is shown when it does.
        if key in ("skipped", "unscored") and not any(p.y for line in lines for p in line.points):
            continue
        if figure := chart(curve.title, curve.about, lines, from_zero=key not in NOT_FROM_ZERO):
            figures.append(figure)
            window = max(window, *(line.window for line in lines))
    if not figures:
        return []
    smooth = f"Faint: every step. Line: centred mean of up to {window} steps. "
    about = f"{smooth if window > 1 else ''}Point at a chart for the values of a step."
    names = legend([(text, place) for text, place, _ in sources])
    charts = element("div", figures, class_="charts")
    return [element("h3", title), names, note(about), charts]


def _line(text: str, place: int, rows: Sequence[dict[str, Any]], key: str) -> Line:
    points = [
        Point(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)
    ]
    # Where most steps have no value, a mean of neighbours would hide which have.
    sparse = len(points) < 0.9 * len(rows)
    smooth = len(points) >= SMOOTH_FROM and not sparse
    window = 2 * round(len(points) / 40) + 1 if smooth else 1
    return Line(text, place, points, window, dots=sparse)
