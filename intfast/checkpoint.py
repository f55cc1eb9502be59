"""Checkpoints: a folder per step, written aside and renamed; safetensors and JSON, no pickle.

A checkpoint is complete when its manifest.json exists and every file has the size and the digest
that the manifest gives. The newest complete one wins; a damaged one is named and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from intfast.runfolder import write_atomic

KEEP_LAST = 2
"""Checkpoints kept per stage."""


def save(stage: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write `stage/step-000020` with these tensors and this JSON state; returns the folder.

    Older ones beyond KEEP_LAST are removed after the new one is complete. Raises ValueError when a
    tensor holds a non-finite number: such a state is never saved.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"checkpoint of step {step}: expected finite tensors, got nan or inf in "
            f"{', '.join(bad[:5])}; lower the learning rate, or continue from the last checkpoint"
        )
    folder = stage / f"step-{step:06d}"
    aside = stage / f".{folder.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        aside / "tensors.safetensors",
    )
    (aside / "state.json").write_text(json.dumps(dict(state), indent=1))
    manifest = {}
    for name in ("tensors.safetensors", "state.json"):
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
        manifest[name] = {"bytes": (aside / name).stat().st_size, "sha256": _digest(aside / name)}
    write_atomic(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in sorted(stage.glob("step-*"))[:-KEEP_LAST]:
        shutil.rmtree(old)
    return folder


def latest(
    stage: Path, warn: Callable[[str], None]
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, state) of the newest complete checkpoint of a stage, or None."""
    for folder in sorted(stage.glob("step-*"), reverse=True):
        if fault := verify(folder):
            warn(f"checkpoint {folder} is damaged ({fault}); trying the one before")
            continue
        state = json.loads((folder / "state.json").read_text())
        return int(folder.name[5:]), load_file(folder / "tensors.safetensors"), state
    return None


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when it is complete."""
    if not (folder / "manifest.json").is_file():
        return "no manifest.json"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except ValueError:
        return "manifest.json is not JSON"
    for name, expected in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != expected["bytes"]:
            return f"{name} has another size"
        if _digest(folder / name) != expected["sha256"]:
            return f"{name} has another digest"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
