"""A source (file, dataset folder or hub name) -> rows with the place each came from.

By hand, with file and line of every fault: .jsonl; .json holding one list of objects; folders of
these, one file or folder a split. By `datasets` (the extra of that name): .parquet and .arrow,
folders of them, what `datasets` saved to disk, and the hub: `org/name`, `org/name:config`. All but
single files may be followed by `@split`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
MAX_ERRORS_SHOWN = 20
KINDS = (".jsonl", ".json", ".parquet", ".arrow")

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
    RuntimeError when `datasets` is missing or the hub does not answer.
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
        if path.suffix in (".parquet", ".arrow"):
            _, _, rows = _by_datasets(path.name, "", purpose, path)
            return Source("", "", rows)
        return Source("", "", _read_file(path, path.name, faults))
    if path.is_dir():
        if shards := _json_shards(path):
            split, note = _choose(name, list(shards), asked, purpose)
            files = ((file, str(file.relative_to(path))) for file in shards[split])
            rows = (row for file, label in files for row in _read_file(file, label, faults))
            return Source(split, note, rows)
        return _by_datasets(name, asked, purpose, path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and path.suffix not in KINDS:
        return _by_datasets(name, asked, purpose)
    raise ValueError(_not_found(path))


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


def _read_file(path: Path, label: str, faults: Faults) -> Iterator[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path} is not a problem file; expected {', '.join(KINDS)}")
    return _readable(path, reader(path, label, faults))


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


_READERS: dict[str, Callable[[Path, str, Faults], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


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

    def explained(error: Exception) -> Exception:
        if path is not None:
            return ValueError(f"{path} cannot be read by datasets: {error}")
        return RuntimeError(f"{missing}, and the hub dataset could not be loaded: {error}")

    cache = tempfile.TemporaryDirectory()
    try:
        found = _load(datasets, name, path, cache.name)
    except refused as error:
        cache.cleanup()
        raise explained(error) from error
    split, note = _choose(name, list(map(str, found)), asked, purpose)
    label = path.name if path is not None and path.is_file() else f"{name}@{split}"

    def rows() -> Iterator[Row]:
        with cache:
            try:
                yield from ((f"{label} row {i}", row) for i, row in enumerate(found[split]))
            except refused as error:
                raise explained(error) from error

    return Source(split, note, rows())


def _load(datasets: ModuleType, name: str, path: Path | None, cache: str) -> Mapping[str, Any]:
    """Split -> its rows, read when they are asked for."""
    if path is None:
        dataset, _, config = name.partition(":")
        return datasets.load_dataset(dataset, config or None, streaming=True, cache_dir=cache)
    if path.is_file():
        kind, files = path.suffix[1:], str(path)
        return datasets.load_dataset(kind, data_files=files, streaming=True, cache_dir=cache)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = datasets.load_from_disk(str(path))
        return found if isinstance(found, dict) else {str(found.split or "train"): found}
    return datasets.load_dataset(str(path), streaming=True, cache_dir=cache)
