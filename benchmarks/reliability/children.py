"""Runs in forked children that have everything imported, and tell their parent what they are at.

The parent never computes with torch, so that a fork is a clean start. A child reports the
beginning and end of each phase through a pipe, before it goes on: what the parent has read when
the child dies is what the child was doing.
"""

from __future__ import annotations

import functools
import os
import random
import select
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from intfast import collect, evaluate, parity, pipeline, rl
from intfast.config import Config
from intfast.model import weights
from intfast.run import load_tokenizer
from intfast.state import checkpoint, files, interrupt
from intfast.state.metrics import Metrics
from intfast.study import summary
from intfast.study.finish import train

SEAMS: dict[str, tuple[ModuleType | type, str]] = {
    "load": (weights, "load"),
    "collection": (collect, "_draw_together"),
    "interventions": (collect, "interventions"),
    "sft": (pipeline, "sft"),
    "rollouts": (rl, "draw"),
    "rl update": (rl, "update"),
    "checkpoint write": (checkpoint, "save"),
    "checkpoint read": (checkpoint, "latest"),
    "journal write": (files, "append"),
    "evaluation": (collect, "evaluation"),
    "export": (weights, "save"),
    "summary": (summary, "write"),
}
"""Phase -> the function that is it; the innermost counts."""
PIPELINE = (
    "load",
    "collection",
    "interventions",
    "sft",
    "rollouts",
    "rl update",
    "export",
    "summary",
)
"""The phases that follow one another; the others happen within and between them."""
WITHIN = {
    "checkpoint write": ("sft", "rl update"),
    "checkpoint read": ("load", "interventions", "sft"),
    "journal write": ("collection", "interventions", "sft", "rl update"),
    "evaluation": ("load", "sft", "rl update"),
}
"""Those, and after which phases of the pipeline they come."""
ROW = "row"
NAMES = (*SEAMS, ROW)
PIECE = 1 << 14
"""Bytes per write, so that a file is torn in many places."""
Variant = Callable[[Config], None]


class Moment(NamedTuple):
    """When to disturb: at an entry of `phase` once `after`, or what follows it, began."""

    after: str
    phase: str


def moments(rng: random.Random, phases: Sequence[str]) -> list[Moment]:
    """A random moment in each of these phases, in the order in which a run comes to them."""
    drawn = [Moment(rng.choice(WITHIN.get(p, (p,))), p) for p in phases]
    return sorted(drawn, key=lambda moment: PIPELINE.index(moment.after))


def warm_up(model: Path) -> None:
    """Import what a run imports late, so that children do not spend their lives on it."""
    import intfast.study.analysis
    import intfast.study.report  # noqa: F401

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    load_tokenizer(model)


def patch_everywhere(name: str, value: Any) -> None:
    """Replace a function in every module of the trainer that imported it."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("intfast") and hasattr(module, name):
            setattr(module, name, value)


class Silent:
    """A console that prints nothing."""

    is_terminal = False

    def print(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Child:
    """A forked run. `phases` is where it is, innermost last."""

    def __init__(self, config: Config, variant: Variant | None = None) -> None:
        """variant: breaks something in the child before it starts."""
        self.events, write = os.pipe()
        self.started = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.events)
            _be_child(config, variant, write)
        os.close(write)
        self.phases: list[str] = []
        self.furthest = -1
        """Place in the pipeline of the latest phase that it came to."""
        self.first_row: float | None = None
        """When it finished its first step, by the monotonic clock."""

    def next(self) -> tuple[str, bool] | None:
        """(phase, whether it begins) of the next report; None at the child's end."""
        byte = os.read(self.events, 1)
        if not byte:
            return None
        name, begins = NAMES[byte[0] >> 1], bool(byte[0] & 1)
        if name == ROW:
            self.first_row = self.first_row or time.monotonic()
        elif begins:
            self.phases.append(name)
            if name in PIPELINE:
                self.furthest = max(self.furthest, PIPELINE.index(name))
        else:
            self.phases.pop()
        return name, begins

    def reaches(self, moment: Moment) -> bool:
        """Wait for a moment, or for its next time; False when the child ends before.

        A later phase of the pipeline stands for one that is over: every moment finds a place.
        """
        first = PIPELINE.index(moment.after)
        later = PIPELINE[first + 1 :] if moment.phase in PIPELINE else ()
        while report := self.next():
            name, begins = report
            if begins and self.furthest >= first and (name == moment.phase or name in later):
                return True
        return False

    def lasts(self, seconds: float) -> bool:
        """Whether the phase that just began still goes on after that time."""
        depth, until = len(self.phases), time.monotonic() + seconds
        while len(self.phases) >= depth:
            left = max(0.0, until - time.monotonic())
            if not select.select([self.events], [], [], left)[0]:
                return True
            if not self.next():
                return False
        return False

    def end(self, number: int | None = None) -> int:
        """Send a signal where given, take what is still in the pipe; the exit code (-n: signal)."""
        if number is not None:
            os.kill(self.pid, number)
        while self.next():
            pass
        os.close(self.events)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _be_child(config: Config, variant: Variant | None, write: int) -> None:
    """Never returns. Its own session, so that the parent can look for what it leaves behind."""
    code = 70
    try:
        os.setsid()
        torch.set_num_threads(1)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        with open(Path(config.run).with_suffix(".err"), "ab", 0) as errors:
            os.dup2(errors.fileno(), 2)
        files.PIECE = PIECE
        # Cheaper, and no part of what is compared: intervals of 20 resamples, checks of 4 tokens.
        parity.NUM_TOKENS = 4
        bootstrap = evaluate.bootstrap
        patch_everywhere("bootstrap", lambda values, seed, *_: bootstrap(values, seed, 20))
        if variant:
            variant(config)
        for name, (owner, attribute) in SEAMS.items():
            setattr(owner, attribute, _reporting(getattr(owner, attribute), name, write))
        Metrics.row = _reporting(Metrics.row, ROW, write)
        code = _command(config)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _command(config: Config) -> int:
    """What train.main does with a config."""
    with interrupt.handling():
        try:
            train(config, Silent())
        except interrupt.Stopped as stopped:
            return stopped.exit_code
    return 0


def _reporting(function: Callable, name: str, write: int) -> Callable:
    number = NAMES.index(name) << 1

    @functools.wraps(function)
    def reporting(*arguments: Any, **keywords: Any) -> Any:
        if name != ROW:
            os.write(write, bytes([number | 1]))
        result = function(*arguments, **keywords)
        # Not in a finally: a child that is unwound stays in the phase that was disturbed.
        os.write(write, bytes([number]))
        return result

    return reporting


def phase_times(config: Config, variant: Variant | None = None) -> dict[str, list[float]]:
    """Run undisturbed; the seconds of each entry of each phase. Raises RuntimeError if it fails."""
    child, found = Child(config, variant), {name: [] for name in SEAMS}
    starts: list[float] = []
    while report := child.next():
        name, begins = report
        if begins:
            starts.append(time.monotonic())
        elif name != ROW:
            found[name].append(time.monotonic() - starts.pop())
    if code := child.end():
        said = Path(config.run).with_suffix(".err").read_text()[-2000:]
        raise RuntimeError(f"an undisturbed run ended with code {code}:\n{said}")
    return found


def left_behind(folder: Path) -> list[int]:
    """Processes that were started with something of a folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if os.fsencode(folder) in words:
                found.append(int(entry.name))
    return found
