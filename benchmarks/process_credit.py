"""RL on the outcome, with VPPO and with CAPO: accuracy, reward, and tokens, from the same weights.

RL from the base model of the config, or from its InT stage; the same steps and problems in every
arm, means over seeds. The tokens of verification are counted apart. Interrupted, it continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli
from intfast.evaluate import Evaluation
from intfast.methods import process_credit
from intfast.study import derive
from intfast.study.compare_table import accuracy, difference, pooled
from intfast.study.finish import train

NAME = "process_credit"
ARMS = {
    "outcome": [],
    "vppo": ["rl.credit.process=vppo"],
    "capo": ["rl.credit.process=capo"],
}
"""Arm -> settings."""
MARGIN = 0.0
"""Of VPPO here: its default is a prompt's length, longer than most of these answers."""
SHARED = ("attempts.jsonl", "interventions.jsonl", "continuations.jsonl")
"""The arms differ in nothing before RL."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which config, where RL starts, and what to change."""
    parser.add_argument("--config", default="configs/quickstart.toml", help="%(default)s")
    parser.add_argument("--start", default="base", choices=("base", "int"), help="%(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="%(default)s")
    parser.add_argument("--runs", default="runs/process_credit", help="folder (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], help="settings: key=value ...")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row, and its table on the console."""
    found = {seed: {name: arm(args, name, seed) for name in ARMS} for seed in args.seeds}
    evaluations = {
        name: {seed: arms[name]["evaluations"][f"{args.start}_rl"] for seed, arms in found.items()}
        for name in ARMS
    }
    starts = {seed: arms["outcome"]["evaluations"][args.start] for seed, arms in found.items()}
    figures = {args.start: row(starts, starts, [])}
    for name in ARMS:
        training = [arms[name]["rl"] for arms in found.values()]
        figures[name] = row(evaluations[name], evaluations["outcome"], training)
    print(table(figures))
    setting = {"arms": ARMS, "manifests": [arms["outcome"]["manifest"] for arms in found.values()]}
    return [{"setting": setting, "figures": msgspec.to_builtins(figures, str_keys=True)}]


def arm(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Run one arm with one seed, or read what it wrote: its evaluations, RL figures, manifest."""
    folder = Path(args.runs) / f"{args.start}-{name}-{seed}"
    first = Path(args.runs) / f"{args.start}-outcome-{seed}"
    words = [f"run={folder}", f"seed={seed}", "rl.from_base=false", "analysis.texts=0"]
    words += ["intervene.baselines=false"] + ["sft.epochs=0"] * (args.start == "base")
    words += [f"model.threads={args.threads}"] * bool(args.threads)
    if not (folder / "summary.json").exists():
        if folder != first and not (folder / "attempts.jsonl").exists():
            derive.give(first, folder, SHARED)
            stored = read(first / "evaluations.json")
            data = msgspec.json.encode({"base": stored["base"]})
            (folder / "evaluations.json").write_bytes(data)
        process_credit.MARGIN = MARGIN
        train(cli.load(Path(args.config), [*words, *ARMS[name], *args.set]))
    stored = read(folder / "evaluations.json")
    return {
        "evaluations": {key: msgspec.convert(value, Evaluation) for key, value in stored.items()},
        "rl": read(folder / "summary.json")["rl"][f"{args.start}_rl"],
        "manifest": read(folder / "manifest.json"),
    }


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return msgspec.json.decode(path.read_bytes())


def row(
    evaluations: dict[int, Evaluation],
    outcome: dict[int, Evaluation],
    training: list[dict[str, Any]],
) -> dict[str, Any]:
    """Pooled figures of one arm beside RL on the outcome alone; tokens are means over seeds."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "accuracy": pooled(evaluations, accuracy),
        "by_seed": {seed: pooled({0: e}, accuracy).value for seed, e in evaluations.items()},
        "ahead_of_outcome": difference(evaluations, outcome),
        "covered": mean([sum(p.correct > 0 for p in e.problems) for e in evaluations.values()]),
        "problems": len(next(iter(evaluations.values())).problems),
    } | {
        name: mean([value(found) for found in training])
        for name, value in {
            "first_reward": lambda found: found["first_quarter"]["reward"],
            "last_reward": lambda found: found["last_quarter"]["reward"],
            "sampled_tokens": lambda found: found["sampled_tokens"],
            "verify_tokens": lambda found: found["verify_tokens"],
        }.items()
        if training
    }


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    lines = [
        "| RL on | accuracy % | by seed | ahead of outcome by, points | problems covered | "
        "reward, first -> last quarter | sampled tokens | of verification |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in figures.items():
        cells = ["", "", "", ""]
        if "last_reward" in found:
            cells = [
                _points(found["ahead_of_outcome"]) if name != "outcome" else "",
                f"{found['first_reward']:.3f} -> {found['last_reward']:.3f}",
                f"{found['sampled_tokens']:,.0f}",
                f"{found['verify_tokens']:,.0f}",
            ]
        by_seed = " ".join(f"{100 * value:.1f}" for value in found["by_seed"].values())
        title = name if "last_reward" in found else f"nothing: {name}"
        covered = f"{found['covered']:.0f} of {found['problems']}"
        lines.append(
            f"| {title} | {_points(found['accuracy'])} | {by_seed} | {cells[0]} | {covered} | "
            f"{' | '.join(cells[1:])} |"
        )
    return "\n".join(lines)


def _points(estimate: Any) -> str:
    value, low, high = (100 * getattr(estimate, key) for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
