"""The page of runs beside results and training: header, interventions, time, grading, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from intfast import cli, intervene
from intfast.labels import EXAMPLES, STARTS, label
from intfast.prompts import split_steps
from intfast.state import metrics
from intfast.study.charts import bar, legend, tenths
from intfast.study.page_data import SHOWS, RunData, Section, headed, named, origin, test_set, toml
from intfast.study.summary import (
    by_phase,
    continued_from,
    duration,
    first_wave,
    seconds_table,
    starts_table,
)
from intfast.study.tables import Cell, Column, Table, element, heads, note


def header(runs: Sequence[RunData]) -> list[Any]:
    """What this is a page of, and what is missing from it."""
    first = runs[0]
    if len(runs) > 1:
        title = f"{len(runs)} runs, side by side"
        text: list[Any] = [", ".join(run.name for run in runs)]
    else:
        title = first.name
        text = ["A run of intfast from ", *origin(first.config, first.manifest)]
        text.append(f", seed {first.config.seed}.")
    found = [element("h1", title), element("p", text, class_="muted")]
    for run in runs:
        if run.missing:
            open_end = "summary.json" in run.missing
            what = "this run has not finished." if open_end else "some files are not there."
            rows = [element("li", element("code", f), f": {SHOWS[f]}") for f in run.missing]
            text = [element("b", named(runs, run, what)), " The page shows what is there. Missing:"]
            found.append(element("div", text, element("ul", rows), class_="warn"))
    if len({test_set(run) for run in runs} - {None}) > 1:
        text = [element("b", "These runs were evaluated on different problems.")]
        text.append(" Their rows cannot be compared with each other.")
        found.append(element("div", text, class_="warn"))
    return found


# --- interventions -----------------------------------------------------------------------------


def interventions(runs: Sequence[RunData]) -> Section:
    """Gates, what the interventions changed, and where they lie."""
    parts = [_funnel(runs, place, run) for place, run in enumerate(runs) if run.interventions]
    empty = note("None: this run trains without them, or has not come to them.")
    title = "Interventions in numbers"
    return Section("interventions", "Interventions", title, parts or [empty])


def _funnel(runs: Sequence[RunData], place: int, run: RunData) -> Markup:
    records = run.interventions
    gates = Counter(record.gate for record in records)
    attempts = {(r.problem_id, r.attempt) for r in records}
    found = run.summary.get("intervention") or {}
    cost = found.get("tokens_per_unlocked_problem")
    text = (
        f"{len(records):,} candidate interventions for {len(attempts):,} wrong attempts at "
        f"{len({r.problem_id for r in records}):,} problems; "
        f"{len({r.problem_id for r in records if r.gate == 'kept'}):,} problems have a kept one"
        + (f", at {cost:,.0f} generated tokens each (verification, continuations)" if cost else "")
        + ". A candidate stops at the first gate that it does not pass."
    )
    rows = []
    for gate, meaning in intervene.GATES.items():
        if count := gates[gate]:
            button = element("button", gate, data_run=place, data_gate=gate)
            meter = bar([("", count, 2)], len(records))
            percent = f"{100 * count / len(records):.1f}"
            rows.append([Cell(gate, button), f"{count:,}", percent, meter, meaning])
    table = Table("", heads("gate", ">candidates", ">%", "share", "meaning"), rows)
    parts = [headed(runs, run), element("p", text), table, *_helps(run), *_places(run)]
    return Markup("").join(element("div", part) for part in parts if part is not None)


def _helps(run: RunData) -> list[Any]:
    starts = continued_from(run.interventions, run.continuations, run.config)
    if not starts:
        return []
    alone = (run.summary.get("intervention") or {}).get("problem_alone")
    table = starts_table(starts, alone, first_wave(run.config))
    text = (
        "Of the attempts whose intervention came to this point. Accuracy: mean over problems, 95 % "
        "bootstrap interval over problems; covered: with a right one, in percent with a Wilson "
        "interval (that of attempts takes those at one problem as independent). The other starts "
        "are the model without an intervention. "
    )
    title = element("h3", "Does the intervention help the model go on?")
    return [title, table, note(text, table.caption)]


def places(run: RunData) -> list[int]:
    """How many located steps lie in each tenth of their attempt, counted in steps."""
    texts = {(record.problem_id, record.sample): record.text for record in run.attempts}
    found = [0] * 10
    for record in run.interventions:
        text = texts.get((record.problem_id, record.attempt), "")
        num_steps = len(split_steps(text, run.config.prompt.separator))
        if 1 <= record.location <= num_steps:
            found[(record.location - 1) * 10 // num_steps] += 1
    return found


def _places(run: RunData) -> list[Any]:
    counts = places(run)
    if not any(counts):
        return []
    text = (
        f"{sum(counts):,} located steps by their place among the steps of the attempt, in tenths; "
        "the location is the model's own"
    )
    figure = element("div", tenths(counts, text), class_="charts")
    return [element("h3", "Where the first wrong step was found"), figure]


def reader(runs: Sequence[RunData]) -> Section:
    """The place of the browser of interventions, which the script draws."""
    empty = note("No intervention yet: the run trains without them, or has not come to them.")
    place = element("div", id="browser") if any(run.interventions for run in runs) else empty
    return Section("browse", "Browser", "Read the interventions", [place])


def trained(runs: Sequence[RunData]) -> Section | None:
    """SFT examples that are no interventions; their tokens are drawn when one is opened."""
    parts: list[Any] = []
    for place, run in enumerate(runs):
        rows = run.texts["trained"]
        if not rows:
            continue
        text = (
            f"{len(rows):,} examples, spread over all that SFT saw, with what it did to the "
            "log-probability of each token. Open one to see its tokens."
        )
        parts += [headed(runs, run), note(text)]
        for i, (problem, kind, num, before, after) in enumerate(rows):
            means = (
                "" if before is None else (f", mean log-prob {before:.3f} \u2192 {after:.3f} nats")
            )
            about = f"{EXAMPLES.get(kind, kind)}, {num:,} loss tokens{means}"
            head = element("summary", problem, " ", element("span", about, class_="muted"))
            body = element("div", class_="body", data_run=place, data_example=i)
            parts.append(element("details", head, body, class_="block"))
    title = "Read what SFT learned from"
    return Section("trained", "SFT examples", title, parts) if parts else None


# --- time, grading, settings -------------------------------------------------------------------


def time(runs: Sequence[RunData]) -> Section:
    """Seconds by stage and phase, and generated tokens."""
    parts: list[Any] = []
    for run in runs:
        found = metrics.seconds(run.metrics)
        spent = by_phase(found)
        if not (total := sum(spent.values())):
            continue
        names = [(f"{n} {100 * s / total:.1f} %", i + 2) for i, (n, s) in enumerate(spent.items())]
        text = f"{duration(total)} inside the phases below, interruptions not counted."
        parts += [headed(runs, run), element("p", text), legend(names, "swatch")]
        parts.append(seconds_table(found))
        if generated := run.summary.get("generated_tokens"):
            rows = [[label(key), f"{count:,}"] for key, count in generated.items() if count]
            table = Table("", heads("for", ">tokens"), rows)
            text = (
                "Those that make training data or choose problems, and the rollouts of RL. "
                "Evaluations and the continuations without intervention only measure, and are not "
                "in it."
            )
            parts += [element("h3", "Tokens generated"), table, note(text)]
    title = "Where the time and the tokens went"
    return Section("time", "Time", title, parts or [note("No row with seconds yet.")])


def outcomes(run: RunData) -> dict[str, Counter[str]]:
    """What was graded -> reason -> count."""
    found = {"attempts": Counter(record.reason for record in run.attempts)}
    for start, text in STARTS.items():
        reasons = Counter(r.reason for r in run.continuations if r.start == start)
        found[f"continuations of {text}"] = reasons
    for key, evaluation in run.finals.items():
        reasons = Counter()
        for problem in evaluation.problems:
            reasons.update(problem.reasons)
        found[f"evaluation of {label(key)}"] = reasons
    return {text: reasons for text, reasons in found.items() if reasons}


def grading(runs: Sequence[RunData]) -> Section:
    """Every graded answer by the reason of its grade."""
    text = "Every graded answer by the reason of its grade. A time-out is not counted as wrong: "
    parts: list[Any] = [note(text, "it is unscored.")]
    for run in runs:
        counts = outcomes(run)
        reasons = list(dict.fromkeys(reason for row in counts.values() for reason in row))
        if reasons:
            names = [f">{name}" for name in ("answers", *reasons)]
            rows = [
                [what, f"{row.total():,}", *(f"{row[r]:,}" if row[r] else "" for r in reasons)]
                for what, row in counts.items()
            ]
            table = Table("", heads("what was graded", *names), rows)
            parts += [headed(runs, run), table]
    if len(parts) == 1:
        parts.append(note("Nothing is graded yet."))
    return Section("grading", "Grading", "Grading", parts)


def settings(runs: Sequence[RunData]) -> Section:
    """Settings that differ from the defaults, and the manifests."""
    changed = [cli.differences(run.config) for run in runs]
    standard = {key: pair[0] for found in changed for key, pair in found.items()}
    rows = []
    for key, default in standard.items():
        values = [toml(found.get(key, (default, default))[1]) for found in changed]
        rows.append([key, toml(default), *_marked(values)])
    names = [run.name for run in runs] if len(runs) > 1 else ["this run"]
    table = Table("", _code("setting", "default", *names), rows, style="plain")
    parts = [
        element("h3", "Settings that differ from the defaults"),
        table,
        note("In colour: settings in which these runs differ.") if len(runs) > 1 else None,
        *versions({run.name: run.manifest for run in runs}),
    ]
    return Section("settings", "Settings", "Settings and versions", parts)


def versions(manifests: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What runs were made with."""
    tables = [_flat(manifest) for manifest in manifests.values()]
    keys = list(dict.fromkeys(key for found in tables for key in found))
    rows = [[key, *_marked([found.get(key, "unknown") for found in tables])] for key in keys]
    table = Table("", _code("", *manifests), rows, style="plain")
    title = element("h3", "Versions, hardware, data")
    return [title, table if keys else note("No manifest.json.")]


def _code(*names: str) -> list[Column]:
    return [Column(name, "code") for name in names]


def _marked(values: Sequence[str]) -> list[str]:
    """Values side by side, in colour where they differ."""
    if len(set(values)) < 2:
        return list(values)
    return [Cell(value, element("b", value, class_="changed")) for value in values]


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, str]:
    found = {}
    for key, inner in value.items():
        if isinstance(inner, dict | list) and inner:
            rows = inner if isinstance(inner, dict) else dict(enumerate(inner))
            found |= _flat(rows, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = "unknown" if inner is None else str(inner)
    return found
