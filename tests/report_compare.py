"""A finished comparison made by hand, without a model, for the tests of its page."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
from report_run import RIGHT, evaluation, make_run

from intfast.state.runfolder import write_json
from intfast.study import arms, compare_table

NAMES = ["base", "rl", "reference", "reference_rl", "int", "int_rl"]
FEW = ["evaluate.samples=4", "evaluate.ks=[1, 4]", "rl.steps=16"]
RIGHT_OF = {
    "base_rl": (0, 1, 1),
    "base_rl@16": (0, 0, 1),
    "reference": (3, 1, 2),
    "reference_rl@16": (3, 3, 4),
    "reference_rl": (4, 4, 4),
}
TOKENS = {"attempts": 1000, "verify": 20, "continue": 300, "guided": 0}


def make_comparison(root: Path, seeds: tuple[int, ...] = (0, 1), text: str = "") -> Path:
    """Arms of NAMES with `seeds`; `text` goes into the interventions and the labels."""
    for seed in seeds:
        folder = root / f"seed-{seed}"
        for name in ("int_rl", "rl", "reference_rl"):
            _arm(folder / name, name, seed, text)
        shutil.copytree(folder / "int_rl", folder / "collection")
        (folder / "collection" / "summary.json").unlink()
    own = {"int": [f"sft.epochs=7{text}"]}
    table = compare_table.build(root, NAMES, list(seeds), own, equal_tokens=True)
    found = msgspec.to_builtins(table, str_keys=True)
    for row in found["arms"].values():
        row["label"] += text
    write_json(root / "compare.json", found)
    return root


def _arm(folder: Path, name: str, seed: int, text: str) -> None:
    words = [w for w in arms.ARMS[name].settings if not w.startswith("analysis")]
    own = make_run(folder, *FEW, *words, f"seed={seed}", text=text)
    stage = arms.ARMS[name].weights.key
    right = RIGHT if name == "int_rl" else {"base": RIGHT["base"], **RIGHT_OF}
    wanted = {n: r for n, r in right.items() if n == "base" or n.split("@")[0] in (name, stage)}
    wanted |= {"reference": RIGHT_OF["reference"]} if name == "reference_rl" else {}
    wanted |= {"int": RIGHT["int"]} if name == "int_rl" else {}
    write_json(own / "evaluations.json", {n: evaluation(n, r, text) for n, r in wanted.items()})
    write_json(own / "summary.json", {"generated_tokens": TOKENS, "intervention": None})
    steps = 16 if name == "int_rl" else 20 + seed
    rows = [
        {
            "stage": stage,
            "step": step,
            "reward": (step + seed) / 100,
            "zero_advantage": 0.5,
            "all_wrong": 0.25,
            "length": 80.0 + seed,
            "truncated": 0.0,
            "entropy_sampled": 0.1,
            "sampled_tokens": 10,
        }
        for step in range(1, steps + 1)
    ]
    lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    (own / "metrics.jsonl").write_bytes(lines)
