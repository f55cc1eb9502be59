"""The run that is disturbed: every stage of the quickstart, small; and what it comes to."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from benchmarks.quickstart_task import task
from intfast import cli
from intfast.config import Config
from intfast.study.read import read_rows

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = CONFIGS / "quickstart" / "base"
SETTINGS = (
    f"model.path={MODEL}",
    "sampling.max_new_tokens=26",
    "attempts.samples=4",
    "attempts.max_problems=4",
    "attempts.wrong_per_problem=2",
    "intervene.samples=2",
    "intervene.continuations=2",
    "intervene.wave=1",
    "sft.epochs=3",
    "sft.batch_size=3",
    "rl.steps=4",
    "rl.problems_per_step=3",
    "rl.group_size=8",
    "rl.minibatches=2",
    "rl.checkpoint_every=2",
    "rl.from_base=false",
    "evaluate.samples=4",
    "evaluate.ks=[1,4]",
)
RECORDS = ("problems", "attempts", "interventions", "continuations", "examples")
STEP_VALUES = ("stage", "step", "loss", "nll_mean", "grad_norm", "lr", "reward", "length")
STAGES = ("int", "int_rl")


def prepare(folder: Path, seed: int) -> None:
    """Write problems of one definition each: short texts, and some of them right by chance."""
    rng = random.Random(seed)
    drawn: dict[str, dict[str, str]] = {}
    while len(drawn) < 8:
        row = task.problem_row(task.random_instance(rng, 1, 1), f"p{len(drawn)}")
        drawn.setdefault(row["problem"], row)
    rows = list(drawn.values())
    for name, part in (("train", rows[:6]), ("test", rows[6:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)


def words(folder: Path, run: str) -> list[str]:
    """What follows `python -m intfast.train` for the run `run` in a prepared folder."""
    data = [f"data.{name}={folder / name}.jsonl" for name in ("train", "test")]
    return [str(CONFIGS / "quickstart_short.toml"), *SETTINGS, *data, f"run={folder / run}"]


def config(folder: Path, run: str) -> Config:
    """The settings of that run."""
    file, *overrides = words(folder, run)
    return cli.load(file, overrides)


def outcome(run: Path) -> dict[str, str]:
    """Digests of all that a finished run concluded: records, weights, moments, step values.

    Left out are times, and what counts them.
    """
    files = [run / f"{name}.jsonl" for name in RECORDS]
    files += [run / "evaluations.json", *sorted((run / "export").iterdir())]
    for stage in STAGES:
        files += sorted((run / "checkpoints" / stage).glob("step-*/*"))
    found = {str(file.relative_to(run)): _digest(file.read_bytes()) for file in files}
    rows = read_rows(run / "metrics.jsonl", finished=True)
    steps = [
        {key: row[key] for key in STEP_VALUES if key in row}
        for row in rows
        if row["stage"] in STAGES
    ]
    return found | {"steps": _digest(json.dumps(steps).encode())}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
