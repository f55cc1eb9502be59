"""JSONL files of records, which stay on the disk: in memory is where each line begins.

A journal holds every token that a run generated. As Python numbers they would take ten times the
memory that their file takes; a place takes 8 bytes a record.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

from intfast import ranks
from intfast.state import files

T = TypeVar("T")
BUFFER_BYTES = 1 << 18
"""Read at once: a line of a long solution is longer than Python's own buffer."""


class Lazy(Sequence[T]):
    """A sequence whose items are made, as from a file, each time they are asked for."""

    def __init__(self, keys: Sequence[Any], make: Callable[[Any], T]) -> None:
        self._keys, self._make = keys, make

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: int) -> T:
        return self._make(self._keys[place])


def where(records: Sequence[T], test: Callable[[T], bool]) -> Sequence[T]:
    """The records that pass a test; which they are is found now, they are read later."""
    places = array("Q", (place for place, record in enumerate(records) if test(record)))
    return Lazy(places, records.__getitem__)


class Rows(Sequence[T]):
    """The whole records of a JSONL file, in their order; one that does not exist has none.

    `faults` are the numbers of its damaged lines, from 1, each with what is wrong; `end` is where
    the last whole line ends. With `finished` a last line without its end counts as well.
    """

    def __init__(self, path: Path, kind: type[T], finished: bool = False) -> None:
        self.path, self.kind = path, kind
        self._decode = msgspec.json.Decoder(kind).decode
        self._starts = array("Q")
        self.faults: list[tuple[int, str]] = []
        self.end = 0
        if not finished and not path.is_file():
            return
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if not (finished or line.endswith(b"\n")):
                    break
                try:
                    self._decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    self.faults.append((number, str(error)))
                self._starts.append(self.end)
                self.end += len(line)

    def _open(self) -> BinaryIO:
        return self.path.open("rb", buffering=BUFFER_BYTES)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> T:
        start = self._starts[place]
        with self._open() as file:
            file.seek(start)
            return self._decode(file.readline())

    def __iter__(self) -> Iterator[T]:
        num = len(self)
        if num:
            with self._open() as file:
                for _ in range(num):
                    yield self._decode(file.readline())


class Journal(Rows[T], Generic[T]):
    """A JSONL file of records of one type, append-only, for its only writer.

    Opening removes a last line without its line end (a write that was cut off). A damaged line
    elsewhere raises ValueError with file and line number.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        super().__init__(path, kind)
        for number, error in self.faults:
            raise ValueError(
                f"{path}:{number} is no {kind.__name__} record ({error}); "
                "restore the file, or delete it to repeat its stage"
            )
        if ranks.now().is_main and path.exists() and path.stat().st_size > self.end:
            with path.open("r+b") as file:
                file.truncate(self.end)

    def append(self, records: Iterable[T]) -> None:
        """Add records; they are on the disk when this returns."""
        lines = [files.json_line(record) for record in records]
        if not lines:
            return
        files.append(self.path, b"".join(lines))
        # As they were written: of a row of seconds every rank has its own.
        for size in ranks.now().first(lambda: [len(line) for line in lines]):
            self._starts.append(self.end)
            self.end += size

    def sort(self, key: Callable[[T], Any]) -> None:
        """Put the records into the order of their keys, where they are in another."""
        keys = [key(record) for record in self]
        places = sorted(range(len(keys)), key=keys.__getitem__)
        if places != list(range(len(keys))):
            self.replace(self[place] for place in places)

    def replace(self, records: Iterable[T]) -> None:
        """Put these records, which may come from this journal, in place of all, atomically."""
        starts, end = array("Q"), 0

        def lines() -> Iterator[bytes]:
            nonlocal end
            for record in records:
                line = files.json_line(record)
                starts.append(end)
                end += len(line)
                yield line

        files.write_atomic(self.path, lines())
        self._starts, self.end = ranks.now().first(lambda: (starts, end))
