"""What a run found, in numbers: the tables on the console and `summary.json`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from intfast import evaluate, intervene
from intfast.collect import Found
from intfast.config import Config
from intfast.evaluate import Evaluation, Summary, coverage
from intfast.labels import LABELS, STARTS, Weights, in_order, label
from intfast.methods import cost
from intfast.records import Continuation, Intervention
from intfast.run import Run
from intfast.study.charts import bar, dotted, whisker
from intfast.study.paired import compare
from intfast.study.read import read_evaluations
from intfast.study.tables import Cell, Column, Table, element, heads, interval, share, short

# --- interventions -----------------------------------------------------------------------------


def intervention_figures(run: Run, found: Found) -> dict[str, Any]:
    """Counts of the gates, and accuracy and coverage of continuing from each start."""
    gates = Counter(record.gate for record in found.interventions)
    cut = Counter(r.gate for r in found.interventions if r.finish_reason == "length")
    tokens = {
        "verify": sum(record.num_tokens for record in found.interventions),
        "continue": sum(len(r.token_ids) for r in found.continuations if r.start == "intervention"),
    }
    unlocked = len({r.problem_id for r in found.interventions if r.gate == "kept"})
    return {
        "problems": len(found.selected),
        "wrong_attempts": len(found.wrong),
        "candidates": len(found.interventions),
        "gates": dict(gates),
        "cut": dict(cut),
        "problem_alone": _problem_figures(run, found) if found.attempts else None,
        "continued_from": continued_from(found.interventions, found.continuations, run.config),
        "generated_tokens": tokens,
        "unlocked_problems": unlocked,
        "tokens_per_unlocked_problem": sum(tokens.values()) / unlocked if unlocked else None,
        "examples": len(found.examples),
        "loss_tokens": sum(w != 0 for e in found.examples for w in e.weights),
    }


def _problem_figures(run: Run, found: Found) -> dict[str, Any] | None:
    """The attempts on the selected problems: what starting from the problem alone gives; None where
    none of them is scored.

    With `attempts.unsolved_only` nothing of it is right, because that is how they were selected.
    """
    counts = _scored((record.problem_id, record.grade) for record in found.attempts)
    tried = [counts[problem.id] for problem in found.selected if problem.id in counts]
    attempts = sum(num for num, _ in tried)
    if not tried:
        return None
    return {
        "attempts": attempts,
        "per_problem": attempts / len(tried),
        "accuracy": evaluate.estimate([right / num for num, right in tried], run.config.seed),
        "problem_coverage": coverage(tried),
        "zero_by_selection": run.config.attempts.unsolved_only,
    }


def continued_from(
    interventions: Sequence[Intervention], continuations: Sequence[Continuation], config: Config
) -> dict[str, dict[str, Any]]:
    """Start -> figures of the continuations from it; a start without a scored one is left out."""
    continued = {
        r.id: r.problem_id for r in interventions if r.gate in intervene.REACHED_CONTINUATION
    }
    by_start: dict[str, list[Drawn]] = defaultdict(list)
    for r in continuations:
        if r.intervention_id in continued:
            by_start[r.start].append(Drawn(r.intervention_id, r.sample, r.grade, r.finish_reason))
    found = {}
    for start in STARTS:
        if any(record.grade != "unscored" for record in by_start[start]):
            first = first_wave(config) if start == "intervention" else None
            found[start] = start_figures(continued, by_start[start], config.seed, first)
    return found


def first_wave(config: Config) -> int | None:
    """Continuations of each attempt that accuracy counts; None for all of them.

    Where a rule ends them early, stopping at a success would count the lucky ones' misses less.
    """
    return config.intervene.wave if config.intervene.stop != "never" else None


class Drawn(NamedTuple):
    """What is counted of a Continuation."""

    intervention_id: str
    sample: int
    grade: str
    finish_reason: str = "stop"


def start_figures(
    continued: Mapping[str, str], drawn: Sequence[Drawn], seed: int, first: int | None = None
) -> dict[str, Any]:
    """Accuracy and coverage of the continuations `drawn` from one start, with their intervals.

    Attempts are the unit that is continued; a problem is covered when any of its attempts is.
    continued   id of the intervention -> id of its problem
    first       that of `first_wave`; accuracy is None where nothing of that wave is scored
    Raises ValueError when no continuation is scored.
    """

    def counted(records: Sequence[Drawn]) -> tuple[list[Any], list[Any]]:
        """(scored, right) of each attempt, and of each problem over its attempts."""
        by_attempt = _scored((r.intervention_id, r.grade) for r in records)
        by_problem: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for key, problem_id in continued.items():
            if key in by_attempt:
                by_problem[problem_id].append(by_attempt[key])
        problems = [tuple(map(sum, zip(*rows, strict=True))) for rows in by_problem.values()]
        return list(by_attempt.values()), problems

    attempts, problems = counted(drawn)
    _, early = counted([r for r in drawn if first is None or r.sample < first])
    return {
        "continuations": len(drawn),
        "per_attempt": len(drawn) / max(1, len(attempts)),
        "truncated": sum(r.finish_reason == "length" for r in drawn) / max(1, len(drawn)),
        "accuracy": evaluate.estimate([c / n for n, c in early], seed) if early else None,
        "attempt_coverage": coverage(attempts),
        "problem_coverage": coverage(problems),
    }


def _scored(graded: Iterable[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """(key, grade) of samples -> key -> how many are scored, and right."""
    found: dict[str, tuple[int, int]] = {}
    for key, grade in graded:
        if grade != "unscored":
            num, right = found.get(key, (0, 0))
            found[key] = (num + 1, right + (grade == "correct"))
    return found


def starts_table(
    starts: Mapping[str, dict[str, Any]], alone: Mapping[str, Any] | None, first: int | None
) -> Table:
    """Accuracy and coverage from each start, with their counts.

    alone  figures of the attempts, which started from the problem alone; `first` is `first_wave`
    """
    rows = []
    if alone:
        zero = alone["zero_by_selection"]
        accuracy = "0 by selection" if zero else interval(alone["accuracy"], 2)
        count = f"{alone['attempts']:,} ({alone['per_problem']:.0f} per problem)"
        covered = share(alone["problem_coverage"])
        rows.append(["problem alone: the attempts", accuracy, "", covered, count])
    for start, figures in starts.items():
        accuracy = interval(figures["accuracy"], 2)
        if start == "intervention" and first:
            accuracy = Cell(f"{accuracy}*", element("span", accuracy, "*"))
        covers = (share(figures["attempt_coverage"]), share(figures["problem_coverage"]))
        count = f"{figures['continuations']:,} ({figures['per_attempt']:.0f} each)"
        rows.append([STARTS[start], accuracy, *covers, count])
    early = (
        f"* of the first wave only, {first} continuations of each attempt: which attempts get more "
        "of them depends on what came of these. Covered counts all waves."
    )
    columns = heads("start", ">accuracy %", ">attempts covered", ">problems covered")
    columns += heads(">continuations")
    caption = early if first and "intervention" in starts else ""
    return Table("Continuing the model's wrong attempts", columns, rows, caption)


def say_intervention(run: Run, found: Found) -> None:
    """The InT stage on the console."""
    figures = intervention_figures(run, found)
    starts, alone = figures["continued_from"], figures["problem_alone"]
    if starts:
        run.metrics.console.print(starts_table(starts, alone, first_wave(run.config)).rich())
    cost = figures["tokens_per_unlocked_problem"]
    run.metrics.say(
        f"{figures['unlocked_problems']} of {figures['problems']} problems unlocked"
        + (f" at {cost:,.0f} generated tokens each" if cost else "")
        + f"; {figures['examples']} examples with {figures['loss_tokens']} loss tokens"
    )


# --- held-out problems -------------------------------------------------------------------------


def write(run: Run, found: Found, seconds: float) -> dict[str, Any]:
    """Print the final tables and write summary.json; returns its content."""
    stored = read_evaluations(run.folder.path)
    evaluations = {key: stored[key] for key in in_order(list(stored)) if "@" not in key}
    config = run.config.evaluate
    # Fewer samples than evaluate.samples may be scored: for fewer ks then, or for none.
    measured = {key: summarised(found, config.ks) for key, found in evaluations.items()}
    rows = {key: row for key, row in measured.items() if row}
    stages = in_order([*{row["stage"] for row in run.metrics.journal}])
    rl = {key: _rl_figures(run, key) for key in stages if Weights.parse(key).arm in LABELS}
    *others, best = rows or [""]
    result = {
        "evaluations": rows,
        "differences": {
            f"{best} - {key}": compare(evaluations[best], evaluations[key])
            for key in others
            if evaluations[best].accuracies().keys() & evaluations[key].accuracies().keys()
        },
        "intervention": intervention_figures(run, found) if found.interventions else None,
        "rl": rl,
        "generated_tokens": cost.generated_tokens(run)
        | {key: cost.rl_tokens(run, key) for key, figures in rl.items() if figures},
        "seconds": run.metrics.seconds(),
        "seconds_last_process": seconds,
    }
    run.folder.write_json("summary.json", result)
    title = (
        f"Held-out problems: {len(run.tests)}, {config.samples} samples each, "
        "95 % intervals (bootstrap over problems)"
    )
    lines = []
    for key, row in measured.items():
        quarters = [rl[key][f"{part}_quarter"] for part in ("first", "last")] if rl.get(key) else []
        shares = " -> ".join(f"{quarter['zero_advantage']:.2f}" for quarter in quarters)
        lines.append(HeldOut(label(key), row, zero_advantage=shares))
    tables = [held_out(lines, config.ks, title)] if lines else []
    for table in [*tables, seconds_table(result["seconds"])]:
        run.metrics.console.print(table.rich())
    run.metrics.say(f"everything is in {run.folder.path}")
    return result


def _rl_figures(run: Run, key: str) -> dict[str, Any]:
    rows = [row for row in run.metrics.rows(key) if "reward" in row]
    if not rows:
        return {}
    keys = ("reward", "zero_advantage", "all_wrong", "all_right")
    quarter = max(1, len(rows) // 4)
    return {
        "steps": len(rows),
        "sampled_tokens": sum(row["sampled_tokens"] for row in rows),
        "method_tokens": sum(map(cost.of_step, rows)) - sum(row["sampled_tokens"] for row in rows),
        "scored_tokens": sum(row.get("scored_tokens", 0) for row in rows),
        "first_quarter": {k: sum(r[k] for r in rows[:quarter]) / quarter for k in keys},
        "last_quarter": {k: sum(r[k] for r in rows[-quarter:]) / quarter for k in keys},
    }


class HeldOut(NamedTuple):
    """A row of the table of held-out problems."""

    label: str
    summary: Summary | None
    """None where no sample is scored."""
    color: int = 0
    zero_advantage: str = ""


def summarised(evaluation: Evaluation, ks: Sequence[int]) -> Summary | None:
    """The figures of an evaluation at the ks that it allows; None without a scored sample."""
    most = max((problem.scored for problem in evaluation.problems), default=0)
    return evaluation.summary([k for k in ks if k <= most]) if most else None


def held_out(rows: Sequence[HeldOut], ks: Sequence[int], title: str = "") -> Table:
    """Accuracy and pass@k of weights; on the page also on a scale, and what was sampled."""
    ks = [k for k in ks if k > 1]
    top = max((row.summary.accuracy.high for row in rows if row.summary), default=0) or 1
    columns = [*heads("*weights", ">accuracy %"), *heads(f"0 to {short(100 * top)} %", only="page")]
    columns += heads(*(f">pass@{k} %" for k in ks))
    has_rewards = any(row.summary.reward for row in rows if row.summary)
    columns += heads(*([">mean reward"] if has_rewards else []))
    columns += heads(">zero-advantage share*", only="text")
    columns += heads(">ever solved %", ">tokens", ">cut, unscored %", only="page")
    lines = []
    for row in rows:
        figures, sizes = [""] * (len(columns) - 2), ""
        if found := row.summary:
            accuracy = found.accuracy
            figures = [interval(accuracy), whisker(accuracy, top, row.color)]
            figures += [interval(found.pass_at_k.get(k)) for k in ks]
            if has_rewards:
                reward = found.reward or accuracy
                figures.append(f"{reward.value:.3f} [{reward.low:.3f}, {reward.high:.3f}]")
            figures += [row.zero_advantage, interval(found.coverage), f"{found.mean_tokens:,.0f}"]
            sizes = f"{100 * found.truncated:.1f}"
        unscored = found.unscored if found else 1.0
        lines.append([dotted(row.label, row.color), *figures, f"{sizes}, {100 * unscored:.1f}"])
    caption = (
        "* of the groups in the first -> last quarter of the RL steps. An interval without "
        "width says that all problems gave the same, not that it is certain."
    )
    return Table(title, columns, lines, caption)


# --- seconds -----------------------------------------------------------------------------------


def seconds_table(seconds: Mapping[str, Mapping[str, float]]) -> Table:
    """Where the time went: stages by phases, the longest phases first on the page."""
    spent = by_phase(seconds)
    phases = sorted(spent)
    total = sum(spent.values())
    columns = [*heads("stage"), *heads(">time", ">%", "split", only="page")]
    columns += [*heads(*(f">{phase}" for phase in phases)), *heads(">all", only="text")]
    rows = []
    for stage, split in [*seconds.items(), *([("all", spent)] if len(seconds) > 1 else [])]:
        whole = sum(split.values())
        times = [(phase, split.get(phase, 0)) for phase in spent]
        parts = [(f"{phase}: {duration(s)}", s, i + 2) for i, (phase, s) in enumerate(times)]
        cells = [f"{split[phase]:.1f}" if phase in split else "" for phase in phases]
        percent = f"{100 * whole / (total or 1):.1f}"
        rows.append(
            [label(stage), duration(whole), percent, bar(parts, whole), *cells, f"{whole:.1f}"]
        )
    return Table("Seconds", columns, rows)


def by_phase(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Phase -> seconds of all stages, the longest first."""
    total: Counter[str] = Counter()
    for split in seconds.values():
        total.update(split)
    return dict(total.most_common())


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def ablation_table(rows: Mapping[str, dict[str, Any]]) -> Table:
    """What SFT was trained on in each ablation, and what came of it."""
    measured = [row["evaluation"] for row in rows.values() if row["evaluation"]]
    top = max((found.accuracy.high for found in measured), default=0) or 1
    columns = heads("trained on", ">examples", ">loss tokens", ">accuracy %")
    columns += [*heads(f"0 to {short(100 * top)} %", only="page"), *heads(">covered")]
    columns.append(Column("settings", "code", "page"))
    lines = []
    for name, row in rows.items():
        found = row["evaluation"]
        accuracy, covered = (found.accuracy, share(found.coverage)) if found else (None, "")
        figures = [interval(accuracy), whisker(accuracy, top, 2), covered]
        settings = "  ".join(row["settings"]) or "the recipe"
        lines.append([name, str(row["examples"]), f"{row['loss_tokens']:,}", *figures, settings])
    title = "SFT on the same interventions (held-out problems, 95 % intervals over problems)"
    return Table(title, columns, lines)
