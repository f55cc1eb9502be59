"""Checkpoints: a folder per step, written aside and renamed; safetensors and JSON, no pickle.

manifest.json is written last and holds the size and digest of every other file, the step, and a
digest of itself. The newest checkpoint that agrees with its manifest wins; a damaged one is named
and passed over.

Several ranks write at once, each its part of every tensor; any number of ranks reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from intfast import ranks
from intfast.state import files, tensorfile

KEEP_LAST = 2
"""Checkpoints kept per stage."""
FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    step: int
    files: dict[str, _File]
    sha256: str = ""
    """Of this manifest's JSON with an empty digest."""

    def digest(self) -> str:
        bare = msgspec.json.encode(msgspec.structs.replace(self, sha256=""))
        return hashlib.sha256(bare).hexdigest()


Stored = Tensor | ranks.Part
Wrote = tuple[list[str], dict[str, files.Written]]
"""What a rank wrote of a checkpoint, or the names of tensors that are not finite."""


def save(stage: Path, step: int, tensors: Mapping[str, Stored], state: Mapping[str, Any]) -> Path:
    """Write `stage/step-000020` with these tensors and this JSON state; returns the folder.

    Then all but the newest KEEP_LAST whole ones are removed. Raises ValueError when a tensor holds
    a non-finite number: such a state is never saved; RuntimeError when the disk refuses.
    """
    begin(stage, step)
    return commit(stage, step, write(stage, step, own(tensors), state))


def own(tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """What this rank saves of tensors that are whole on every rank, or dealt."""
    world = ranks.now()
    if world.world == 1:
        return tensors
    return {
        name: ranks.Part(partial(world.part, x), x.shape, x.dtype) if isinstance(x, Tensor) else x
        for name, x in tensors.items()
    }


def begin(stage: Path, step: int) -> None:
    """Make the folder that the ranks write into."""
    files.remove(_aside(stage, step))
    files.make_folder(_aside(stage, step))
    ranks.now().agree()


def write(stage: Path, step: int, tensors: Mapping[str, Stored], state: Mapping[str, Any]) -> Wrote:
    """Write the files of this rank, behind `begin`; waits for nobody."""
    bad = [name for name, tensor in tensors.items() if not tensor.detach().isfinite().all()]
    if bad:
        return bad, {}
    world, aside = ranks.now(), _aside(stage, step)
    name, metadata = _names(world.world)[world.rank], None
    if world.world > 1:
        wholes = {key: (x.shape, x.pieces_R) for key, x in tensors.items()}
        metadata = {"tp": str(world.tp), "wholes": json.dumps(wholes)}
    found = {name: tensorfile.write(aside / name, tensors, metadata, world.world > 1)}
    if world.is_main:
        found[STATE] = files.write(aside / STATE, [msgspec.json.encode(dict(state))])
    return [], found


def commit(stage: Path, step: int, wrote: Wrote) -> Path:
    """Make what all ranks wrote a checkpoint; see `save`."""
    bad, entries = [], {}
    for names, written in ranks.now().gather(wrote):
        bad += [name for name in names if name not in bad]
        entries |= {name: _File(*entry) for name, entry in written.items()}
    aside, folder = _aside(stage, step), stage / f"step-{step:06d}"
    if bad:
        files.remove(aside)
        raise ValueError(
            f"checkpoint of step {step}: expected finite tensors, got nan or inf in "
            f"{', '.join(bad[:5])}; lower the learning rate, or continue from the last checkpoint"
        )
    manifest = _Manifest(format=FORMAT, step=step, files=entries)
    manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
    files.write(aside / MANIFEST, [msgspec.json.encode(manifest)])
    files.publish(aside, folder)
    prune(stage, step)
    return folder


def _aside(stage: Path, step: int) -> Path:
    return stage / f".step-{step:06d}.part"


def _names(world: int) -> list[str]:
    """The files of tensors that so many ranks write."""
    if world == 1:
        return [TENSORS]
    return [f"tensors-{rank:02}-of-{world:02}.safetensors" for rank in range(world)]


def newest(stage: Path, warn: Callable[[str], None]) -> Path | None:
    """The folder of the newest whole checkpoint of a stage, or None; damaged ones are named."""

    def find() -> Path | None:
        for _, folder in _folders(stage):
            if not (fault := verify(folder)):
                return folder
            warn(f"checkpoint {folder} is damaged ({fault}); trying the one before")
        return None

    return ranks.now().first(find)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a whole checkpoint."""
    return msgspec.json.decode((folder / STATE).read_bytes())


def latest(
    stage: Path, warn: Callable[[str], None]
) -> tuple[int, dict[str, Stored], dict[str, Any]] | None:
    """(step, whole tensors, state) of the newest whole checkpoint of a stage, or None.

    What several ranks wrote is read as each tensor is asked for.
    """
    folder = newest(stage, warn)
    if folder is None:
        return None
    paths = sorted(folder.glob("tensors*"))
    tensors = _parts(paths) if len(paths) > 1 else load_file(paths[0])
    return int(folder.name[5:]), tensors, read_state(folder)


def _parts(paths: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of files that each hold a part of all of them, in the order of the ranks."""
    opened = [safe_open(path, "pt") for path in paths]
    dtypes = {name: dtype for dtype, name in tensorfile.NAMES.items()}
    metadata = opened[0].metadata()
    tp = int(metadata["tp"])

    def read(name: str, part: ranks.Part) -> Tensor:
        def shard(rank: int) -> Tensor:
            # What a rank of a copy has, every copy has a part of.
            flat = torch.cat([file.get_tensor(name) for file in opened[rank::tp]])
            return flat.view(part.shard_shape(rank))

        return part.joined(shard)

    found: dict[str, Stored] = {}
    for name, (sizes, pieces_R) in json.loads(metadata["wholes"]).items():
        dtype = dtypes[opened[0].get_slice(name).get_dtype()]
        part = ranks.Part(torch.Tensor, torch.Size(sizes), dtype, pieces_R)
        found[name] = part._replace(make=partial(read, name, part))
    return found


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when every byte is as it was written."""
    manifest = _read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    for name, expected in manifest.files.items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                return f"{name} has another digest"
    return ""


def _read_manifest(folder: Path) -> _Manifest | str:
    """The manifest of a folder that has its files in the right sizes, else what is wrong."""
    if not (folder / MANIFEST).is_file():
        return f"no {MANIFEST}"
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"{MANIFEST} is not a manifest"
    if manifest.digest() != manifest.sha256:
        return f"{MANIFEST} has another digest"
    if manifest.format != FORMAT:
        return f"{MANIFEST} has format {manifest.format}, this version reads {FORMAT}"
    names = {STATE, *_names(len(manifest.files) - 1)}
    if f"step-{manifest.step:06d}" != folder.name or set(manifest.files) != names:
        return f"{MANIFEST} is of another checkpoint"
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != expected.bytes:
            return f"{name} has another size"
    return manifest


def _folders(stage: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint, newest first."""
    found = [(re.fullmatch(r"step-(\d{6,})", path.name), path) for path in stage.glob("step-*")]
    yield from sorted(((int(m[1]), path) for m, path in found if m), reverse=True)


def prune(stage: Path, step: int) -> None:
    """Remove what is neither the whole checkpoint of this step nor one of those before it.

    Later steps are damaged, or this run would have continued from them.
    """
    num_kept = 0
    if not ranks.now().is_main:
        return
    for found, folder in _folders(stage):
        whole = found <= step and not isinstance(_read_manifest(folder), str)
        if whole and num_kept < KEEP_LAST:
            num_kept += 1
        else:
            files.retire(folder)
    for leftover in stage.glob(".step-*"):
        files.remove(leftover)
