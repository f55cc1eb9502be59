"""A source (file, dataset folder or hub name) -> rows with the place each came from.

Files: .jsonl; .json holding one list of objects; .parquet and .arrow (extra `parquet`).
Folders: shards `train-00000-of-00001.parquet`, `test.jsonl`, `train/0000.parquet`, one level of
`data/`, or what `datasets` saves to disk. Hub: `org/name`, `org/name:config` (extra
`datasets`). All but single files may be followed by `@split`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
MAX_ERRORS_SHOWN = 20
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json")

Row = tuple[str, dict[str, Any]]
"""Where the row stands ("train.jsonl:17"), and its columns."""


class Faults:
    """What is wrong with a source, collected so that a user sees all of it at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.num_all = 0

    def add(self, where: str, message: str) -> None:
        """Count one fault; the first MAX_ERRORS_SHOWN are kept for the listing."""
        self.num_all += 1
        if len(self.messages) < MAX_ERRORS_SHOWN:
            self.messages.append(f"  {where}: {message}")

    def raise_any(self, source: str) -> None:
        """Raise one ValueError that lists the faults, if there are any."""
        if not self.num_all:
            return
        more = self.num_all - len(self.messages)
        plural = "s" if self.num_all > 1 else ""
        lines = [f"{source} has {self.num_all} fault{plural}; correct or remove these rows:"]
        lines += self.messages + ([f"  and {more} more"] if more else [])
        raise ValueError("\n".join(lines))


class Source(NamedTuple):
    """Rows of the chosen split. `note` says how the split was chosen, "" where none exists."""

    split: str
    note: str
    rows: Iterator[Row]


def open_source(source: str, purpose: str, faults: Faults) -> Source:
    """The rows of a source. `purpose` ("train" or "test") is the split taken when several exist.

    Raises ValueError when the source cannot be found or does not say which rows are meant, and
    RuntimeError when an optional package is missing or the hub does not answer.
    """
    path = Path(source).expanduser()
    name, at, asked = source.rpartition("@")
    if not path.exists() and at:
        path = Path(name).expanduser()
    else:
        name, asked = source, ""
    if path.is_file():
        if asked:
            raise ValueError(f"{path} is one file and has no splits; remove @{asked}")
        return Source("", "", _read_file(path, faults))
    if path.is_dir():
        shards = _shards(path)
        split, note = _choose(name, list(shards), asked, purpose)
        return Source(split, note, _read_shards(shards[split], path, faults))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and path.suffix not in _READERS:
        return _open_hub(name, asked, purpose)
    raise ValueError(_not_found(path))


def _not_found(path: Path) -> str:
    folder = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.suffix in _READERS)
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


# ---- folders


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Files of each split. Raises ValueError when they do not form one dataset."""
    if (folder / "dataset_dict.json").is_file():
        splits = _state(folder, "dataset_dict.json").get("splits")
        plain = isinstance(splits, list) and all(
            isinstance(split, str) and Path(split).name == split for split in splits
        )
        if not plain:
            raise ValueError(f"{folder}: the splits of dataset_dict.json must be names: {splits!r}")
        return {split: _saved(folder / split) for split in splits}
    if (folder / "state.json").is_file():
        return {str(_state(folder).get("_split") or "train"): _saved(folder)}
    shards: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.suffix in _READERS and not hidden and path.name not in _NOT_ROWS:
            shards.setdefault(_split_of(parts), []).append(path)
    if not shards:
        raise ValueError(f"{folder} holds no {', '.join(_READERS)} file")
    for split, paths in shards.items():
        homes = sorted({str(path.parent.relative_to(folder)) for path in paths})
        if len(homes) > 1:
            raise ValueError(
                f"{folder} holds several datasets ({', '.join(homes)}); "
                f"name one: {folder / homes[0]}"
            )
        if len({path.suffix for path in paths}) > 1:
            names = ", ".join(path.name for path in paths[:6])
            raise ValueError(f"split {split!r} of {folder} exists in several formats: {names}")
    return shards


def _saved(folder: Path) -> list[Path]:
    """The arrow files that `datasets` saved to a folder."""
    try:
        names = [entry["filename"] for entry in _state(folder)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is not what datasets writes: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / 'state.json'} names {name!r}, a file outside its folder")
    return [folder / name for name in names]


def _state(folder: Path, name: str = "state.json") -> dict[str, Any]:
    try:
        state = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{folder / name} must hold an object, it holds {_kind(state)}")
    return state


def _split_of(parts: tuple[str, ...]) -> str:
    """The split that a file belongs to, from its name, else its folder, else "train"."""
    stem = parts[-1].rsplit(".", 1)[0]
    if numbered := re.fullmatch(r"(.+?)-\d+-of-\d+", stem):
        return numbered[1]
    words = [*re.split(r"[^a-z]+", stem.lower()), *(part.lower() for part in parts[-2::-1])]
    return next((word for word in words if word in SPLIT_NAMES), "train")


def _read_shards(paths: list[Path], folder: Path, faults: Faults) -> Iterator[Row]:
    for path in paths:
        yield from _read_file(path, faults, str(path.relative_to(folder)))


# ---- files


def _read_file(path: Path, faults: Faults, label: str = "") -> Iterator[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path} is not a problem file; expected {', '.join(_READERS)}")
    return _readable(path, reader(path, label or path.name, faults))


def _readable(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, with the file named where the system or the text's encoding refuses it."""
    try:
        yield from rows
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _explain(error: Exception, data: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "occurs twice" in str(error):
        return str(error)
    start = data[:60].decode(errors="replace")
    return f"not JSON ({error}): {start!r}"


_DECODE_ERRORS = (ValueError, RecursionError)  # msgspec's and the codec's are ValueErrors


def _decode(data: bytes) -> Any:
    """The JSON value. Raises ValueError also where a key occurs twice: which one was meant?"""
    value = msgspec.json.decode(data)
    json.loads(data, object_pairs_hook=_unique)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice")


def _read_jsonl(path: Path, label: str, faults: Faults) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{label}:{number}"
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                row = _decode(line)
            except _DECODE_ERRORS as error:
                cut_off = "" if line.endswith(b"\n") else "; the file ends here, was it cut off?"
                faults.add(where, _explain(error, line) + cut_off)
                continue
            yield from _objects(where, row, faults)


def _read_json(path: Path, label: str, faults: Faults) -> Iterator[Row]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        rows = _decode(data)
    except _DECODE_ERRORS as error:
        raise ValueError(f"{path}: {_explain(error, data)}; JSON lines belong in .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} must hold one list of objects, it holds {_kind(rows)}; "
            "take the list out, or write one object per line to a .jsonl file"
        )
    for index, row in enumerate(rows):
        yield from _objects(f"{label}[{index}]", row, faults)


def _objects(where: str, row: object, faults: Faults) -> Iterator[Row]:
    if isinstance(row, dict):
        yield where, row
    else:
        faults.add(where, f"expected an object with columns, got {_kind(row)}")


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _pyarrow(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise RuntimeError(
            "parquet and arrow files need pyarrow: pip install -e '.[parquet]'"
        ) from error


def _read_parquet(path: Path, label: str, faults: Faults) -> Iterator[Row]:
    parquet = _pyarrow("parquet")
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from _table_rows(label, batches)
    except _pyarrow("lib").ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file: {error}") from error


def _read_arrow(path: Path, label: str, faults: Faults) -> Iterator[Row]:
    ipc = _pyarrow("ipc")
    try:
        with path.open("rb") as file:
            yield from _table_rows(label, ipc.open_stream(file))
    except _pyarrow("lib").ArrowException as error:
        raise ValueError(f"{path} is not a whole arrow stream: {error}") from error


def _table_rows(label: str, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{label} row {number}", row
            number += 1


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# ---- hub


def _open_hub(name: str, asked: str, purpose: str) -> Source:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise RuntimeError(
            f"there is no file or folder {name}; as a hub dataset it needs the datasets package: "
            "pip install -e '.[datasets]'"
        ) from error
    dataset, _, config = name.partition(":")
    try:
        splits = datasets.get_dataset_split_names(dataset, config or None)
        split, note = _choose(name, list(splits), asked, purpose)
        rows = datasets.load_dataset(dataset, config or None, split=split)
    except (OSError, ImportError) as error:
        raise RuntimeError(
            f"there is no file or folder {name}, and the hub dataset could not be loaded: {error}"
        ) from error
    return Source(split, note, ((f"{name}@{split} row {i}", row) for i, row in enumerate(rows)))
