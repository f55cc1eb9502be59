"""The paper's ablations of the SFT stage on finished runs: `intfast.study ablate`, as a row.

Give run folders of the same problems with different seeds: accuracies are averaged over them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from intfast.evaluate import Estimate, Evaluation, bootstrap
from intfast.study.ablate import ABLATIONS, ablate

NAME = "ablation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs."""
    parser.add_argument("--run", nargs="+", required=True, help="run folders")
    parser.add_argument("--only", nargs="*", default=[], choices=ABLATIONS, help="some of them")
    parser.add_argument("--set", nargs="*", default=[], help="settings: key=value ...")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row over all runs, and its table on the console."""
    names = args.only or list(ABLATIONS)
    found = [ablate(Path(folder), args.set, names=names) for folder in args.run]
    figures = {}
    for name in names:
        by_problem: dict[str, list[float]] = defaultdict(list)
        for rows in found:
            stored = (Path(rows[name]["run"]) / "evaluations.json").read_bytes()
            evaluation = msgspec.convert(msgspec.json.decode(stored)["int"], Evaluation)
            for problem_id, value in evaluation.accuracies().items():
                by_problem[problem_id].append(value)
        means = [sum(values) / len(values) for values in by_problem.values()]
        low, high = bootstrap(means, 0)
        figures[name] = {
            "settings": ABLATIONS[name],
            "accuracy": Estimate(
                value=sum(means) / len(means), low=low, high=high, num_problems=len(means)
            ),
            "by_run": [rows[name]["evaluation"].accuracy.value for rows in found],
            "covered_by_run": [rows[name]["evaluation"].coverage.value for rows in found],
            "samples": found[0][name]["evaluation"].num_samples // len(means),
            "examples": [rows[name]["examples"] for rows in found],
            "loss_tokens": [rows[name]["loss_tokens"] for rows in found],
        }
    print(table(figures))
    return [{"setting": {}, "figures": msgspec.to_builtins(figures, str_keys=True)}]


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    lines = [
        "| trained on | examples | accuracy % | by seed | problems covered % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        value, low, high = (100 * getattr(row["accuracy"], k) for k in ("value", "low", "high"))
        each = ", ".join(f"{100 * value:.1f}" for value in row["by_run"])
        covered = 100 * sum(row["covered_by_run"]) / len(row["covered_by_run"])
        examples = sum(row["examples"]) / len(row["examples"])
        lines.append(
            f"| {name} | {examples:.0f} | {value:.1f} [{low:.1f}, {high:.1f}] | {each} | "
            f"{covered:.0f} |"
        )
    return "\n".join(lines)
