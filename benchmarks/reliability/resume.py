"""Stop before every step of SFT and RL, and continue: the same samples in the same order, once.

A random model and three epochs that do not divide evenly. What each finished step trained on and
the final weights and moments must equal those of an undisturbed run. The control shuffles with a
stream that starts anew in every process.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.quickstart_task import base, task
from benchmarks.reliability.bed import CONFIGS
from benchmarks.reliability.children import Silent
from intfast import cli, rl, sft
from intfast.config import Config
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade, Grader
from intfast.model.decoder import Architecture, Decoder
from intfast.model.weights import save
from intfast.records import Example
from intfast.run import Run, open_run
from intfast.state import checkpoint

TRIALS = 1000
MODEL = base.MODEL_CONFIG | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SAMPLING = "{temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=3}"
SETTINGS = (
    "sft.epochs=3",
    "sft.batch_size=4",
    "rl.steps=5",
    "rl.problems_per_step=4",
    "rl.group_size=4",
    "rl.checkpoint_every=2",
    f"rl.sampling={SAMPLING}",
    "rl.from_base=false",
    "batch.max_tokens=200",
)
NUM_EXAMPLES = 10
Order = list[list[str]]
"""What each step trained on, by name."""


class _Here(BaseException):
    """Raised where a process is made to end."""


def run(trials: int, seed: int) -> dict[str, Any]:
    """Figures of stopping before each of the steps (of the first `trials` of each stage)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, seed)
        found = {stage: _every_step(folder, stage, trials) for stage in ("sft", "rl")}
        with _replaced(sft, "shuffled", _shuffles_anew()):
            broken = course(folder, "control", "sft", stop_before=4)
        control = broken == course(folder, "again", "sft")
    good = all(stage["equal"] == stage["stopped"] for stage in found.values())
    return {
        "passed": good and found["sft"]["each_sample_once_per_epoch"],
        "control_failed": not control,
        **found,
    }


def _every_step(folder: Path, stage: str, trials: int) -> dict[str, Any]:
    whole, digest = course(folder, "whole", stage)
    places = range(1, len(whole) + 1)[:trials]
    equal = [
        course(folder, f"{stage}-{place}", stage, stop_before=place) == (whole, digest)
        for place in places
    ]
    figures: dict[str, Any] = {"steps": len(whole), "stopped": len(equal), "equal": sum(equal)}
    if stage == "sft":
        names = [name for step in whole for name in step]
        epochs = [names[i : i + NUM_EXAMPLES] for i in range(0, len(names), NUM_EXAMPLES)]
        once = all(len(set(epoch)) == len(epoch) == NUM_EXAMPLES for epoch in epochs)
        figures |= {"epochs": len(epochs), "each_sample_once_per_epoch": once}
    return figures


def prepare(folder: Path, seed: int) -> None:
    """A random model and a few problems."""
    torch.manual_seed(seed)
    decoder = Decoder(Architecture.from_hf(MODEL))
    base.initialise(decoder, seed)
    save(decoder, MODEL, folder / "base")
    task.build_tokenizer().save_pretrained(folder / "base")
    for split, count in (("train", 6), ("test", 2)):
        rows = task.problem_rows(seed, split, count)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, run: str) -> Config:
    """The settings of a run in a prepared folder."""
    paths = [f"data.{name}={folder / name}.jsonl" for name in ("train", "test")]
    words = [*SETTINGS, *paths, f"model.path={folder / 'base'}", f"run={folder / run}"]
    return cli.load(CONFIGS / "quickstart_short.toml", words)


def course(folder: Path, run: str, stage: str, stop_before: int = 0) -> tuple[Order, str]:
    """Train a stage, ended before a step (from 1; 0: never) and continued in a new process.

    Returns what the steps trained on, and a digest of the last checkpoint's tensors.
    """
    settings = config(folder, run)
    order: Order = []
    with _replaced(Grader, "grade_many", _grade):
        if stop_before:
            try:
                _train(settings, stage, order, stop_before)
            except _Here:
                pass
            else:
                raise AssertionError(f"{run} was not ended before step {stop_before}")
        checkpoints = Path(settings.run) / "checkpoints" / stage
        found = checkpoint.newest(checkpoints, lambda _: None)
        # What is trained again after the last checkpoint replaces what was lost.
        del order[int(found.name[5:]) if found else 0 :]
        _train(settings, stage, order, 0)
    last = checkpoint.newest(checkpoints, lambda _: None)
    assert last is not None
    digest = json.loads((last / checkpoint.MANIFEST).read_bytes())["files"][checkpoint.TENSORS]
    shutil.rmtree(settings.run)
    return order, digest["sha256"]


def _train(settings: Config, stage: str, order: Order, stop_before: int) -> None:
    """One process: train on, write down what each step sees, and end before a step."""
    pack, draw = sft.pack, rl.draw

    def counted() -> None:
        if len(order) + 1 == stop_before:
            raise _Here

    def packing(examples: Any, *rest: Any) -> Any:
        if stage == "sft":
            counted()
            order.append([example.problem_id for example in examples])
        return pack(examples, *rest)

    def drawing(*arguments: Any) -> Any:
        counted()
        rollouts = draw(*arguments)
        order.append([f"{g.completion.token_ids}" for group in rollouts.groups_P_G for g in group])
        return rollouts

    with (
        _replaced(sft, "pack", packing),
        _replaced(rl, "draw", drawing),
        open_run(settings, Silent()) as run,
    ):
        if stage == "sft":
            sft.sft(run, "sft", _examples(run))
        else:
            rl.rl(run, "rl", "base", run.problems)


def _examples(run: Run) -> list[Example]:
    words = sorted(task.build_tokenizer().get_vocab())
    return [
        Example(
            problem_id=f"e{n}",
            token_ids=run.sampler.tokenizer.encode(" ".join(words[n : n + 8])),
            weights=[0.0] * 3 + [1.0] * 5,
        )
        for n in range(NUM_EXAMPLES)
    ]


def _grade(_: Grader, submissions: Any) -> list[Grade]:
    """Right is what begins with a letter a..h, so that a random model has both."""
    right = [text.split()[:1] and text.split()[0] in "abcdefgh" for _, text, *_ in submissions]
    reasons = [Reason.CORRECT if yes else Reason.WRONG for yes in right]
    return [Grade(status=reason.status, reason=reason) for reason in reasons]


def _shuffles_anew() -> Callable[[int, int], list[int]]:
    stream = random.Random(0)

    def shuffled(count: int, _: int) -> list[int]:
        order = list(range(count))
        stream.shuffle(order)
        return order

    return shuffled


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
