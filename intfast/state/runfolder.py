"""The run folder: one writer, append-only journals that survive a torn line, atomic JSON files.

Everything a run did can be read from its folder. Stages ask their journal what is already there
and compute only what is missing, so the same command continues an interrupted run.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import msgspec

from intfast import cli, ranks
from intfast.config import MAY_CHANGE, Config
from intfast.state import files

T = TypeVar("T")
PROMPT_TIME = "prompt_time.txt"
"""The file of a run that says what its prompts take for now."""


class Journal(Generic[T]):
    """A JSONL file of records of one type, append-only.

    Opening reads what is there; a last line without its line end (a write that was cut off) is
    removed. A damaged line elsewhere raises ValueError with file and line number.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        self.kind = kind
        self.records: list[T] = []
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and ranks.now().is_main:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.records.append(msgspec.json.decode(line, type=kind))
            except msgspec.DecodeError as error:
                raise ValueError(
                    f"{path}:{number} is no {kind.__name__} record ({error}); "
                    "restore the file, or delete it to repeat its stage"
                ) from error

    def append(self, records: Iterable[T]) -> None:
        """Add records; they are on the disk when this returns."""
        records = list(records)
        if not records:
            return
        data = b"".join(files.json_line(record) for record in records)
        files.append(self.path, data)
        self.records += records

    def replace(self, records: Iterable[T]) -> None:
        """Put these records in place of all, atomically."""
        self.records = list(records)
        data = b"".join(files.json_line(record) for record in self.records)
        files.write_atomic(self.path, data)


class RunFolder:
    """The folder of one run, locked against a second writer while open.

    Raises ValueError when the folder holds a run of another config (the differing keys are
    listed), or RuntimeError when another process is writing to it.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run)
        self._lock: TextIO | None = None
        last_write = ranks.now().first(self._take)
        ranks.now().meet(self.path)
        self.changed: dict[str, tuple[Any, Any]] = {}
        """Settings with another value than before: key -> (old, new)."""
        try:
            self.resumed = self._keep_config(config)
        except BaseException:
            self.__exit__()
            raise
        # Records that a comparison put here are no run yet.
        self.last_write = last_write if self.resumed else None
        """When a process before this one last wrote a file here, in Unix seconds; None: never."""

    def _take(self) -> float | None:
        """Lock the folder; when it was last written before."""
        files.make_folder(self.path)
        last_write = _last_write(self.path)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RuntimeError(
                f"another process is writing to {self.path}; wait for it, or use another run=FOLDER"
            ) from error
        return last_write

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

    def _keep_config(self, config: Config) -> bool:
        """Store the resolved config, or compare with the stored one; whether one was there."""
        path = self.path / "config.toml"
        if path.exists():
            changed, self.changed = changed_settings(config, path)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another config; differing keys:"
                    f"{in_words(changed)}\n"
                    "use another run=FOLDER, or the old values to continue it"
                )
            if self.changed:
                files.write_atomic(path, cli.to_toml(config).encode())
            return True
        files.write_atomic(path, cli.to_toml(config).encode())
        return False


Changed = dict[str, tuple[Any, Any]]
"""Setting -> (stored value, given value)."""


def changed_settings(config: Config, stored: Path) -> tuple[Changed, Changed]:
    """The settings that differ from those of a stored config.toml: a run cannot go on with the
    first ones, and can with the second, MAY_CHANGE."""
    changed = cli.differences(config, cli.load(stored))
    may = {key: pair for key, pair in changed.items() if key in MAY_CHANGE}
    return {key: pair for key, pair in changed.items() if key not in may}, may


def in_words(changed: Changed) -> str:
    """Lines of an error that name settings with their values."""
    return "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in changed.items())


def write_json(path: Path, value: Any) -> None:
    """Write a value, msgspec Structs included, as an indented JSON file, atomically."""
    files.write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def prompt_time(run: Path) -> datetime:
    """What chat templates with a date are told: when the run of a folder, or the one that it has
    its records from, was started; now where nothing is there yet."""
    # One clock for all ranks.
    return ranks.now().first(lambda: _prompt_time(run))


def _prompt_time(run: Path) -> datetime:
    file, manifest = run / PROMPT_TIME, run / "manifest.json"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    elif manifest.is_file():
        stored = msgspec.json.decode(manifest.read_bytes())
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
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max(times, default=None)
