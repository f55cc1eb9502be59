"""The run folder: one writer, append-only journals that survive a torn line, atomic JSON files.

Everything a run did can be read from its folder. Stages ask their journal what is already there
and compute only what is missing, so the same command continues an interrupted run.
"""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec

from intfast import cli, ranks
from intfast.checks import MAY_CHANGE
from intfast.config import Config
from intfast.state import files
from intfast.state.journal import Journal

T = TypeVar("T")
LOCK = ".lock"
PROMPT_TIME = "prompt_time.txt"
"""The file of a run that says what its prompts take for now."""
INPUTS = {"model.path", "data.train", "data.test"}
"""Settings of MAY_CHANGE whose content may not."""


class RunFolder:
    """The folder of one run, locked against a second writer while open.

    Raises ValueError when the folder holds a run of another config (the differing keys are
    listed), or RuntimeError when another process is writing to it.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run)
        self._lock: TextIO | None = None
        self.changed: dict[str, tuple[Any, Any]] = {}
        """Settings with another value than before: key -> (old, new)."""
        self._config = config
        try:
            last_write = ranks.now().first(self._take)
            meet(self.path)
            self.resumed = self._compare_config()
        except BaseException:
            self.__exit__()
            raise
        # Records that a comparison put here are no run yet.
        self.last_write = last_write if self.resumed else None
        """When a process before this one last wrote a file here, in Unix seconds; None: never."""

    def _take(self) -> float | None:
        """Make and lock the folder; when it was last written before."""
        files.make_folder(self.path)
        # Not "w", which would be a write of this process.
        self._lock = (self.path / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is writing to {self.path}; wait for it, or use another run=FOLDER"
            ) from error
        # Behind the lock: the files of another writer come and go.
        return _last_write(self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def journal(self, name: str, kind: type[T]) -> Journal[T]:
        """The journal `name`.jsonl of this run."""
        return Journal(self.path / f"{name}.jsonl", kind)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, atomically."""
        write_json(self.path / name, value)

    def read_json(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """The content of a JSON file of the run, see files.read_json."""
        return files.read_json(self.path / name, kind)

    def rename_entry(self, file: str, old: str, new: str) -> None:
        """Give an entry of a JSON file of named things another name, where there is one."""
        stored = self.read_json(file) or {}
        if old in stored:
            stored[new] = stored.pop(old) | {"name": new}
            self.write_json(file, stored)

    def keep_config(self) -> None:
        """Store the resolved config."""
        files.write_atomic(self.path / "config.toml", cli.to_toml(self._config).encode())

    def _compare_config(self) -> bool:
        """Store a new config, or compare with the stored one; whether one was there."""
        path = self.path / "config.toml"
        if not path.exists():
            self.keep_config()
            return False
        changed, self.changed = changed_settings(self._config, path)
        if changed:
            raise ValueError(
                f"{self.path} holds a run with another config; differing keys:"
                f"{in_words(changed)}\n"
                "use another run=FOLDER, or the old values to continue it"
            )
        # Inputs at another place are believed when their digests agree, see identity.keep.
        if self.changed and not self.changed.keys() & INPUTS:
            self.keep_config()
        return True


Changed = dict[str, tuple[Any, Any]]
"""Setting -> (stored value, given value)."""


def changed_settings(config: Config, stored: Path) -> tuple[Changed, Changed]:
    """The settings that differ from those of a stored config.toml: a run cannot go on with the
    first ones, and can with the second, MAY_CHANGE (model and data after their digests)"""
    changed = cli.differences(config, cli.load(stored))
    may = {key: pair for key, pair in changed.items() if key in MAY_CHANGE}
    if "rl.steps" in may and may["rl.steps"][0] > config.rl.steps:
        # Steps that are done are in the weights.
        del may["rl.steps"]
    return {key: pair for key, pair in changed.items() if key not in may}, may


def in_words(changed: Changed) -> str:
    """Lines of an error that name settings with their values."""
    return "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in changed.items())


def meet(folder: Path) -> None:
    """Raise ranks.Refused unless all ranks see the same folder here, which rank 0 made."""
    world, token = ranks.now(), folder / ".ranks"
    if world.world == 1:
        return

    def write() -> bytes:
        files.write_atomic(token, text := os.urandom(8).hex().encode())
        return text

    written = world.first(write)
    seen = token.read_bytes() if token.is_file() else b""
    fault = f"sees another folder {folder} than rank 0; give all nodes one shared folder"
    world.require("" if seen == written else fault)
    world.first(lambda: token.unlink(missing_ok=True))


def write_json(path: Path, value: Any) -> None:
    """Write a value, msgspec Structs included, as an indented JSON file, atomically."""
    files.write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def prompt_time(run: Path) -> datetime:
    """What chat templates with a date are told: when the run of a folder, or the one that it has
    its records from, was started; now where nothing is there yet."""
    # One clock for all ranks.
    return ranks.now().first(lambda: _prompt_time(run))


def _prompt_time(run: Path) -> datetime:
    file = run / PROMPT_TIME
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    elif stored := files.read_json(run / "manifest.json"):
        # Older versions wrote down when the run was started, and nothing else.
        text = stored.get("prompt_time") or stored["starts"][0]["time"]
    else:
        return datetime.now(UTC).replace(microsecond=0)
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise ValueError(
            f"{file}: expected a time such as 2026-01-31T12:00, got {text!r}"
        ) from error


def _last_write(folder: Path) -> float | None:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return max((path.stat().st_mtime for path in files), default=None)
