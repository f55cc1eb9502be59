"""How far the texts of a run got: grades of its attempts and gates of its interventions, as a row.

Run `python -m intfast.train CONFIG` first; this only reads its folder, which need not be finished.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from intfast.study.read import read_rows

NAME = "gates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run."""
    parser.add_argument("--run", type=Path, required=True, help="run folder")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row."""
    if not (args.run / "interventions.jsonl").is_file():
        raise SystemExit(
            f"{args.run} has no interventions.jsonl; run python -m intfast.train first"
        )
    manifest = json.loads((args.run / "manifest.json").read_text())
    attempts = read_rows(args.run / "attempts.jsonl")
    candidates = read_rows(args.run / "interventions.jsonl")
    figures = {
        "attempts": dict(Counter(row["reason"] for row in attempts)),
        "candidates": dict(Counter(row["gate"] for row in candidates)),
        "attempted_problems": len({row["problem_id"] for row in attempts}),
    }
    print(f"  {figures}")
    args.run = str(args.run)
    return [{"setting": manifest, "figures": figures}]
