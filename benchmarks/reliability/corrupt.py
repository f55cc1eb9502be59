"""Damaged checkpoints, and every moment of a save at which the power could go.

1. Random damage to the newest of two checkpoints: it must be named and the one before be used. The
   control is a loader without digests.
2. All operations of one save are recorded; after each of them a crash is replayed, with names and
   data that were not synced kept, lost, or torn. Every state must load the old or the new
   checkpoint, whole. The control never syncs, and believes any folder that has its files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from intfast.state import checkpoint, files

TRIALS = 1000
Harm = Callable[[random.Random, Path, Path], None]


def run(trials: int, seed: int) -> dict[str, Any]:
    """Figures of so many damages, and of the crash states of one save."""
    rng = random.Random(seed)
    kinds: Counter[str] = Counter()
    detected: Counter[str] = Counter()
    unseen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = folder / "pair"
        for step in (1, 2):
            checkpoint.save(pair, step, state(step), {"cursor": step})
        for _ in range(trials):
            kind = rng.choice(tuple(HARMS))
            kinds[kind] += 1
            stage = folder / "stage"
            shutil.copytree(pair, stage)
            HARMS[kind](rng, stage / "step-000002", stage / "step-000001")
            detected[kind] += loads(stage) == "old"
            unseen[kind] += loads_without_digests(stage)
            shutil.rmtree(stage)
        crashes = crash_states(folder / "crash")
        careless = crash_states(folder / "careless", careless=True)
    return {
        "passed": kinds == detected and set(crashes) == {"old", "new"},
        "control_failed": unseen["flip"] > 0 and not set(careless) <= {"old", "new"},
        "damaged": dict(kinds),
        "detected": dict(detected),
        "accepted_without_digests": dict(unseen),
        "crash_states": dict(crashes),
        "crash_states_careless": dict(careless),
    }


def state(value: float) -> dict[str, Tensor]:
    """A small training state: weights in bf16, moments, a counter."""
    generator = torch.Generator().manual_seed(int(value))
    return {
        "model.w": torch.randn(40, 50, generator=generator).bfloat16(),
        "optim.exp_avg.w": torch.randn(40, 50, generator=generator),
        "optim.step.w": torch.tensor(float(value)),
    }


def loads(stage: Path) -> str:
    """ "old" (step 1, warned), "new" (step 2), or what is wrong."""
    warnings: list[str] = []
    found = checkpoint.latest(stage, warnings.append)
    if found is None:
        return "nothing"
    step, tensors, kept = found
    expected = state(step)
    whole = kept == {"cursor": step} and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )
    if not whole or tensors.keys() != expected.keys():
        return "a mixture"
    if step == 1 and (stage / "step-000002").is_dir():
        return "old" if any("step-000002" in text for text in warnings) else "old in silence"
    return {0: "older", 1: "old", 2: "new"}[step]


def loads_without_digests(stage: Path) -> bool:
    """Whether a loader that only needs the files to be readable takes the damaged checkpoint."""
    folder = stage / "step-000002"
    try:
        checkpoint.load_file(folder / checkpoint.TENSORS)
        checkpoint.read_state(folder)
    except (SafetensorError, OSError, ValueError):
        return False
    return (folder / checkpoint.MANIFEST).is_file()


# --- damage ------------------------------------------------------------------------------------


def _file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def _flip(rng: random.Random, new: Path, _: Path) -> None:
    path = _file(rng, new)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(rng: random.Random, new: Path, _: Path) -> None:
    path = _file(rng, new)
    os.truncate(path, rng.randrange(path.stat().st_size))


def _grow(rng: random.Random, new: Path, _: Path) -> None:
    with _file(rng, new).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 100)))


def _remove(rng: random.Random, new: Path, _: Path) -> None:
    _file(rng, new).unlink()


def _mix(rng: random.Random, new: Path, old: Path) -> None:
    """Some files, but not all, are those of the checkpoint before."""
    for path in rng.sample(sorted(old.iterdir()), rng.randint(1, 2)):
        shutil.copy(path, new)


def _swap(rng: random.Random, new: Path, _: Path) -> None:
    first, second = rng.sample(sorted(new.iterdir()), 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _edit(rng: random.Random, new: Path, _: Path) -> None:
    """A manifest that is JSON, but with another value in one place."""
    path = new / checkpoint.MANIFEST
    content = json.loads(path.read_bytes())
    place = rng.choice(("step", "format", "files", "bytes", "sha256", "own"))
    entry = rng.choice(list(content["files"].values()))
    if place in ("step", "format"):
        content[place] += rng.choice((-1, 1, 1000))
    elif place == "files":
        content["files"].popitem()
    elif place == "bytes":
        entry["bytes"] += rng.choice((-1, 1))
    elif place == "sha256":
        entry["sha256"] = rng.randbytes(32).hex()
    else:
        content["sha256"] = rng.randbytes(32).hex()
    path.write_text(json.dumps(content))


HARMS: dict[str, Harm] = {
    "flip": _flip,
    "truncation": _truncate,
    "growth": _grow,
    "missing file": _remove,
    "mixed versions": _mix,
    "swapped files": _swap,
    "edited manifest": _edit,
}

# --- crashes -----------------------------------------------------------------------------------


class Disk:
    """`os` for files.py: works on the real disk, and keeps what a crash would leave of it.

    A model of one: data is safe once its file was synced, a name once its folder was.
    """

    def __init__(self, root: Path, syncs: bool) -> None:
        self.syncs = syncs
        self.data: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        self.safe_names: dict[str, int] = {}
        self.open_files: dict[int, str] = {}
        self.states: list[dict[str, bytes]] = []
        self.next_id = 0
        for path in sorted(root.rglob("*")):
            if path.is_file():
                self._enter(str(path), path.read_bytes())
        self.synced, self.safe_names = dict(self.data), dict(self.names)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _enter(self, path: str, data: bytes) -> None:
        self.names[path] = self.next_id
        self.data[self.next_id] = data
        self.synced[self.next_id] = b""
        self.next_id += 1

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        self.open_files[descriptor] = str(path)
        if flags & os.O_CREAT:
            self._enter(str(path), b"")
        return self._crash(descriptor)

    def write(self, descriptor: int, data: bytes) -> int:
        # Short writes are allowed, and make more places to crash at.
        count = os.write(descriptor, data[: max(1, len(data) // 3)])
        self.data[self.names[self.open_files[descriptor]]] += bytes(data[:count])
        return self._crash(count)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        path = self.open_files[descriptor]
        if path in self.names and self.syncs:
            self.synced[self.names[path]] = self.data[self.names[path]]
        elif self.syncs:
            self._sync_names(path)
        self._crash()

    def _sync_names(self, folder: str) -> None:
        """The entries of a folder are safe; a folder that got a name brings its own along."""

        def inside(path: str) -> bool:
            return path.startswith(folder + "/")

        here = {p: i for p, i in self.names.items() if inside(p)}
        self.safe_names = {p: i for p, i in self.safe_names.items() if not inside(p)} | here

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        for path in [p for p in self.names if p == str(source) or p.startswith(f"{source}/")]:
            self.names[str(target) + path.removeprefix(str(source))] = self.names.pop(path)
        self._crash()

    def remove(self, folder: Path) -> None:
        """Stands for files.remove."""
        shutil.rmtree(folder, ignore_errors=True)
        for path in [p for p in self.names if p.startswith(f"{folder}/")]:
            del self.names[path]
            self._crash()

    def _crash(self, result: Any = None) -> Any:
        """Keep what each kind of crash leaves now."""
        for names in (self.names, self.safe_names):
            for keep in (
                lambda i: self.data[i],
                lambda i: self.synced[i],
                lambda i: self.data[i][: (len(self.synced[i]) + len(self.data[i])) // 2],
            ):
                self.states.append({path: keep(i) for path, i in names.items()})
        return result


def crash_states(folder: Path, careless: bool = False) -> Counter[str]:
    """What each distinct state that a crash in a save can leave loads as.

    The save also removes the oldest of three checkpoints.
    """
    stage = folder / "stage"
    for step in (0, 1):
        checkpoint.save(stage, step, state(step), {"cursor": step})
    disk = Disk(folder, syncs=not careless)
    real = files.os, files.remove
    files.os, files.remove = disk, disk.remove
    try:
        checkpoint.save(stage, 2, state(2), {"cursor": 2})
    finally:
        files.os, files.remove = real
    verify = checkpoint.verify
    if careless:
        checkpoint.verify = lambda found: (
            "" if (found / checkpoint.TENSORS).is_file() else "no tensors"
        )
    try:
        return Counter(_load_state(folder, found) for found in _distinct(disk.states))
    finally:
        checkpoint.verify = verify


def _distinct(states: list[dict[str, bytes]]) -> Iterator[dict[str, bytes]]:
    seen = set()
    for found in states:
        key = hash(tuple(sorted(found.items())))
        if key not in seen:
            seen.add(key)
            yield found


def _load_state(folder: Path, found: dict[str, bytes]) -> str:
    shutil.rmtree(folder)
    for path, data in found.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
    try:
        return loads(folder / "stage").removesuffix(" in silence")
    except (SafetensorError, OSError, ValueError) as error:
        return f"an error: {type(error).__name__}"
