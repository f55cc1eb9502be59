"""A comparison in which the SFT of each arm has its own best settings, chosen on other problems.

Each of GRID's settings is tried with one seed; the best accuracy after RL (before it, for an arm
without) decides, on training problems that the comparison leaves out. Then the table, with other
seeds and the held-out problems. Interrupted, it continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from intfast import cli
from intfast.state.metrics import make_console
from intfast.study import compare, derive

NAME = "tuned_compare"
RATES = [f"sft.optim.lr={rate}" for rate in ("2.5e-4", "5e-4", "1e-3", "2e-3")]
GRID = {
    "int_rl": [RATES, ["sft.target=recipe", "sft.target=no_filter"]],
    "reference_rl": [RATES, ["sft.epochs=8", "sft.epochs=16"]],
    "reflection_rl": [RATES, ["sft.target=one_per_problem", "sft.target=recipe"]],
    "star": [RATES, ["sft.target=one_per_problem", "sft.target=recipe"]],
}
"""Arm -> choices that are combined; as many combinations for each."""
TRIALS = {arm: list(itertools.product(*choices)) for arm, choices in GRID.items()}
NUM_TRIALS = len(TRIALS["int_rl"])
SHARED = ("evaluations.json", "attempts.jsonl", "interventions.jsonl", "continuations.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which config, seeds, and folder."""
    parser.add_argument("--config", default="configs/compare_quickstart.toml", help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuned_compare"), help="%(default)s")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of the table (%(default)s)")
    parser.add_argument("--tune-seed", type=int, default=10, help="of the trials (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], help="settings: key=value ...")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row, and its tables on the console."""
    for number in range(NUM_TRIALS):
        trial(args, number)
    tried = {arm: [accuracy(args, number, arm) for number in range(NUM_TRIALS)] for arm in GRID}
    best = {arm: max(range(NUM_TRIALS), key=values.__getitem__) for arm, values in tried.items()}
    own = [f"{arm}:{word}" for arm, number in best.items() for word in TRIALS[arm][number]]
    words = [*args.set, *own, f"seeds={args.seeds}", f"run={args.runs / 'table'}"]
    compare.run(compare.read_plan([args.config, *words]), make_console())
    for arm, values in tried.items():
        for number, value in enumerate(values):
            mark = " <- chosen" if number == best[arm] else ""
            print(f"{arm:14} {' '.join(TRIALS[arm][number]):40} {100 * value:5.1f} %{mark}")
    figures = {
        "tried": {
            arm: {" ".join(TRIALS[arm][number]): value for number, value in enumerate(values)}
            for arm, values in tried.items()
        },
        "chosen": {arm: TRIALS[arm][number] for arm, number in best.items()},
        "table": json.loads((args.runs / "table" / "compare.json").read_text()),
    }
    args.runs = str(args.runs)
    return [{"setting": {"tune_seed": args.tune_seed}, "figures": figures}]


def trial(args: argparse.Namespace, number: int) -> None:
    """Run every arm of GRID with its `number`-th combination; the collection is that of the 0th."""
    folder = args.runs / f"trial-{number}"
    base = cli.load(args.config, args.set)
    validation = args.runs / "validation.jsonl"
    if not validation.exists():
        rows = Path(base.data.train).read_text().splitlines()[base.data.train_limit or None :]
        if not rows:
            raise SystemExit("data.train_limit leaves no problem out to choose settings on")
        validation.parent.mkdir(parents=True, exist_ok=True)
        validation.write_text("".join(f"{row}\n" for row in rows))
    own = [f"{arm}:{word}" for arm, trials in TRIALS.items() for word in trials[number]]
    words = [f"arms={','.join(GRID)}", f"seeds={args.tune_seed}", "equal_tokens=false"]
    words += [f"data.test={validation}", f"run={folder}"]
    shared, ours = (args.runs / f"trial-{n}/seed-{args.tune_seed}/collection" for n in (0, number))
    if number:
        derive.give(shared, ours, SHARED)
    compare.run(compare.read_plan([args.config, *args.set, *words, *own]), make_console())


def accuracy(args: argparse.Namespace, number: int, arm: str) -> float:
    """Accuracy of an arm in a finished trial, on the validation problems; 0 without an example."""
    found = json.loads((args.runs / f"trial-{number}" / "compare.json").read_text())
    return (found["arms"][arm]["accuracy"] or {"value": 0.0})["value"]
