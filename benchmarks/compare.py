"""The figures of a finished comparison, kept as a row: every arm, at equal steps and equal tokens.

Run `python -m intfast.compare configs/quickstart.toml` first; this only reads its folder. The row
carries the commit and versions of the runs beside those of this command.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from intfast.study.read import read_rows

NAME = "compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which comparison."""
    default = Path("runs/quickstart")
    parser.add_argument("--run", type=Path, default=default, help="%(default)s")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row; prints the tables that compare.md holds."""
    if not (args.run / "compare.json").is_file():
        raise SystemExit(f"{args.run} has no compare.json; run python -m intfast.compare first")
    folders = sorted(path.parent for path in args.run.glob("seed-*/*/manifest.json"))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    commits = sorted({str(manifest["commit"]) for manifest in manifests})
    shown = next((folder for folder in folders if folder.name == "int_rl"), folders[-1])
    config = tomllib.loads((shown / "config.toml").read_text())
    sections = ("data", "attempts", "intervene", "sft", "rl", "evaluate")
    print((args.run / "compare.md").read_text())
    args.run = str(args.run)
    found = json.loads((Path(args.run) / "compare.json").read_text())
    seconds = sum(map(_seconds, folders))
    return [
        {
            "setting": {
                "commits_of_the_runs": commits,
                "manifest": manifests[0],
                "config_of_an_arm": {name: config[name] for name in sections},
            },
            # Of one process on one thread, interruptions left out; the machine may be shared.
            "figures": found | {"seconds_of_all_runs": round(seconds)},
        }
    ]


def _seconds(folder: Path) -> float:
    """Seconds that the rows of a run account for; an arm without an example has no rows."""
    return sum(
        value
        for row in read_rows(folder / "metrics.jsonl")
        for name, value in row.items()
        if name.startswith("seconds_")
    )
