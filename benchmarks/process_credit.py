"""RL on the outcome, with VPPO and with CAPO: accuracy, reward, and tokens, from the same base.

Plain RL from the base model of the config, the same steps and problems in every arm; the tokens of
verification are counted apart. Interrupted, it continues.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import msgspec

from intfast import config_io, train

NAME = "process_credit"
ARMS = {
    "outcome": [],
    "vppo": ["rl.credit.process=vppo", "rl.credit.process_margin=0"],
    "capo": ["rl.credit.process=capo"],
}
"""Arm -> settings. The margin of VPPO is a prompt's length, longer than most of these answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which config, and what to change about it."""
    parser.add_argument("--config", default="configs/quickstart.toml", help="%(default)s")
    parser.add_argument("--runs", default="runs/process_credit", help="folder (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], help="settings: key=value ...")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row, and its table on the console."""
    figures, setting, first = {}, {}, None
    for name, changes in ARMS.items():
        folder = Path(args.runs) / f"{name}-{args.seed}"
        words = [f"run={folder}", f"seed={args.seed}", "sft.epochs=0", "rl.from_base=false"]
        words += [f"model.threads={args.threads}"] * bool(args.threads)
        config = config_io.load(
            Path(args.config), [*words, "analysis.texts=0", *changes, *args.set]
        )
        if first is not None and not (folder / "attempts.jsonl").exists():
            # The arms differ in nothing before RL.
            folder.mkdir(parents=True)
            for file in ("attempts.jsonl", "evaluations.json"):
                shutil.copyfile(first / file, folder / file)
            stored = msgspec.json.decode((folder / "evaluations.json").read_bytes())
            data = msgspec.json.encode({"base": stored["base"]})
            (folder / "evaluations.json").write_bytes(data)
        summary = train.run(config)
        first = first or folder
        setting = msgspec.json.decode((folder / "manifest.json").read_bytes())
        figures[name] = {
            "settings": changes,
            "evaluations": summary["evaluations"],
            "rl": summary["rl"]["base_rl"],
        }
    print(table(figures))
    return [{"setting": setting, "figures": msgspec.to_builtins(figures, str_keys=True)}]


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    lines = [
        "| RL from the base on | accuracy % | problems covered | reward, first -> last quarter | "
        "sampled tokens | of verification |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = {"nothing: the base": next(iter(figures.values()))["evaluations"]["base"]}
    rows |= {name: row["evaluations"]["base_rl"] for name, row in figures.items()}
    for name, found in rows.items():
        value, low, high = (100 * getattr(found.accuracy, k) for k in ("value", "low", "high"))
        covered = round(found.coverage.value * found.coverage.num_problems)
        cells = ["", "", ""]
        if rl := figures.get(name, {}).get("rl"):
            first, last = rl["first_quarter"]["reward"], rl["last_quarter"]["reward"]
            cells = [
                f"{first:.4f} -> {last:.4f}",
                f"{rl['sampled_tokens']:,}",
                f"{rl['verify_tokens']:,}",
            ]
        lines.append(
            f"| {name} | {value:.2f} [{low:.2f}, {high:.2f}] | "
            f"{covered} of {found.coverage.num_problems} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)
