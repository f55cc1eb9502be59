"""Who wins on the quickstart's task and where it flips: a table on fresh problems, and cells.

    python -m benchmarks evidence [--only table | --only cells] [--arms all] [--bases ...]

The table compares the arms at equal steps and at equal tokens, with terse (q = 1) and with complete
references (q = 0), on problems of a seed that nothing else uses, with the quickstart's settings:
its SFT strength, hard, is the best that was tried for each arm. A cell changes one thing on the
quickstart's own problems, on which the knobs were set: how terse the references are, how hard SFT
is, how many problems there are, and how complete whole solutions in the model's own dialect are
that a program wrote, right in every step. One row for each table and one for all cells that are
done. Interrupted, the command continues.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import quickstart
from benchmarks.quickstart_task import task
from intfast.engine.protocol import derive_seed
from intfast.state.files import read_json
from intfast.state.metrics import make_console
from intfast.study import compare, derive
from intfast.study.arms import ARMS

NAME = "evidence"
CONFIG = "configs/quickstart.toml"
SHIPPED = Path("configs/quickstart/base")
STRENGTHS = {
    "light": ["sft.optim.lr=2.5e-4", "sft.epochs=8"],
    "middle": ["sft.optim.lr=1e-3", "sft.epochs=8"],
    "hard": ["sft.optim.lr=2e-3", "sft.epochs=16"],
}
FRESH = 2
"""The problem seed of the table. Seed 1 was looked at with middle SFT, which is not InT's best."""
TABLE = task.SPLITS
MAIN = "base,rl,reference,reference_rl,reflection,reflection_rl,int,int_rl"
RIVALS = "reference,reference_rl,reflection,reflection_rl,int,int_rl"
SHARED = ("evaluations.json", "attempts.jsonl")


class Cell(NamedTuple):
    """What is changed: everything else is the quickstart."""

    q: float = 1.0
    strength: str = "hard"
    problems: int = 96
    rewrite: float | None = None
    """r of a program's rewrites, right in every step, in the place of the references."""

    @property
    def name(self) -> str:
        """The folder of the cell."""
        rewrite = "" if self.rewrite is None else f"-r{self.rewrite:g}"
        return f"q{self.q:g}-{self.strength}-{self.problems}{rewrite}"

    def words(self) -> list[str]:
        """Its settings, for every arm; with fewer problems, as many SFT updates."""
        rate, epochs = STRENGTHS[self.strength]
        num, more = epochs.split("=")[1], 96 // self.problems
        words = [rate, f"sft.epochs={int(num) * more}", f"attempts.max_problems={self.problems}"]
        # The arm `reference` alone: the verifications would read the program's rewrites too.
        arms = RIVALS if self.rewrite is None else "reference,reference_rl"
        return [*words, f"arms={arms}", "equal_tokens=false"]


CELLS = [Cell(q, strength) for strength in ("hard", "middle") for q in (1.0, 0.0, 0.5, 0.25)]
CELLS += [Cell(rewrite=r) for r in (0.0, 0.1, 0.25)]
CELLS += [Cell(q, problems=32) for q in (0.0, 1.0)]
CELLS += [Cell(q, "light") for q in (0.0, 1.0)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, and where."""
    parser.add_argument("--only", choices=("table", "cells"), help="the one or the other")
    parser.add_argument("--arms", default=MAIN, help="of the table, or all (%(default)s)")
    parser.add_argument("--q", type=float, nargs="*", default=[1.0, 0.0], help="of the tables")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of the table (%(default)s)")
    parser.add_argument("--cell-seeds", default="10", help="of the cells (%(default)s)")
    parser.add_argument("--cells", nargs="*", default=[], help="their names (all)")
    parser.add_argument("--bases", type=Path, nargs="*", default=[SHIPPED], help="model folders")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="%(default)s")
    parser.add_argument("--set", nargs="*", default=[], help="settings: key=value ...")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each table, and one for the cells of each base."""
    rows = []
    for base in args.bases:
        if args.only != "cells":
            rows += [table(args, base, q) for q in args.q]
        if args.only != "table":
            rows.append(cells(args, base))
    args.runs, args.bases = str(args.runs), [str(base) for base in args.bases]
    return rows


def table(args: argparse.Namespace, base: Path, q: float) -> dict[str, Any]:
    """The arms on fresh problems with references of terseness q."""
    folder = args.runs / f"{base.name}-fresh"
    words = [f"seeds={args.seeds}", "equal_tokens=true"]
    words.append(f"arms={','.join(ARMS) if args.arms == 'all' else args.arms}")
    data, ours = _problems(folder, FRESH, q, TABLE), folder / f"q{q:g}"
    _share(folder, ours, args.seeds)
    found = _compare(args, base, ours, [*data, *words])
    commits = {read_json(path)["commit"] for path in ours.glob("seed-*/*/manifest.json")}
    setting = {"base": base.name, "q": q, "problem_seed": FRESH, "problems": TABLE}
    setting["commits_of_the_runs"] = sorted(commits)
    verified = {path.parent.name: quickstart.oracle(path) for path in ours.glob("seed-*/int_rl")}
    return {"setting": setting, "figures": {"table": found, "verified": verified}}


def cells(args: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Every cell on the problems of the quickstart; who wins there."""
    folder = args.runs / f"{base.name}-cells"
    unknown = set(args.cells) - {cell.name for cell in CELLS}
    if unknown:
        names = ", ".join(cell.name for cell in CELLS)
        raise SystemExit(f"no cell {', '.join(sorted(unknown))}; cells are {names}")
    for cell in CELLS:
        if args.cells and cell.name not in args.cells:
            continue
        ours = folder / cell.name
        _share(folder, ours, args.cell_seeds)
        data = _problems(folder, 0, cell.q, task.SPLITS, cell.rewrite)
        words = [*data, *cell.words(), f"seeds={args.cell_seeds}"]
        _compare(args, base, ours, words)
    done = {cell: read_json(folder / cell.name / "compare.json") for cell in CELLS}
    found = [cell._asdict() | {"found": found} for cell, found in done.items() if found]
    return {"setting": {"base": base.name, "strengths": STRENGTHS}, "figures": {"cells": found}}


def _share(root: Path, ours: Path, seeds: str) -> None:
    """Give a comparison what another one in `root` has drawn, whatever its references say: the same
    problems have the same attempts."""
    for seed in seeds.split(","):
        for other in root.glob(f"*/seed-{seed}/collection"):
            # Both are there once the attempts are whole.
            if (other / "interventions.jsonl").exists():
                derive.give(other, ours / f"seed-{seed}/collection", SHARED)


def _compare(
    args: argparse.Namespace, base: Path, folder: Path, words: list[str]
) -> dict[str, Any]:
    """What compare.json of a comparison holds."""
    words = [CONFIG, *args.set, f"model.path={base}", *words, f"run={folder}"]
    compare.run(compare.read_plan(words), make_console())
    return json.loads((folder / "compare.json").read_text())


def _problems(
    folder: Path, seed: int, q: float, counts: dict[str, int], rewrite: float | None = None
) -> list[str]:
    """Write the problem files that are missing; the settings that name them."""
    train = folder / f"train-q{q:g}{'' if rewrite is None else f'-r{rewrite:g}'}.jsonl"
    test = folder / "test.jsonl"
    if not train.exists():
        rows = task.problem_rows(seed, "train", counts["train"], q)
        task.write_rows(train, rows if rewrite is None else [_rewritten(r, rewrite) for r in rows])
    if not test.exists():
        task.write_rows(test, task.problem_rows(seed, "test", counts["test"]))
    return [f"data.train={train}", f"data.test={test}"]


def _rewritten(row: dict[str, str], share: float) -> dict[str, str]:
    """The row with a right solution in the model's dialect as its reference; what the reference
    left out is missing with probability `share`."""
    instance = task.parse_body(row["problem"])
    *lines, _ = row["reference_solution"].split(" , ")
    stated = {line.split(" -> ")[1].split()[0] for line in lines}
    omit = {d.target for d in instance.definitions} - stated
    rng = random.Random(derive_seed(0, "rewritten", row["id"]))
    values = task.evaluate(instance, task.RIGHT)
    text = task.solution_text(rng, instance, values, task.RIGHT, omit, share)
    return row | {"reference_solution": text}
