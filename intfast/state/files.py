"""Writing so that a kill, a crash or a full disk at any moment leaves the old state or the new.

Every byte that a run must not lose passes through this file. Of several ranks the first alone
writes, but for files that each has for itself; nobody goes on before, and nobody is still reading
what was there. Failures of the disk are RuntimeErrors that name the file and say what to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intfast import ranks

PIECE = 1 << 24
"""Bytes hashed and written at once."""


class Written(NamedTuple):
    """What went into a file: its size and the SHA-256 of its bytes, taken before the disk."""

    bytes: int
    sha256: str


@contextlib.contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a RuntimeError about writing `path`."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.ENOENT: f"make the folder {path.parent}",
            errno.EISDIR: "name a file, this is a folder",
        }
        raise RuntimeError(
            f"cannot write {path}: {error.strerror or error}; "
            f"{remedies.get(error.errno, 'make the folder writable')}, then repeat the command: "
            "what was whole before still is"
        ) from error


def write(path: Path, pieces: Iterable[bytes | memoryview], everywhere: bool = False) -> Written:
    """Write a new file and sync it, or `everywhere` each rank its own; the caller syncs or renames
    its folder."""
    if not (everywhere or ranks.now().is_main):
        # Made all the same: others may wait for this rank as they make a piece.
        for _ in pieces:
            pass
        return Written(0, "")
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with failures_named(path), _opened(path, flags) as descriptor:
        for piece in pieces:
            for start in range(0, len(piece), PIECE):
                part = piece[start : start + PIECE]
                digest.update(part)
                size += len(part)
                _write_all(descriptor, part)
    return Written(size, digest.hexdigest())


def json_line(record: Any) -> bytes:
    """A record as one line of JSON. Lone surrogates, which UTF-8 does not have, become U+FFFD."""
    try:
        return msgspec.json.encode(record) + b"\n"
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(record), ensure_ascii=False)
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode() + b"\n"


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file; they are on the disk when this returns."""
    with ranks.now().in_turn() as is_mine, failures_named(path):
        if not is_mine:
            return
        is_new = not path.exists()
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
            _write_all(descriptor, data)
        if is_new:
            sync(path.parent)


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, given whole or in pieces, so that a reader sees the old content or the new."""
    aside = path.with_name(path.name + ".part")
    write(aside, [data] if isinstance(data, bytes) else data)
    with ranks.now().in_turn() as is_mine, failures_named(path):
        if is_mine:
            os.rename(aside, path)
            sync(path.parent)


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """The value in a JSON file that a run wrote, of this type; None where there is no file.

    Raises ValueError where it is not whole, with what to do.
    """
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, or of another version ({error}); restore it, or delete it and "
            "repeat the command that writes it"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each entered in its parent on the disk."""
    if not path.is_dir() and ranks.now().is_main:
        make_folder(path.parent)
        with failures_named(path):
            # Another run that starts at once may have been faster.
            path.mkdir(exist_ok=True)
            sync(path.parent)


def publish(aside: Path, folder: Path) -> None:
    """Give a complete folder its name. What had the name before is moved away, then removed."""
    old = _hidden(folder)
    with ranks.now().in_turn() as is_mine, failures_named(folder):
        if not is_mine:
            return
        sync(aside)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        sync(folder.parent)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a folder. A failure is left to the next attempt: nothing depends on it."""
    if ranks.now().is_main:
        shutil.rmtree(folder, ignore_errors=True)


def retire(folder: Path) -> None:
    """Delete a folder that has a name: it loses the name first, so no part of it is ever found."""
    if not ranks.now().is_main:
        return
    hidden = _hidden(folder)
    with contextlib.suppress(OSError):
        os.rename(folder, hidden)
        remove(hidden)


def _hidden(folder: Path) -> Path:
    """A free name: a folder that could not be deleted before may still have the last one."""
    return folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.old")


def sync(folder: Path) -> None:
    """Bring the entries of a folder to the disk."""
    with _opened(folder, os.O_RDONLY):
        pass


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of a file or folder, on the disk when it closes."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
