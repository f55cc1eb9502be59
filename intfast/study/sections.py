"""The page of runs beside its results: header, interventions, training, time, grading, settings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from intfast import cli, intervene
from intfast.labels import EXAMPLES, STARTS, Weights, label
from intfast.prompts import split_steps
from intfast.state import metrics
from intfast.study.analysis import text_table
from intfast.study.charts import Line, Point, bar, chart, legend, percent
from intfast.study.page_data import SHOWS, RunData, Section, each, origin, toml
from intfast.study.summary import (
    by_phase,
    continued_from,
    duration,
    first_wave,
    seconds_table,
    starts_table,
)
from intfast.study.tables import Cell, Column, Table, element, heads, note

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
HELPS = (
    "Of the attempts whose intervention came to this point. Accuracy: mean over problems, 95 % "
    "bootstrap interval over problems; covered: with a right one, in percent with a Wilson "
    "interval (that of attempts takes those at one problem as independent). The other starts "
    "are the model without an intervention. "
)
GENERATED = (
    "Those that make training data or choose problems, and the rollouts of RL. Evaluations and the "
    "continuations without intervention only measure, and are not in it."
)


def header(runs: Sequence[RunData]) -> list[Any]:
    """What this is a page of, and what is missing from it."""
    first, names = runs[0], ", ".join(run.name for run in runs)
    title, text = f"{len(runs)} runs, side by side", [names]
    if len(runs) == 1:
        start = origin(first.config, first.manifest)
        title, text = names, ["A run of intfast from ", *start, f", seed {first.config.seed}."]
    found = [element("h1", title), element("p", text, class_="muted")]
    for run in runs:
        if run.missing:
            open_end = "summary.json" in run.missing
            what = "this run has not finished." if open_end else "some files are not there."
            rows = [element("li", element("code", f), f": {SHOWS[f]}") for f in run.missing]
            text = [element("b", run.prefix, what), " The page shows what is there. Missing:"]
            found.append(element("div", text, element("ul", rows), class_="warn"))
    if len({run.test_set for run in runs} - {None}) > 1:
        text = [element("b", "These runs were evaluated on different problems.")]
        text.append(" Their rows cannot be compared with each other.")
        found.append(element("div", text, class_="warn"))
    return found


# --- interventions -----------------------------------------------------------------------------


def interventions(runs: Sequence[RunData]) -> list[Section]:
    """The interventions in numbers, the place of their browser, and other SFT examples."""
    empty = note("None: this run trains without them, or has not come to them.")
    has_some = any(run.interventions for run in runs)
    place = element("div", id="browser") if has_some else empty
    figures = each(runs, _funnel) or [empty]
    found = [
        Section("interventions", "Interventions", "Interventions in numbers", figures),
        Section("browse", "Browser", "Read the interventions", [place]),
    ]
    if others := each(runs, _trained):
        found.append(Section("trained", "SFT examples", "Read what SFT learned from", others))
    return found


def _funnel(run: RunData) -> list[Any]:
    """Gates, what the interventions changed, and where they lie."""
    records = run.interventions
    if not records:
        return []
    gates = Counter(record.gate for record in records)
    cut = Counter(record.gate for record in records if record.finish_reason == "length")
    summary = run.summary.get("intervention") or {}
    cost = summary.get("tokens_per_unlocked_problem")
    text = (
        f"{len(records):,} candidate interventions for "
        f"{len({(r.problem_id, r.attempt) for r in records}):,} wrong attempts at "
        f"{len({r.problem_id for r in records}):,} problems; "
        f"{len({r.problem_id for r in records if r.gate == 'kept'}):,} problems have a kept one"
        + (f", at {cost:,.0f} generated tokens each (verification, continuations)" if cost else "")
        + ". A candidate stops at the first gate that it does not pass."
    )
    rows = []
    for gate, meaning in intervene.GATES.items():
        if count := gates[gate]:
            button = Cell(gate, element("button", gate, data_run=run.place, data_gate=gate))
            share = f"{100 * count / len(records):.1f}"
            meter = bar([("", count, 2)], len(records))
            rows.append([button, f"{count:,}", share, f"{cut[gate]:,}", meter, meaning])
    columns = heads("gate", ">candidates", ">%", ">reply cut", "share", "meaning")
    parts = [element("p", text), Table("", columns, rows)]
    if starts := continued_from(records, run.continuations, run.config):
        table = starts_table(starts, summary.get("problem_alone"), first_wave(run.config))
        title = element("h3", "Does the intervention help the model go on?")
        parts += [title, table, note(HELPS, table.caption)]
    if any(counts := places(run)):
        text = (
            f"{sum(counts):,} located steps by their place among the steps of the attempt, in "
            "tenths; the location is the model's own"
        )
        title = element("h3", "Where the first wrong step was found")
        tenths = ["first tenth", *map(str, range(2, 10)), "last tenth"]
        shares = [bar([("", count, 2)], max(counts)) for count in counts]
        columns = heads("of the attempt", ">located steps", "share")
        rows = [[n, str(c), s] for n, c, s in zip(tenths, counts, shares, strict=True)]
        parts += [title, note(text), Table("", columns, rows)]
    return parts


def places(run: RunData) -> list[int]:
    """How many located steps lie in each tenth of their attempt, counted in steps."""
    separator = run.config.prompt.separator
    asked = {(record.problem_id, record.attempt) for record in run.interventions}
    sizes = {
        key: len(split_steps(record.text, separator))
        for record in run.attempts
        if (key := (record.problem_id, record.sample)) in asked
    }
    found = [0] * 10
    for record in run.interventions:
        num_steps = sizes.get((record.problem_id, record.attempt), 0)
        if 1 <= record.location <= num_steps:
            found[(record.location - 1) * 10 // num_steps] += 1
    return found


def _trained(run: RunData) -> list[Any]:
    """SFT examples that are no interventions; their tokens are drawn when one is opened."""
    rows = run.texts["trained"]
    text = (
        f"{len(rows):,} examples, spread over all that SFT saw, with what it did to the "
        "log-probability of each token. Open one to see its tokens."
    )
    parts = [note(text)] if rows else []
    for i, (problem, kind, num, before, after) in enumerate(rows):
        means = "" if before is None else f", mean log-prob {before:.3f} \u2192 {after:.3f} nats"
        about = f"{EXAMPLES.get(kind, kind)}, {num:,} loss tokens{means}"
        head = element("summary", problem, " ", element("span", about, class_="muted"))
        body = element("div", class_="body", data_run=run.place, data_example=i)
        parts.append(element("details", head, body, class_="block"))
    return parts


# --- training ----------------------------------------------------------------------------------


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


# --- time, grading, settings -------------------------------------------------------------------


def time(runs: Sequence[RunData]) -> Section:
    """Seconds by stage and phase, and generated tokens."""
    parts = each(runs, _spent) or [note("No row with seconds yet.")]
    return Section("time", "Time", "Where the time and the tokens went", parts)


def _spent(run: RunData) -> list[Any]:
    found = metrics.seconds(run.metrics)
    spent = by_phase(found)
    if not (total := sum(spent.values())):
        return []
    names = [(f"{n} {100 * s / total:.1f} %", i + 2) for i, (n, s) in enumerate(spent.items())]
    text = f"{duration(total)} inside the phases below, interruptions not counted."
    parts = [element("p", text), legend(names, "swatch"), seconds_table(found)]
    if generated := run.summary.get("generated_tokens"):
        rows = [[label(key), f"{count:,}"] for key, count in generated.items() if count]
        table = Table("", heads("for", ">tokens"), rows)
        parts += [element("h3", "Tokens generated"), table, note(GENERATED)]
    return parts


def grading(runs: Sequence[RunData]) -> Section:
    """Every graded answer by the reason of its grade."""
    text = "Every graded answer by the reason of its grade. A time-out is not counted as wrong: "
    parts = each(runs, _reasons) or [note("Nothing is graded yet.")]
    return Section("grading", "Grading", "Grading", [note(text, "it is unscored."), *parts])


def _reasons(run: RunData) -> list[Any]:
    found = {"attempts": Counter(record.reason for record in run.attempts)}
    for start, text in STARTS.items():
        drawn = Counter(r.reason for r in run.continuations if r.start == start)
        found[f"continuations of {text}"] = drawn
    for key, evaluation in run.finals.items():
        counts = found[f"evaluation of {label(key)}"] = Counter()
        for problem in evaluation.problems:
            counts.update(problem.reasons)
    reasons = list(dict.fromkeys(reason for counts in found.values() for reason in counts))
    rows = [
        [what, f"{counts.total():,}", *(f"{counts[r]:,}" if counts[r] else "" for r in reasons)]
        for what, counts in found.items()
        if counts
    ]
    columns = heads("what was graded", ">answers", *(f">{reason}" for reason in reasons))
    return [Table("", columns, rows)] if rows else []


def settings(runs: Sequence[RunData]) -> Section:
    """Settings that differ from the defaults, and the manifests."""
    changed = [cli.differences(run.config) for run in runs]
    standard = {key: pair[0] for found in changed for key, pair in found.items()}
    rows = []
    for key, default in standard.items():
        values = [toml(found.get(key, (default, default))[1]) for found in changed]
        rows.append([key, toml(default), *_marked(values)])
    names = [run.name for run in runs] if len(runs) > 1 else ["this run"]
    parts = [
        element("h3", "Settings that differ from the defaults"),
        code_table(["setting", "default", *names], rows),
        note("In colour: settings in which these runs differ.") if len(runs) > 1 else None,
        *versions({run.name: run.manifest for run in runs}),
    ]
    return Section("settings", "Settings", "Settings and versions", parts)


def versions(manifests: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What runs were made with."""
    tables = [_flat(manifest) for manifest in manifests.values()]
    keys = list(dict.fromkeys(key for found in tables for key in found))
    rows = [[key, *_marked([found.get(key, "unknown") for found in tables])] for key in keys]
    table = code_table(["", *manifests], rows) if keys else note("No manifest.json.")
    return [element("h3", "Versions, hardware, data"), table]


def code_table(names: Sequence[str], rows: Sequence[Sequence[str]], plain: str = "") -> Table:
    """A table of settings; plain: the columns of words."""
    columns = [Column(name, "" if name and name in plain.split() else "code") for name in names]
    return Table("", columns, rows, style="plain")


def _marked(values: Sequence[str]) -> list[str]:
    """Values side by side, in colour where they differ."""
    if len(set(values)) < 2:
        return list(values)
    return [Cell(value, element("b", value, class_="changed")) for value in values]


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Nested JSON as dotted path -> text."""
    if not isinstance(value, dict | list) or not value:
        return {path: "unknown" if value is None else str(value)} if path else {}
    rows = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, inner in rows:
        found |= _flat(inner, f"{path}.{key}" if path else str(key))
    return found
