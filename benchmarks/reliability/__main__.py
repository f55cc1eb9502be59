"""Run one campaign, print its figures, append them to benchmarks/results, and fail if it failed.

    python -m benchmarks.reliability NAME [--trials N] [--seed S]

A campaign is a module of this folder with a docstring, TRIALS and `run(trials, seed) -> dict`. Its
figures hold "passed": whether the promise held, and "control_failed": whether the deliberately
broken variants were caught, without which a pass says nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks import harness

NOT_CAMPAIGNS = ("__init__", "__main__", "kill_ranks")


def names() -> list[str]:
    """The campaigns: modules of this folder that have a `run`."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [f.stem for f in files if f.stem not in NOT_CAMPAIGNS and "\ndef run(" in f.read_text()]


def main() -> int:
    """The command line; returns 0 when the promise held and the controls failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=names())
    parser.add_argument("--trials", type=int, help="default: that of the campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="of a killed run (2: kill alone)")
    parser.add_argument(
        "--results", type=Path, default=harness.RESULTS, help="folder (%(default)s)"
    )
    args = parser.parse_args()
    if args.ranks > 1 and args.name != "kill":
        parser.error(f"--ranks: expected 1 for {args.name}, got {args.ranks}; only kill has ranks")
    module = "kill_ranks" if args.ranks > 1 else args.name
    campaign = importlib.import_module(f"benchmarks.reliability.{module}")
    args.trials = args.trials or campaign.TRIALS
    args.device = "cpu"
    start = time.perf_counter()
    more = (args.ranks,) if args.ranks > 1 else ()
    figures = campaign.run(args.trials, args.seed, *more)
    for key, value in figures.items():
        print(f"  {key}: {value}")
    row = {"figures": figures | {"seconds": round(time.perf_counter() - start, 1)}}
    harness.append(f"reliability/{module}", row, args, program="python -m benchmarks.reliability")
    return 0 if figures["passed"] and figures["control_failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
