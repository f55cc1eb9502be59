"""What a run found, in numbers: the tables on the console, `summary.json`, the exported model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from rich.table import Table

from intfast import collect, intervene
from intfast.collect import Found
from intfast.evaluate import Estimate, Evaluation, bootstrap, compare, coverage
from intfast.run import Run

ARMS = {
    "base": "base",
    "base_rl": "RL",
    "reference": "SFT on references",
    "reference_rl": "SFT on references + RL",
    "reflection": "SFT on self-reflections",
    "reflection_rl": "SFT on self-reflections + RL",
    "rft": "SFT on right attempts (RFT)",
    "rft_rl": "RFT + RL",
    "star": "STaR rationalisation",
    "star_rl": "STaR + RL",
    "prefix": "SFT on beginnings (UPFT)",
    "prefix_rl": "UPFT + RL",
    "int": "InT",
    "int_rl": "InT + RL",
}
"""Stored name of an evaluation -> its row in the table, in this order."""
STARTS = {
    "intervention": "prefix + intervention",
    "error": "prefix + wrong step",
    "prefix": "prefix alone",
}


def intervention_figures(run: Run, found: Found) -> dict[str, Any]:
    """Counts of the gates, and accuracy and coverage of continuing from each start.

    Attempts are the unit that is continued; a problem is covered when any of its attempts is.
    """
    config = run.config.intervene
    gates = Counter(record.gate for record in found.interventions)
    continued = [r for r in found.interventions if r.gate in intervene.REACHED_CONTINUATION]
    starts = {}
    for start in STARTS:
        drawn = [record for record in found.continuations if record.start == start]
        if drawn:
            early = start == "intervention" and config.stop != "never"
            first = config.wave if early else None
            starts[start] = intervene.start_figures(continued, drawn, run.config.seed, first)
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
        "problem_alone": _problem_figures(run, found) if found.attempts else None,
        "continued_from": starts,
        "generated_tokens": tokens,
        "unlocked_problems": unlocked,
        "tokens_per_unlocked_problem": sum(tokens.values()) / unlocked if unlocked else None,
        "examples": len(found.examples),
        "loss_tokens": sum(w != 0 for e in found.examples for w in e.weights),
    }


def _problem_figures(run: Run, found: Found) -> dict[str, Any]:
    """The attempts on the selected problems: what starting from the problem alone gives.

    With `attempts.unsolved_only` nothing of it is right, because that is how they were selected.
    """
    counts: dict[str, list[int]] = {problem.id: [0, 0] for problem in found.selected}
    for record in found.attempts:
        if record.problem_id in counts and record.grade != "unscored":
            counts[record.problem_id][0] += 1
            counts[record.problem_id][1] += record.grade == "correct"
    tried = [(num, right) for num, right in counts.values() if num]
    shares = [right / num for num, right in tried]
    low, high = bootstrap(shares, run.config.seed)
    return {
        "attempts": sum(num for num, _ in tried),
        "per_problem": sum(num for num, _ in tried) / len(tried),
        "accuracy": Estimate(
            value=sum(shares) / len(shares), low=low, high=high, num_problems=len(shares)
        ),
        "problem_coverage": coverage(tried),
        "zero_by_selection": run.config.attempts.unsolved_only,
    }


def say_intervention(run: Run, found: Found) -> None:
    """The InT stage as a table: accuracy and coverage from each start, with their counts."""
    figures = intervention_figures(run, found)
    table = Table(title="Continuing the model's wrong attempts", title_justify="left")
    for column in ("start", "accuracy %", "attempts covered", "problems covered", "continuations"):
        table.add_column(column, justify="left" if column == "start" else "right")
    if alone := figures["problem_alone"]:
        table.add_row(
            "problem alone: the attempts",
            "0 by selection" if alone["zero_by_selection"] else _interval(alone["accuracy"], 2),
            "",
            _share(alone["problem_coverage"]),
            f"{alone['attempts']:,} ({alone['per_problem']:.0f} per problem)",
        )
    for start, row in figures["continued_from"].items():
        table.add_row(
            STARTS[start],
            _interval(row["accuracy"], 2),
            _share(row["attempt_coverage"]),
            _share(row["problem_coverage"]),
            f"{row['continuations']:,} ({row['per_attempt']:.0f} each)",
        )
    if figures["continued_from"]:
        run.metrics.console.print(table)
    cost = figures["tokens_per_unlocked_problem"]
    run.metrics.say(
        f"{figures['unlocked_problems']} of {figures['problems']} problems unlocked"
        + (f" at {cost:,.0f} generated tokens each" if cost else "")
        + f"; {figures['examples']} examples with {figures['loss_tokens']} loss tokens"
    )


def write(run: Run, found: Found, seconds: float) -> dict[str, Any]:
    """Print the final tables and write summary.json; returns its content."""
    stored = run.folder.read_json("evaluations.json") or {}
    evaluations = {
        name: msgspec.convert(stored[name], Evaluation) for name in ARMS if name in stored
    }
    ks = run.config.evaluate.ks
    rows = {name: evaluation.summary(ks) for name, evaluation in evaluations.items()}
    rl = {name: _rl_figures(run, name) for name in ARMS if run.metrics.rows(name)}
    result = {
        "evaluations": rows,
        "differences": {
            f"{best} - {name}": compare(evaluations[best], evaluations[name])
            for best in list(evaluations)[-1:]
            for name in evaluations
            if name != best
        },
        "intervention": intervention_figures(run, found) if found.interventions else None,
        "rl": rl,
        "generated_tokens": collect.generated_tokens(run)
        | {name: collect.rl_tokens(run, name) for name, figures in rl.items() if figures},
        "seconds": run.metrics.seconds(),
        "seconds_last_process": seconds,
    }
    run.folder.write_json("summary.json", result)
    if rows:
        run.metrics.console.print(_table(run, rows, result["rl"]))
    _say_seconds(run, result["seconds"])
    run.metrics.say(f"everything is in {run.folder.path}")
    return result


def _rl_figures(run: Run, name: str) -> dict[str, Any]:
    rows = [row for row in run.metrics.rows(name) if "reward" in row]
    if not rows:
        return {}
    keys = ("reward", "zero_advantage", "all_wrong", "all_right")
    quarter = max(1, len(rows) // 4)
    return {
        "steps": len(rows),
        "sampled_tokens": sum(row["sampled_tokens"] for row in rows),
        "verify_tokens": sum(row.get("verify_tokens", 0) for row in rows),
        "first_quarter": {k: sum(r[k] for r in rows[:quarter]) / quarter for k in keys},
        "last_quarter": {k: sum(r[k] for r in rows[-quarter:]) / quarter for k in keys},
    }


def _table(run: Run, rows: dict[str, Any], rl: dict[str, Any]) -> Table:
    config = run.config.evaluate
    table = Table(
        title=f"Held-out problems: {len(run.tests)}, {config.samples} samples each, "
        "95 % intervals (bootstrap over problems)",
        title_justify="left",
        caption="* of the groups in the first -> last quarter of the RL steps. An interval without "
        "width says that all problems gave the same, not that it is certain.",
        caption_justify="left",
    )
    table.add_column("weights")
    table.add_column("accuracy %", justify="right")
    for k in config.ks:
        if k > 1:
            table.add_column(f"pass@{k} %", justify="right")
    table.add_column("zero-advantage share*", justify="right")
    for name, summary in rows.items():
        figures = rl.get(name) or {}
        shares = (
            f"{figures['first_quarter']['zero_advantage']:.2f} -> "
            f"{figures['last_quarter']['zero_advantage']:.2f}"
            if figures
            else ""
        )
        estimates = [summary.pass_at_k[k] for k in config.ks if k > 1]
        table.add_row(
            ARMS[name], *(_interval(e, 1) for e in (summary.accuracy, *estimates)), shares
        )
    return table


def _say_seconds(run: Run, seconds: dict[str, dict[str, float]]) -> None:
    table = Table(title="Seconds", title_justify="left")
    phases = sorted({phase for split in seconds.values() for phase in split})
    table.add_column("stage")
    for phase in (*phases, "all"):
        table.add_column(phase, justify="right")
    for stage, split in seconds.items():
        cells = [f"{split[phase]:.1f}" if phase in split else "" for phase in phases]
        table.add_row(stage, *cells, f"{sum(split.values()):.1f}")
    run.metrics.console.print(table)


def _interval(estimate: Estimate, digits: int) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _share(estimate: Estimate) -> str:
    return f"{round(estimate.value * estimate.num_problems)} of {estimate.num_problems}"
