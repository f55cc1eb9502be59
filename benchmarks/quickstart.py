"""The figures of a finished quickstart run, kept as a row: accuracy, coverage, where time went.

Run `python -m intfast.train configs/quickstart.toml run=runs/quickstart_int` first; this only reads
its folder. The row carries the commit and versions of that run beside those of this command.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.quickstart_task import task
from intfast.study.read import read_rows

NAME = "quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run."""
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart_int"), help="%(default)s")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row, and the tables of the README on the console."""
    if not (args.run / "summary.json").is_file():
        raise SystemExit(
            f"{args.run} has no summary.json; run python -m intfast.train configs/quickstart.toml "
            f"run={args.run}"
        )
    summary = json.loads((args.run / "summary.json").read_text())
    manifest = json.loads((args.run / "manifest.json").read_text())
    seconds = {
        f"{stage}/{phase}": value
        for stage, phases in summary["seconds"].items()
        for phase, value in phases.items()
    }
    total = sum(seconds.values())
    figures = {
        "evaluations": {
            name: {
                "accuracy": found["accuracy"],
                "pass_at_k": found["pass_at_k"],
                "num_samples": found["num_samples"],
            }
            for name, found in summary["evaluations"].items()
        },
        "differences": summary["differences"],
        "intervention": summary["intervention"],
        "oracle": oracle(args.run),
        "rl": summary["rl"],
        "share_of_time": {key: round(value / total, 3) for key, value in seconds.items()},
    }
    for name in ("analysis", "ablations"):
        if (args.run / f"{name}.json").is_file():
            figures[name] = json.loads((args.run / f"{name}.json").read_text())
    print(tables(figures))
    args.run = str(args.run)
    return [{"setting": manifest, "figures": figures}]


def oracle(folder: Path) -> dict[str, Any]:
    """What the task's own rules say of the verifications: for reporting only."""

    def records(name: str) -> list[dict[str, Any]]:
        return read_rows(folder / f"{name}.jsonl", finished=True)

    problems = {row["id"]: row["problem"] for row in records("problems")}
    texts = {(row["problem_id"], row["sample"]): row["text"] for row in records("attempts")}
    interventions = records("interventions")
    located = [row for row in interventions if row["location"]]
    found = Counter(verified=len(interventions), candidates=len(located))
    for row in located:
        problem, content = problems[row["problem_id"]], row["content"].strip()
        # Intervention.location counts from 1, the oracle from 0.
        wrong = task.first_wrong_step(problem, texts[row["problem_id"], row["attempt"]])
        found["location_right"] += wrong == row["location"] - 1
        name, *_, value, _ = content.split()
        values = task.true_values(problem)
        found["value_right"] += values.get(name) == int(value)
        # Reading and value.
        steps = {d.target: d for d in task.parse_body(problem).definitions}
        is_step = name in steps and content == task.step_text(steps[name], values, task.RIGHT)
        found["step_right"] += is_step and wrong == row["location"] - 1
    return dict(found)


def tables(figures: dict[str, Any]) -> str:
    """The two Markdown tables of the README."""
    names = {"base": "base", "base_rl": "RL", "int": "InT", "int_rl": "InT + RL"}
    ks = sorted(map(int, figures["evaluations"]["base"]["pass_at_k"]))[1:]
    lines = [
        "| weights | accuracy % | "
        + " | ".join(f"pass@{k} %" for k in ks)
        + " | zero-advantage share of the groups, first -> last quarter of RL |",
        "| --- " * (3 + len(ks)) + "|",
    ]
    for name, label in names.items():
        found = figures["evaluations"][name]
        cells = [found["accuracy"], *(found["pass_at_k"][str(k)] for k in ks)]
        rl = figures["rl"].get(name) or {}
        share = (
            f"{rl['first_quarter']['zero_advantage']:.2f} -> "
            f"{rl['last_quarter']['zero_advantage']:.2f}"
            if rl
            else ""
        )
        lines.append(f"| {label} | " + " | ".join(map(_interval, cells)) + f" | {share} |")
    lines += ["", "| continued from | accuracy % | attempts covered | problems covered |"]
    lines.append("| --- | --- | --- | --- |")
    for start, found in figures["intervention"]["continued_from"].items():
        label = {"intervention": "prefix + intervention", "error": "prefix + wrong step"}
        lines.append(
            f"| {label.get(start, 'prefix alone')} | {_interval(found['accuracy'], 2)} | "
            f"{_share(found['attempt_coverage'])} | {_share(found['problem_coverage'])} |"
        )
    return "\n".join(lines)


def _interval(estimate: dict[str, float], digits: int = 1) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _share(estimate: dict[str, float]) -> str:
    return f"{round(estimate['value'] * estimate['num_problems'])} of {estimate['num_problems']}"
