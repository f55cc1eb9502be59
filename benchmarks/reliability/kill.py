"""Kill -9 at random moments of a whole run, start it again until it is done, compare every byte.

Kills are dealt out to the phases, those with the fewest first, and fall at a random time within an
entry of the phase; a phase without a kill fails the campaign. The same kills must find three broken
variants, or the campaign proves nothing.
"""

from __future__ import annotations

import random
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
    Variant,
    moments,
    patch_everywhere,
    phase_times,
    warm_up,
)
from intfast.config import Config
from intfast.model.optim import Optimizer
from intfast.state import checkpoint, files, tensorfile

TRIALS = 200
KILLS_PER_RUN = 8
BETWEEN = 0.3
"""Share of the entries that were over too soon after which the kill comes at once."""
ORDER = tuple(SEAMS)


class Result(NamedTuple):
    """What a number of kills did."""

    runs: int
    equal: int
    kills: Counter
    """Phase -> kills that fell into it."""
    seconds: list[float]
    """From each kill to the end of the next finished step, in a forked restart."""
    faults: list[str]


def run(trials: int, seed: int) -> dict[str, Any]:
    """Figures of `trials` kills of the sound trainer, and of a share of them for each control."""
    warm_up(bed.MODEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bed.prepare(folder, seed)
        found = campaign(folder, "sound", trials, seed)
        controls = {
            name: campaign(folder, name, max(KILLS_PER_RUN, trials // 8), seed, variant, phases)
            for name, (variant, phases) in VARIANTS.items()
        }
    return {
        "passed": found.equal == found.runs and all(found.kills[phase] for phase in ORDER),
        "control_failed": all(control.equal < control.runs for control in controls.values()),
        "sound": _figures(found),
        **{name: _figures(control) for name, control in controls.items()},
    }


def campaign(
    folder: Path,
    name: str,
    num_kills: int,
    seed: int,
    variant: Variant | None = None,
    phases: tuple[str, ...] = ORDER,
) -> Result:
    """Kill runs until there were so many kills; each ends undisturbed and is compared.

    A broken variant is compared with its own undisturbed run.
    """
    rng = random.Random(f"{seed}/{name}")
    times = phase_times(bed.config(folder, name), variant)
    expected = bed.outcome(folder / name)
    found = Result(0, 0, Counter(dict.fromkeys(phases, 0)), [], [])
    while sum(found.kills.values()) < num_kills:
        run = f"{name}-{found.runs}"
        code = _disturbed(bed.config(folder, run), rng, times, variant, phases, found)
        wrong = differing(folder / run, expected) if not code else [f"exit code {code}"]
        found = found._replace(runs=found.runs + 1, equal=found.equal + (not wrong))
        if wrong:
            found.faults.append(f"{run}: {', '.join(wrong[:3])}")
        else:
            shutil.rmtree(folder / run)
        print(
            f"\r  {name}: {found.equal} of {found.runs} runs equal after "
            f"{sum(found.kills.values())} kills",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print(file=sys.stderr)
    return found


def _disturbed(
    config: Config,
    rng: random.Random,
    times: dict[str, list[float]],
    variant: Variant | None,
    phases: tuple[str, ...],
    found: Result,
) -> int:
    """One run with its kills; the exit code of its last process."""
    killed_at = None
    for moment in [*moments(rng, _dealt(rng, phases, found.kills)), None]:
        child = Child(config, variant)
        reached = moment is not None and _reached(child, moment, rng, times)
        code = child.end(signal.SIGKILL if reached else None)
        if killed_at and child.first_row:
            found.seconds.append(child.first_row - killed_at)
        killed_at = None
        if code == -signal.SIGKILL:
            killed_at = time.monotonic()
            found.kills[child.phases[-1] if child.phases else "between phases"] += 1
        else:
            break
    return code


def _dealt(rng: random.Random, phases: tuple[str, ...], kills: Counter) -> list[str]:
    """The phases that one run is to be killed in: those with the fewest kills so far."""
    order = sorted(rng.sample(phases, len(phases)), key=lambda phase: kills[phase])
    return [order[place % len(order)] for place in range(KILLS_PER_RUN)]


def _reached(
    child: Child, moment: Moment, rng: random.Random, times: dict[str, list[float]]
) -> bool:
    """Wait for a random time within the phase; where an entry is over before, in its next one.

    Entries differ in length: an update without a group that has variance takes no time. Some that
    are over are taken all the same, for the moments between phases.
    """
    while child.reaches(moment):
        if child.lasts(rng.random() * max(times[child.phases[-1]], default=0.0)):
            return True
        if not child.phases and rng.random() < BETWEEN:
            return True
    return False


def differing(run: Path, expected: dict[str, str]) -> list[str]:
    """Which parts of a finished run are not as expected."""
    outcome = bed.outcome(run)
    return sorted(k for k in expected.keys() | outcome.keys() if outcome.get(k) != expected.get(k))


def _figures(found: Result) -> dict[str, Any]:
    seconds = sorted(found.seconds)
    figures: dict[str, Any] = {
        "runs": found.runs,
        "bitwise_equal": found.equal,
        "kills": sum(found.kills.values()),
        "kills_per_phase": dict(found.kills.most_common()),
    }
    if seconds:
        figures["seconds_to_next_step"] = {
            "median": round(seconds[len(seconds) // 2], 2),
            "max": round(seconds[-1], 2),
        }
    return figures | ({"first_faults": found.faults[:3]} if found.faults else {})


# --- broken on purpose -------------------------------------------------------------------------


def global_randomness(config: Config) -> None:
    """Seeds come from one global stream, as where a library's global state is not restored."""
    stream = random.Random(config.seed)
    patch_everywhere("derive_seed", lambda *_: stream.getrandbits(62))


def forgotten_moments(_: Config) -> None:
    """A resume that restores the weights alone."""
    Optimizer.load_state_tensors = lambda *_: None


def written_in_place(_: Config) -> None:
    """One checkpoint folder, overwritten by every save, believed without its digests."""

    def save(stage: Path, step: int, tensors: Any, state: Any) -> Path:
        folder = stage / "step-000001"
        files.make_folder(folder)
        tensorfile.write(folder / checkpoint.TENSORS, tensors)
        content = checkpoint.msgspec.json.encode({**state, "step": step})
        files.write(folder / checkpoint.STATE, [content])
        return folder

    latest, checkpoint.save = checkpoint.latest, save
    checkpoint.verify = lambda folder: "" if (folder / checkpoint.STATE).is_file() else "no state"

    def read(stage: Path, warn: Any) -> Any:
        found = latest(stage, warn)
        return found and (found[2].pop("step"), *found[1:])

    checkpoint.latest = read


TRAINING = ("sft", "rollouts", "rl update", "checkpoint write")
VARIANTS: dict[str, tuple[Variant, tuple[str, ...]]] = {
    "global randomness": (global_randomness, ORDER),
    "forgotten moments": (forgotten_moments, TRAINING),
    "written in place": (written_in_place, ("checkpoint write",)),
}
