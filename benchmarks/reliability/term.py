"""SIGTERM and Ctrl-C at random moments of each phase: saved, in time, the right code, no orphans.

A run is stopped and continued several times, then compared byte by byte with an undisturbed one.
Each child has a live grading worker, so that there is something to leave behind. The control is a
child in which requests to stop are never looked at.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability import bed
from benchmarks.reliability.children import (
    SEAMS,
    Child,
    Moment,
    left_behind,
    moments,
    phase_times,
    warm_up,
)
from benchmarks.reliability.kill import differing
from intfast.config import Config
from intfast.grading import grader
from intfast.state import checkpoint, interrupt
from intfast.study.read import read_rows

TRIALS = 100
STOPS_PER_RUN = 10
GRACE_S = 10.0
"""In which a process must have ended, on this small model."""
WORKER = """\
import os, sys
os.write(1, b"R")
sys.stdin.read()
"""
"""A grading worker that is ready at once and waits for its parent's end of the pipe."""


class Stop(NamedTuple):
    """What one request came to."""

    phase: str
    seconds: float
    faults: list[str]


def run(trials: int, seed: int) -> dict[str, Any]:
    """Figures of so many requests to stop."""
    warm_up(bed.MODEL)
    rng = random.Random(seed)
    stops: list[Stop] = []
    faults: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bed.prepare(folder, seed)
        times = phase_times(bed.config(folder, "whole"))
        expected = bed.outcome(folder / "whole")
        while len(stops) < trials:
            config = bed.config(folder, f"stopped-{runs}")
            runs += 1
            stops += _stopped(config, rng, times)
            code = Child(config).end()
            faults += [f"run {runs}: {fault}" for fault in _wrong(config, code, expected)]
            print(f"\r  {len(stops)} stops in {runs} runs", end="", file=sys.stderr, flush=True)
        deaf = _stopped(bed.config(folder, "deaf"), rng, times, deaf=True)
    print(file=sys.stderr)
    num_unequal = len(faults)
    faults += [f"{stop.phase}: {fault}" for stop in stops for fault in stop.faults]
    seconds = sorted(stop.seconds for stop in stops)
    return {
        "passed": not faults,
        "control_failed": bool(deaf) and all(stop.faults for stop in deaf),
        "stops": len(stops),
        "as_promised": sum(not stop.faults for stop in stops),
        "stops_per_phase": dict(Counter(stop.phase for stop in stops).most_common()),
        "seconds_to_end": {"median": seconds[len(seconds) // 2], "max": seconds[-1]},
        "grace_s": GRACE_S,
        "runs": runs,
        "runs_bitwise_equal": runs - num_unequal,
        "first_faults": faults[:3],
    }


def _stopped(
    config: Config,
    rng: random.Random,
    times: dict[str, list[float]],
    deaf: bool = False,
) -> list[Stop]:
    """Stop the processes of one run; those whose moment did not come are not counted."""
    script = Path(config.run).parent / "idle_worker.py"
    script.write_text(WORKER)

    def variant(_: Config) -> None:
        grader.WORKER = script
        enter = grader.Grader.__enter__

        def with_worker(self: grader.Grader) -> grader.Grader:
            self._workers.append(grader._Worker(self.timeout_s, self.digits))
            return enter(self)

        grader.Grader.__enter__ = with_worker
        if deaf:
            interrupt.check = lambda meets=False: interrupt.beat()

    stops = []
    chosen = moments(rng, rng.choices(tuple(SEAMS), k=STOPS_PER_RUN))
    for moment in [Moment("collection", "collection")] if deaf else chosen:
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        child = Child(config, variant)
        if not child.reaches(moment):
            child.end()
            continue
        time.sleep(rng.random() * max(times[child.phases[-1]], default=0.0))
        phase = child.phases[-1]
        start = time.monotonic()
        code = child.end(number)
        seconds = round(time.monotonic() - start, 3)
        if code == 0 and not deaf:
            continue  # it had finished before the request was looked at
        faults = _saved(config, child.phases)
        if code != 128 + number:
            faults.append(f"exit code {code} after signal {number}")
        if seconds > GRACE_S:
            faults.append(f"took {seconds} s")
        if orphans := left_behind(script.parent):
            faults.append(f"left processes {orphans}")
        stops.append(Stop(phase, seconds, faults))
    return stops


def _saved(config: Config, phases: list[str]) -> list[str]:
    """What is wrong with the newest checkpoint of the stage that was stopped, if one was."""
    stage = {"sft": "int", "rollouts": "int_rl", "rl update": "int_rl"}.get((phases or [""])[0])
    if not stage:
        return []
    rows = read_rows(Path(config.run) / "metrics.jsonl", finished=True)
    rows = [row for row in rows if row["stage"] == stage]
    done = max((row["step"] for row in rows), default=0)
    found = checkpoint.newest(Path(config.run) / "checkpoints" / stage, lambda _: None)
    saved = int(found.name[5:]) if found else 0
    return [] if saved == done else [f"{stage} finished step {done} and saved step {saved}"]


def _wrong(config: Config, code: int, expected: dict[str, str]) -> list[str]:
    if code:
        return [f"ended with code {code} undisturbed"]
    wrong = [name for name in differing(Path(config.run), expected) if not _is_old(name, expected)]
    if not wrong:
        shutil.rmtree(config.run)
    return [f"{name} differs" for name in wrong[:1]]


def _is_old(name: str, expected: dict[str, str]) -> bool:
    """Whether a file is of a checkpoint before the newest: a stop's own save may displace it."""
    found = re.fullmatch(r"(checkpoints/[^/]+/)(step-\d+)/.*", name)
    if not found:
        return False
    newest = max(other for other in expected if other.startswith(found[1]))
    return found[2] < newest.split("/")[2]
