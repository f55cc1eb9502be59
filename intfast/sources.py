"""A source (file, dataset folder or hub name) -> rows with the place each came from.

By hand, with file and line of every fault: .jsonl; .json holding one list of objects; folders of
these, one file or folder a split. By `datasets` (the extra of that name): .parquet and .arrow,
folders of them, what `datasets` saved to disk, and the hub: `org/name`, `org/name:config`. All but
single files may be followed by `@split`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

from intfast import adapters

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
MAX_ERRORS_SHOWN = 20
KINDS = (".jsonl", ".json", ".parquet", ".arrow")
BATCH_ROWS = 256
"""Rows of a table that are in memory at once."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = tuple[str, dict[str, Any]]
"""Where the row stands ("train.jsonl:17"), and its columns."""


MAX_NAMED = 200
"""Pieces of a listing of rows."""
_ROW = re.compile(r"(.*[: ])(\d+)")


def named(rows: Iterable[str]) -> str:
    """Rows in words: "a.jsonl:3, 5-9, b.jsonl:1". Of more than MAX_NAMED pieces the first."""
    pieces: list[list[Any]] = []
    for row in rows:
        found = _ROW.fullmatch(row)
        home, number = (found[1], int(found[2])) if found else (row, -1)
        if pieces and found and pieces[-1][0] == home and pieces[-1][2] == number - 1:
            pieces[-1][2] = number
        else:
            pieces.append([home, number, number])
    words, last = [], None
    for home, first, end in pieces[:MAX_NAMED]:
        numbers = "" if first < 0 else f"{first}-{end}" if end > first else str(first)
        words.append(numbers if first >= 0 and home == last else home + numbers)
        last = home
    left = sum(end - first + 1 for _, first, end in pieces[MAX_NAMED:])
    return ", ".join(words) + (f", and {left} more" if left else "")


class Faults:
    """What is wrong with a source, collected so that a user sees all of it at once."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        """The row, and what is wrong with it."""

    def add(self, where: str, message: str) -> None:
        """Note one fault."""
        self.found.append((where, message))

    def lines(self, source: str) -> list[str]:
        """The faults in words; [] where there are none."""
        if not (num := len(self.found)):
            return []
        head = f"{source} has {num} fault{'s' * (num > 1)}; correct or remove these rows:"
        lines = [f"  {where}: {message}" for where, message in self.found[:MAX_ERRORS_SHOWN]]
        if rest := self.found[MAX_ERRORS_SHOWN:]:
            lines.append(f"  and {len(rest)} more: {named(where for where, _ in rest)}")
        return [head, *lines]

    def raise_any(self, source: str, dropped: Sequence[str] = ()) -> None:
        """Raise one ValueError that lists the faults, if there are any, and what was dropped."""
        if lines := self.lines(source):
            also = ["and these would be dropped:", *dropped] if dropped else []
            raise ValueError("\n".join([*lines, *also]))


class Source(NamedTuple):
    """Rows of the chosen split. `note` says how the split was chosen, "" where none exists."""

    split: str
    note: str
    rows: Iterator[Row]


def open_source(source: str, purpose: str, faults: Faults) -> Source:
    """The rows of a source. `purpose` ("train" or "test") is the split taken when several exist.

    Raises ValueError when the source cannot be found or does not say which rows are meant, and
    RuntimeError when `datasets` is missing or the hub does not answer.
    """
    if adapters.is_source(source):
        return Source("", *adapters.rows(source, purpose))
    name, asked, path = locate(source)
    if path.is_file():
        if path.suffix in _READERS:
            return Source("", "", _read_files([path], path.parent, faults))
        return Source("", "", _by_datasets(path.name, "", purpose, path).rows)
    if path.is_dir():
        if shards := _json_shards(path):
            split, note = _choose(name, list(shards), asked, purpose)
            return Source(split, note, _read_files(shards[split], path, faults))
        return _by_datasets(name, asked, purpose, path)
    return _by_datasets(name, asked, purpose)


def locate(source: str) -> tuple[str, str, Path]:
    """(name, the split that is asked for or "", path) of a source; nothing is read.

    Raises ValueError for what is neither there nor like a name of the hub.
    """
    name, asked = source, ""
    if adapters.is_source(source):
        return name, asked, Path()
    if "@" in source and not Path(source).expanduser().exists():
        name, _, asked = source.rpartition("@")
    path = Path(name).expanduser()
    if path.is_file() and asked:
        raise ValueError(f"{path} is one file and has no splits; remove @{asked}")
    if path.is_file() and path.suffix not in KINDS:
        raise ValueError(f"{path} is not a problem file; expected {', '.join(KINDS)}")
    if path.is_dir() and not any(file.suffix in KINDS for file in path.rglob("*")):
        raise ValueError(f"{path} holds no {', '.join(KINDS)}")
    is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and path.suffix not in KINDS
    if not path.exists() and not is_hub:
        raise ValueError(_not_found(path))
    return name, asked, path


def _not_found(path: Path) -> str:
    folder = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.suffix in KINDS)
    missing = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(missing, inside, n=3)
    lines = [f"{path} does not exist"]
    if near:
        lines.append(f"did you mean {' or '.join(str(folder / name) for name in near)}?")
    if inside:
        lines.append(f"{folder.resolve()} holds: {', '.join(inside[:10])}")
    return "\n".join(lines)


def _choose(source: str, splits: list[str], asked: str, purpose: str) -> tuple[str, str]:
    """The split to read, and the sentence that says why."""
    listing = ", ".join(splits)
    if asked:
        if asked not in splits:
            raise ValueError(f"{source} has no split {asked!r}; it has: {listing}")
        return asked, f"split {asked!r}, as asked"
    if len(splits) == 1:
        return splits[0], f"split {splits[0]!r}, the only one"
    if purpose not in splits:
        raise ValueError(
            f"{source} has several splits and none called {purpose!r}: {listing}; "
            f"name one: {source}@{splits[0]}"
        )
    return purpose, f"split {purpose!r} of {listing}"


# ---- JSON


def _json_shards(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder that holds JSON alone; else nothing.

    Raises ValueError when the files of a split lie in several folders: are they one dataset?
    """
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in KINDS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    told = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
    if any(path.suffix not in _READERS or path.name in told for path in paths):
        return {}
    shards: dict[str, list[Path]] = {}
    for path in paths:
        shards.setdefault(_split_of(path.relative_to(folder).parts), []).append(path)
    for split in shards.values():
        if len(homes := sorted({str(path.parent.relative_to(folder)) for path in split})) > 1:
            raise ValueError(
                f"{folder} holds several datasets ({', '.join(homes)}); "
                f"name one: {folder / homes[0]}"
            )
    return shards


def _split_of(parts: tuple[str, ...]) -> str:
    """The split that a file belongs to, from its name, else its folder, else "train"."""
    stem = parts[-1].rsplit(".", 1)[0]
    if numbered := re.fullmatch(r"(.+?)-\d+-of-\d+", stem):
        return numbered[1]
    words = [*re.split(r"[^a-z]+", stem.lower()), *(part.lower() for part in parts[-2::-1])]
    return next((word for word in words if word in SPLIT_NAMES), "train")


def _read_files(paths: list[Path], folder: Path, faults: Faults) -> Iterator[Row]:
    """The objects in JSON files, each called by its path in the folder."""
    for path in paths:
        try:
            for where, row in _READERS[path.suffix](path, str(path.relative_to(folder)), faults):
                if isinstance(row, dict):
                    yield where, row
                else:
                    faults.add(where, f"expected an object with columns, got {_kind(row)}")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _read_jsonl(path: Path, label: str, faults: Faults) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield f"{label}:{number}", _decode(line)
            except ValueError as error:
                cut_off = "" if line.endswith(b"\n") else "; the file ends here, was it cut off?"
                faults.add(f"{label}:{number}", f"{error}{cut_off}")


def _read_json(path: Path, label: str, faults: Faults) -> Iterator[tuple[str, Any]]:
    try:
        rows = _decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; JSON lines belong in .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} must hold one list of objects, it holds {_kind(rows)}; "
            "take the list out, or write one object per line to a .jsonl file"
        )
    yield from ((f"{label} row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {".jsonl": _read_jsonl, ".json": _read_json}


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f"no number that can be read: {text[:60]}") from error


_JSON = msgspec.json.Decoder(float_hook=_decimal)
"""Numbers as they are written: 0.1 and 17 more digits are no 0.1."""


def _decode(data: bytes) -> Any:
    """The JSON value. Raises ValueError also where a key occurs twice: which one was meant?"""
    try:
        value = _JSON.decode(data)
        json.loads(data, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except msgspec.DecodeError as error:
        start = data[:60].decode(errors="replace")
        raise ValueError(f"not JSON ({error}): {start!r}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> None:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {name!r} occurs twice")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


# ---- everything else


def _by_datasets(name: str, asked: str, purpose: str, path: Path | None = None) -> Source:
    """The rows of a file or folder that is no JSON, or, without a path, of a hub dataset.

    Read as a stream: nothing is copied; what locks `datasets` needs are in a temporary folder.
    """
    missing = f"there is no file or folder {name}"
    try:
        datasets = importlib.import_module("datasets")
        pyarrow = importlib.import_module("pyarrow")
    except ImportError as error:
        what = path or f"{missing}; as a hub dataset it"
        raise RuntimeError(f"{what} needs datasets: pip install -e '.[datasets]'") from error
    refused = (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
    kind, said = RuntimeError, f"{missing}, and the hub dataset could not be loaded"
    if path is not None:
        kind, said = ValueError, f"{path} cannot be read by datasets"
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        try:
            found = _load(datasets, name, path, cache)
        except refused as error:
            raise kind(f"{said}: {error}") from error
        split, note = _choose(name, list(map(str, found)), asked, purpose)
        held = stack.pop_all()
    label = path.name if path is not None and path.is_file() else f"{name}@{split}"

    def rows() -> Iterator[Row]:
        with held:
            try:
                tables = found[split].with_format("arrow").iter(batch_size=BATCH_ROWS)
                records = (row for table in tables for row in _records(table))
                yield from ((f"{label} row {n}", row) for n, row in enumerate(records, 1))
            except refused as error:
                raise kind(f"{said}: {error}") from error

    return Source(split, note, rows())


def _records(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table."""
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    narrow = {name: kind for name, kind in kinds.items() if _NARROW.search(str(kind))}
    for row in table.to_pylist():
        yield row | {name: _shortest(row[name], kind) for name, kind in narrow.items()}


_NARROW = re.compile(r"\b(?:half)?float\b")


def _shortest(value: Any, kind: Any) -> Any:
    """A value with its own digits: 132.04 of a float32 is 132.03999... as a Python float."""
    name = str(kind)
    if value is None or not _NARROW.search(name):
        return value
    if name in ("float", "halffloat"):
        numpy = importlib.import_module("numpy")
        return float(str((numpy.float32 if name == "float" else numpy.float16)(value)))
    if isinstance(value, dict):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    # Of what is stored once for many rows; a list holds no answer.
    return value if isinstance(value, list) else _shortest(value, kind.value_type)


def _load(datasets: ModuleType, name: str, path: Path | None, cache: str) -> Mapping[str, Any]:
    """Split -> its rows, read when they are asked for."""
    load = partial(datasets.load_dataset, streaming=True, cache_dir=cache)
    if path is None:
        dataset, _, config = name.partition(":")
        return load(dataset, config or None)
    if path.is_file():
        return load(path.suffix[1:], data_files=str(path))
    if not any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return load(str(path))
    found = datasets.load_from_disk(str(path))
    return found if isinstance(found, dict) else {str(found.split or "train"): found}
