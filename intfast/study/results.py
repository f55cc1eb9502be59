"""The page's results: held-out accuracy, differences, pass@k, ablations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import msgspec
from markupsafe import Markup

from intfast.config import Config
from intfast.evaluate import Estimate, Evaluation, Summary
from intfast.labels import in_order, label
from intfast.study.charts import Line, chart, legend, percent
from intfast.study.page_data import RunData, Section
from intfast.study.paired import compare
from intfast.study.summary import HeldOut, ablation_table, held_out, summarised
from intfast.study.tables import Table, element, fold, heads, interval, note, reading

EVER_SOLVED = (
    "\u201cEver solved\u201d counts problems with a right sample among all of theirs (Wilson "
    "interval). Tokens: mean length of a sample; cut: samples that hit the length limit."
)
TOLD_APART = (
    "\u201cNot told apart\u201d: the interval holds zero. Each interval stands alone; among many "
    "some exclude zero by chance."
)
PAIRED = (
    "Paired by problem, so the spread between problems cancels; intervals by bootstrap over "
    f"problems. {TOLD_APART}"
)
PASS = "unbiased, {}, logarithmic in k; bands are 95 % bootstrap intervals"


def results(runs: Sequence[RunData]) -> Section:
    """Held-out accuracy, differences, pass@k, ablations."""
    ks = sorted({k for run in runs for k in run.config.evaluate.ks})
    rows, lines = [], []
    for run in runs:
        for key, evaluation in run.finals.items():
            most = max((p.scored for p in evaluation.problems), default=0)
            powers = [2**i for i in range(most.bit_length())]
            found = summarised(evaluation, sorted({*ks, *powers}))
            place, text = run.colors[key], run.prefix + label(key)
            rows.append(HeldOut(text, found, place))
            if found:
                points = [percent(k, e) for k, e in sorted(found.pass_at_k.items())]
                lines.append(Line(text, place, points, dots=True))
    title = "Results on held-out problems"
    if not rows:
        empty = "No evaluation: the run has no test problems, or has not come to them yet."
        return Section("results", "Results", title, [note(empty)])
    parts = [_measured(run) for run in runs if run.finals]
    parts += [held_out(rows, ks), counted("problems", EVER_SOLVED), *_differences(runs)]
    about = PASS.format("over held-out problems")
    if figure := chart("pass@k", about, lines, unit=" %", log_k=True, wide=True):
        parts += [element("h3", "What more samples would solve"), legend(lines), figure]
    for run in runs:
        parts += _ablations(run) if run.ablations else []
    return Section("results", "Results", title, parts)


def counted(over: str, more: str) -> Markup:
    """What accuracy, pass@k and their intervals are, over problems or over seeds too."""
    seeds = (
        "of few seeds they tell little more than their spread"
        if "seeds" in over
        else "they describe the spread between problems and say nothing about another training seed"
    )
    text = (
        f"In brackets: 95 % intervals, by drawing {over} again with replacement (bootstrap, 2,000 "
        f"times); {seeds}. Accuracy is the mean over {over} of the share of right samples (avg@n); "
        "pass@k the unbiased estimate that one of k samples is right, from the same samples. "
        "Unscored samples, which the grader could not decide, are in neither numerator nor "
        f"denominator. {more} An interval without width says that all problems gave the same, not "
        "that it is certain."
    )
    return fold("How these were counted", note(text), open=True)


def sampling(config: Config) -> str:
    """How held-out samples are drawn, in words."""
    how = config.evaluate.sampling
    top_k = f"top-k {how.top_k}, " if how.top_k else ""
    return (
        f"drawn at temperature {how.temperature:g}, top-p {how.top_p:g}, {top_k}"
        f"at most {how.max_new_tokens:,} tokens."
    )


def _measured(run: RunData) -> Any:
    sizes = [sum(p.samples for p in evaluation.problems) for evaluation in run.finals.values()]
    problems = len(next(iter(run.finals.values())).problems)
    each = f"{sizes[0] / problems:g} samples of each" if problems else "no sample"
    text = (
        f"{len(sizes)} sets of weights on the same {problems:,} problems, {each} "
        f"({sum(sizes):,} graded answers in all), {sampling(run.config)} "
        f"Training seed {run.config.seed}."
    )
    return element("p", element("b", run.prefix) if run.prefix else None, text)


# --- differences -------------------------------------------------------------------------------

Difference = tuple[str, str, Estimate]
"""Minuend, subtrahend, difference of their accuracies."""


def _difference_table(rows: Sequence[Difference]) -> Table:
    lines = [
        [f"{more} \u2212 {less}", interval(e), f"{e.num_problems}", reading(e, "higher", "lower")]
        for more, less, e in rows
    ]
    return Table("", heads("*weights", ">points [95 %]", ">problems", "reading"), lines)


def _compared(more: tuple[str, Evaluation], less: tuple[str, Evaluation]) -> list[Difference]:
    """The difference of two named evaluations; [] where they share no scored problem."""
    if not more[1].accuracies().keys() & less[1].accuracies().keys():
        return []
    return [(more[0], less[0], compare(more[1], less[1]))]


def _differences(runs: Sequence[RunData]) -> list[Any]:
    """Of every pair of weights of a run, and of every other run from the first, by weights."""
    inside, between = [], []
    for run in runs:
        for less, more in combinations(run.finals, 2):
            ours = (run.prefix + label(more), run.finals[more])
            inside += _compared(ours, (label(less), run.finals[less]))
    first, *others = runs
    comparable = [r for r in others if r.test_set and r.test_set == first.test_set]
    for key in in_order(list({key for run in comparable for key in run.finals})):
        for run in comparable:
            if key in run.finals and key in first.finals:
                ours = (run.prefix + label(key), run.finals[key])
                between += _compared(ours, (first.prefix + label(key), first.finals[key]))
    if not inside and not between:
        return []
    parts: list[Any] = [element("h3", "Differences in accuracy")]
    parts += [_difference_table(between)] if between else []
    if inside:
        rows = _difference_table(inside)
        parts.append(fold("Within each run", rows) if len(runs) > 1 else rows)
    return [*parts, note(PAIRED)]


# --- ablations ---------------------------------------------------------------------------------


def _ablations(run: RunData) -> list[Any]:
    rows, measured = {}, []
    for name, row in run.ablations.items():
        found = row["evaluation"] and msgspec.convert(row["evaluation"], Summary, strict=False)
        rows[name] = row | {"evaluation": found}
        measured += [f"{found.num_samples / found.num_problems:g}"] if found else []
    counted = "not evaluated."
    if measured:
        counted = f"{measured[0]} samples of each held-out problem; counted as above."
    text = f"SFT and evaluation repeated on this run's own records, one seed, before RL; {counted}"
    title = element("h3", f"{run.prefix}What of the SFT target does the work")
    return [title, ablation_table(rows), note(text)]
