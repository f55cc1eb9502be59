"""The page's results: held-out accuracy, differences, pass@k, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import msgspec
from markupsafe import Markup

from intfast.config import Config
from intfast.evaluate import Estimate, Evaluation, Summary
from intfast.labels import Weights, label
from intfast.study import ablate
from intfast.study.charts import Line, Point, chart, legend
from intfast.study.page_data import RunData, Section, colors, named, test_set
from intfast.study.paired import compare
from intfast.study.summary import HeldOut, held_out, summarised
from intfast.study.tables import Table, element, fold, heads, interval, note, reading

UNSCORED = (
    "Unscored samples, which the grader could not decide, are in neither numerator nor denominator."
)
NO_WIDTH = "An interval without width says that all problems gave the same, not that it is certain."


def results(runs: Sequence[RunData], pooled: Sequence[Any]) -> Section:
    """Held-out accuracy, differences, pass@k, ablations. pooled: parts over seeds, repeats.py"""
    painted = colors(runs)
    ks = sorted({k for run in runs for k in run.config.evaluate.ks})
    rows, lines = [], []
    for run in runs:
        for key, evaluation in run.finals.items():
            most = max((p.scored for p in evaluation.problems), default=0)
            powers = [2**i for i in range(most.bit_length())]
            found = summarised(evaluation, sorted({*ks, *powers}))
            place, text = painted[run.name, key], named(runs, run, label(key))
            unscored = 0.0 if found else 1.0
            rows.append(HeldOut(text, found, unscored, place))
            if found:
                lines.append(Line(text, place, pass_points(found.pass_at_k), dots=True))
    title = "Results on held-out problems"
    if not rows:
        empty = "No evaluation: the run has no test problems, or has not come to them yet."
        return Section("results", "Results", title, [note(empty)])
    parts = [*(_measured(runs, run) for run in runs), *pooled]
    parts += [element("h3", "Each run")] if pooled else []
    parts += [held_out(rows, ks), _counted(), *_differences(runs)]
    if figure := pass_chart("pass@k", lines, wide=True):
        about = element("h3", "What more samples would solve")
        parts += [about, legend([(line.label, line.color) for line in lines]), figure]
    for run in runs:
        if run.ablations:
            parts += _ablations(runs, run)
    return Section("results", "Results", title, parts)


def pass_points(curve: Mapping[int, Estimate]) -> list[Point]:
    """pass@k in percent."""
    return [
        Point(k, 100 * e.value, 100 * e.low, 100 * e.high, e.num_problems)
        for k, e in sorted(curve.items())
    ]


def pass_chart(
    title: str, lines: Sequence[Line], over: str = "over held-out problems", wide: bool = False
) -> Markup | None:
    """pass@k, logarithmic in k."""
    about = f"unbiased, {over}, logarithmic in k; bands are 95 % bootstrap intervals"
    return chart(title, about, lines, log_x=True, unit=" %", x_name="k =", wide=wide)


def sampling(config: Config) -> str:
    """How held-out samples are drawn, in words."""
    how = config.evaluate.sampling
    top_k = f"top-k {how.top_k}, " if how.top_k else ""
    return (
        f"drawn at temperature {how.temperature:g}, top-p {how.top_p:g}, {top_k}"
        f"at most {how.max_new_tokens:,} tokens."
    )


def _measured(runs: Sequence[RunData], run: RunData) -> Markup | None:
    if not run.finals:
        return None
    sizes = [sum(p.samples for p in evaluation.problems) for evaluation in run.finals.values()]
    problems = len(next(iter(run.finals.values())).problems)
    each = f"{sizes[0] / problems:g} samples of each" if problems else "no sample"
    return element(
        "p",
        element("b", f"{run.name}: ") if len(runs) > 1 else None,
        f"{len(sizes)} sets of weights on the same {problems:,} problems, {each} "
        f"({sum(sizes):,} graded answers in all), {sampling(run.config)} "
        f"Training seed {run.config.seed}.",
    )


def _counted() -> Markup:
    text = (
        "In brackets: 95 % intervals. They describe the spread between problems and say nothing "
        "about another training seed. Accuracy is the mean over problems of the share of right "
        "samples (avg@n); pass@k is the unbiased estimate that one of k samples is right, from the "
        "same samples; both intervals draw the problems again with replacement (bootstrap, 2,000 "
        "times). \u201cEver solved\u201d counts problems with a right sample among all of theirs "
        "(Wilson interval). Tokens: mean length of a sample; cut: samples that hit the length "
        f"limit. {UNSCORED} {NO_WIDTH}"
    )
    return fold("How these were counted", note(text), open=True)


Difference = tuple[str, str, Estimate]
"""Minuend, subtrahend, difference of their accuracies."""


def difference_table(rows: Sequence[Difference]) -> Table:
    """Differences of accuracies, with what they say."""
    lines = [
        [f"{more} \u2212 {less}", interval(e), f"{e.num_problems}", reading(e, "higher", "lower")]
        for more, less, e in rows
    ]
    return Table("", heads("*weights", ">points [95 %]", ">problems", "reading"), lines)


def within(evaluations: Mapping[str, Evaluation]) -> list[Difference]:
    """The difference of every pair of weights that share a scored problem."""
    pairs = ((more, less) for less, more in combinations(evaluations, 2))
    return [
        (label(more), label(less), compare(evaluations[more], evaluations[less]))
        for more, less in pairs
        if evaluations[more].accuracies().keys() & evaluations[less].accuracies().keys()
    ]


def across(runs: Sequence[RunData]) -> list[Difference]:
    """The difference of every other run from the first, on the same problems, by weights."""
    first, *others = runs
    found = []
    for run in others:
        if test_set(run) is None or test_set(run) != test_set(first):
            continue
        for key in run.finals.keys() & first.finals.keys():
            more, less = run.finals[key], first.finals[key]
            if more.accuracies().keys() & less.accuracies().keys():
                titles = (f"{run.name}: {label(key)}", f"{first.name}: {label(key)}")
                found.append((Weights.parse(key).place, (*titles, compare(more, less))))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _differences(runs: Sequence[RunData]) -> list[Any]:
    inside = [
        (named(runs, run, more), less, e) for run in runs for more, less, e in within(run.finals)
    ]
    between = across(runs)
    if not inside and not between:
        return []
    parts: list[Any] = [element("h3", "Differences in accuracy")]
    parts += [difference_table(between)] if between else []
    if inside:
        rows = difference_table(inside)
        parts.append(fold("Within each run", rows) if len(runs) > 1 else rows)
    text = (
        "Paired by problem, so the spread between problems cancels; intervals by bootstrap over "
        "problems. \u201cNot told apart\u201d: the interval holds zero. Each interval stands "
        "alone; among many pairs some exclude zero by chance."
    )
    return [*parts, note(text)]


def _ablations(runs: Sequence[RunData], run: RunData) -> list[Any]:
    rows = {
        name: row
        | {
            "evaluation": row["evaluation"]
            and msgspec.convert(row["evaluation"], Summary, strict=False)
        }
        for name, row in run.ablations.items()
    }
    measured = [row["evaluation"] for row in rows.values() if row["evaluation"]]
    each = f"{measured[0].num_samples / measured[0].num_problems:g}" if measured else ""
    counted = (
        f"{each} samples of each held-out problem; counted as above."
        if measured
        else ("not evaluated.")
    )
    text = f"SFT and evaluation repeated on this run's own records, one seed, before RL; {counted}"
    title = element("h3", named(runs, run, "What of the SFT target does the work"))
    return [title, ablate.table(rows), note(text)]
