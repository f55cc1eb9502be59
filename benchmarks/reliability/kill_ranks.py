"""Kill -9 of one rank of several, at a random moment of each phase; then the same command again.

torchrun ends the other ranks. A run is killed once in each of its phases, by turns in either rank,
ends undisturbed and is compared, byte for byte, with one that was never killed. Once, where the
kill fell into an update of RL, copies go on as one process and as twice as many ranks: other worlds
promise weights to rounding. Ranks that forget the moments must be found by the same comparison.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability import bed
from benchmarks.reliability.children import SEAMS
from benchmarks.reliability.kill import differing
from intfast import collect, evaluate, parity, ranks, train
from intfast.model.optim import Optimizer
from intfast.state import checkpoint, files

TRIALS = 50
LIMIT_S = 600
STAGE, PHASES = "int_rl", tuple(SEAMS)
SEVERAL = ("rollouts", "rl update", "checkpoint write", "journal write")
"""Phases that a run enters more than once, also where it goes on."""


def run(trials: int, seed: int, world: int) -> dict[str, Any]:
    """Figures of at least so many kills of one rank of `world`."""
    rng, kills, faults, gaps = random.Random(seed), Counter(), [], {}
    runs = equal = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bed.prepare(folder, seed)
        _sound(folder, "whole", world)
        expected = bed.outcome(folder / "whole")
        while sum(kills.values()) < trials:
            run_name = f"killed-{runs}"
            for phase in PHASES:
                rank = sum(kills.values()) % world
                entry = rng.randrange(2) if phase in SEVERAL else 0
                kill = f"{rank}:{phase}:{entry}:{rng.random():.3f}"
                if not _launch(folder, run_name, world, kill):
                    continue
                kills[phase] += 1
                if phase == "rl update" and not gaps:
                    gaps = {str(n): _elsewhere(folder, run_name, n) for n in (1, 2 * world)}
            _sound(folder, run_name, world)
            wrong = differing(folder / run_name, expected)
            runs, equal = runs + 1, equal + (not wrong)
            faults += [f"{run_name}: {', '.join(wrong[:3])}"] if wrong else []
            print(f"  {equal} of {runs} runs equal after {sum(kills.values())} kills", flush=True)
        _launch(folder, "control", world, "0:rl update:1:0")
        _sound(folder, "control", world, FORGETS="1")
        control = differing(folder / "control", expected)
    return {
        "passed": equal == runs and all(gap < 1e-5 for gap in gaps.values()),
        "control_failed": bool(control),
        "world": world,
        "runs": runs,
        "bitwise_equal": equal,
        "kills": sum(kills.values()),
        "kills_per_phase": dict(kills),
        "weights_apart_in_other_worlds": gaps,
        **({"first_faults": faults[:3]} if faults else {}),
    }


def _launch(folder: Path, run_name: str, world: int, kill: str = "", **more: str) -> int:
    """Start a run in as many ranks; 0 where it came to its end."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    words = ["-m", "benchmarks.reliability.kill_ranks", *bed.words(folder, run_name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KILL": kill} | more
    with (folder / f"{run_name}.err").open("ab") as errors:
        return subprocess.run(
            [sys.executable, *(launch if world > 1 else []), *words],
            env=environment, stdout=errors, stderr=errors, timeout=LIMIT_S,
        ).returncode  # fmt: skip


def _sound(folder: Path, run_name: str, world: int, **more: str) -> None:
    if code := _launch(folder, run_name, world, **more):
        said = (folder / f"{run_name}.err").read_text()[-3000:]
        raise RuntimeError(f"an undisturbed run of {world} ranks ended with {code}:\n{said}")


def _elsewhere(folder: Path, run_name: str, world: int) -> float:
    """How far a copy that goes on in another world ends up, in weights, of the largest."""
    copy = f"{run_name}-as-{world}"
    shutil.copytree(folder / run_name, folder / copy)
    _sound(folder, copy, world)
    found, want = (
        checkpoint.latest(folder / name / "checkpoints" / STAGE, print)[1]
        for name in (copy, "whole")
    )
    pairs = ((found[n].detach(), want[n].detach()) for n in want if n.startswith("model."))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# --- a rank ------------------------------------------------------------------------------------


def _be_rank(words: list[str]) -> int:
    """The command, made short, that kills itself where KILL says."""
    collect.CHUNK_SAMPLES, parity.NUM_TOKENS, files.PIECE = bed.CHUNK_SAMPLES, 4, 1 << 14
    bootstrap = evaluate.bootstrap
    evaluate.bootstrap = lambda values, seed, *_: bootstrap(values, seed, 20)
    if os.environ.get("FORGETS"):
        Optimizer.load_state_tensors = lambda *_: None
    rank, phase, entry, share = (os.environ["KILL"] or "-1:load:0:0").split(":")
    if int(rank) == ranks.launched().rank:
        owner, attribute = SEAMS[phase]
        sound, entries = getattr(owner, attribute), [0]

        def doomed(*arguments: Any, **keywords: Any) -> Any:
            entries[0] += 1
            if entries[0] == int(entry) + 1:
                # Within it or soon behind: entries last some milliseconds to a second.
                delay = 0.4 * float(share)
                threading.Thread(target=_die, args=(delay,), daemon=True).start()
            return sound(*arguments, **keywords)

        setattr(owner, attribute, doomed)
    return train.main(words)


def _die(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_be_rank(sys.argv[1:]))
