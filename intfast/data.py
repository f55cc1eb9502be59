"""Problem files of any usual layout -> Problems, and a report of what was taken from where.

Column names are resolved once per source (see ALIASES, and `columns` to say them yourself):
names match without regard to case, "Short Answer" is short_answer, "a.b" is field b of column a.

Rows dropped, each kind counted in the report: no problem text; no answer; an answer longer than
the grader reads; duplicates (of each problem the first row is kept); every row of a problem that
occurs with different answers, since nothing says which is right; and rows above a limit. An id that
two different problems claim gets the problem's content hash appended, which does not depend on the
order of the rows.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

from intfast.grading.answers import MAX_CHARS, Reason, compare_quickly, last_boxed
from intfast.records import Problem, Record
from intfast.sources import Faults, Row, open_source

ALIASES: dict[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "prompt", "messages"),
    "answer": (
        "answer",
        "expected_answer",
        "ground_truth",
        "reward_model.ground_truth",
        "short_answer",
        "final_answer",
    ),
    "reference": ("reference_solution", "reference", "solution", "generated_solution"),
    "id": ("id", "problem_idx", "question_id", "problem_id", "unique_id", "extra_info.index"),
}
"""Column names known for each field, most specific first."""

_ROWS_FOR_COLUMNS = 1000


class DataReport(Record):
    """What a source gave. `str(report)` is for the console.

    Example: DataReport(source="aime.jsonl", split="", note="", columns={"problem": "question",
    "answer": "answer"}, num_read=31, num_kept=30, dropped={"duplicate": 1}, renamed_ids=0,
    example={"id": "7", "problem": "What is 1 + 1?", "answer": "2"}, fingerprint="5f1c...")
    """

    source: str
    split: str
    note: str
    columns: dict[str, str]
    num_read: int
    num_kept: int
    dropped: dict[str, int]
    renamed_ids: int
    example: dict[str, str]
    fingerprint: str
    """Hash of the kept problems in their order."""

    def __str__(self) -> str:
        head = f"{self.source}: {self.num_kept} problems of {self.num_read} rows"
        lines = [f"{head} ({self.note})" if self.note else head]
        lines += [f"  {field:9s} <- {column}" for field, column in self.columns.items()]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.items()]
        if self.renamed_ids:
            lines.append(f"  {self.renamed_ids} ids were not unique and got a content hash")
        lines += [f"  example {field}: {text}" for field, text in self.example.items()]
        return "\n".join([*lines, f"  fingerprint {self.fingerprint}"])


def load_problems(
    source: str,
    *,
    purpose: Literal["train", "test"] = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> tuple[list[Problem], DataReport]:
    """The problems of a source, in its order.

    source   a path or hub name with an optional @split, see sources.py
    purpose  the split taken when there are several
    columns  {"problem" | "answer" | "reference" | "id": column name}
    limit    the most problems to keep
    Raises ValueError with every fault of the source at once, RuntimeError where a package or
    the network is missing.
    """
    faults = Faults()
    opened = open_source(source, purpose, faults)
    head = list(itertools.islice(opened.rows, _ROWS_FOR_COLUMNS))
    if not head:
        faults.raise_any(source)
        raise ValueError(f"{source} holds no rows")
    mapping = _resolve(source, [row for _, row in head], columns or {})
    collector = _Collector(mapping, faults)
    for row in itertools.chain(head, opened.rows):
        collector.take(row)
    faults.raise_any(source)
    problems = collector.problems(limit)
    if not problems:
        counts = ", ".join(f"{count} {reason}" for reason, count in collector.dropped.items())
        raise ValueError(f"no usable problem is left of {source}; dropped: {counts}")
    report = DataReport(
        source=source,
        split=opened.split,
        note=opened.note,
        columns=_described(mapping),
        num_read=collector.num_read,
        num_kept=len(problems),
        dropped={reason: count for reason, count in collector.dropped.items() if count},
        renamed_ids=collector.renamed_ids,
        example=_abridged(problems[0]),
        fingerprint=fingerprint(problems),
    )
    return problems, report


def fingerprint(problems: Iterable[Problem]) -> str:
    """A hash of everything training reads from the problems, in order; not of where they lay."""
    digest = hashlib.blake2b(digest_size=16)
    for p in problems:
        digest.update(msgspec.json.encode((p.id, p.problem, p.answer, p.reference)) + b"\n")
    return digest.hexdigest()


def overlap(train: Iterable[Problem], test: Iterable[Problem]) -> int:
    """How many test problems occur among the training problems, by `text_key`."""
    seen = {text_key(problem.problem) for problem in train}
    return sum(text_key(problem.problem) in seen for problem in test)


_LOOSE_SPACE = re.compile(r"(?<=\W)\s+|\s+(?=\W)|^\s+|\s+$")


@functools.lru_cache(maxsize=1 << 16)
def text_key(text: str) -> str:
    """The same for problem texts that differ in case, spacing or Unicode form only."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_LOOSE_SPACE.sub("", text).split())


# ---- columns


def _resolve(source: str, rows: list[dict[str, Any]], asked: Mapping[str, str]) -> dict[str, str]:
    """Field -> column. Raises ValueError with the columns seen and the nearest names."""
    columns = _columns(rows)
    for field, column in asked.items():
        if field not in ALIASES:
            raise ValueError(f"columns.{field} is unknown; known: {', '.join(ALIASES)}")
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{source} has no column {column!r} for {field}{hint}\n"
                f"columns seen: {', '.join(columns)}"
            )
    spelt = {column.strip().lower().replace(" ", "_"): column for column in reversed(columns)}
    mapping = {
        field: asked.get(field) or next((spelt[name] for name in names if name in spelt), "")
        for field, names in ALIASES.items()
    }
    if not mapping["answer"]:
        # Many sets keep the answer only inside the solution.
        mapping["answer"] = mapping["reference"]
    lines = [_missing(field, columns) for field in ("problem", "answer") if not mapping[field]]
    if lines:
        seen = f"columns seen: {', '.join(columns) or 'none'}"
        raise ValueError("\n".join([f"{source} cannot be read as problems:", *lines, seen]))
    return {field: column for field, column in mapping.items() if column}


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Columns that hold something, with the fields of nested ones as "column.field"."""
    seen: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            nested = value.items() if isinstance(value, dict) else ()
            names = [f"{name}.{field}" for field, inner in nested if inner is not None]
            if value is not None:
                seen.update(dict.fromkeys([name, *names]))
    return list(seen)


def _missing(field: str, columns: list[str]) -> str:
    lowered = {column.lower(): column for column in columns}
    near = (difflib.get_close_matches(a, lowered, n=1, cutoff=0.7) for a in ALIASES[field])
    nearest = next((lowered[match] for matches in near for match in matches), None)
    hint = f"; nearest is {nearest!r}" if nearest else ""
    known = ", ".join(ALIASES[field])
    return f"  no column for the {field} (known names: {known}){hint}; set columns.{field}"


def _described(mapping: dict[str, str]) -> dict[str, str]:
    described = {"reference": "none", "id": "hash of the problem"} | mapping
    if mapping["answer"] == mapping.get("reference"):
        described["answer"] = f"last \\boxed{{}} of {mapping['answer']}"
    return {field: described[field] for field in ALIASES}


def _abridged(problem: Problem) -> dict[str, str]:
    fields = msgspec.structs.asdict(problem)
    texts = {name: " ".join(text.split()) for name, text in fields.items() if text}
    return {name: t if len(t) <= 100 else t[:97] + "..." for name, t in texts.items()}


# ---- rows


def _value(row: dict[str, Any], column: str | None) -> Any:
    """The content of a column or of a nested field; None where it is missing."""
    if column is None or column in row:
        return row.get(column)
    outer, _, inner = column.partition(".")
    nested = row.get(outer)
    return nested.get(inner) if isinstance(nested, dict) else None


def _text(value: Any) -> str:
    """Text, or a number in its shortest exact form, or "" for nothing. Raises TypeError."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(f"expected text or a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise TypeError(f"expected text or a finite number, got {value}")
    if value == int(value):
        return str(int(value))
    return format(Decimal(str(value)), "f")


def _question(value: Any) -> str:
    """A problem text, or the last user turn of a conversation. Raises TypeError."""
    if not isinstance(value, list):
        return _text(value)
    turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
    if not turns or not isinstance(turns[-1].get("content"), str):
        raise TypeError('expected a list of {"role", "content"} with a user turn of text')
    return turns[-1]["content"].strip()


def _answer(text: str, is_solution: bool) -> tuple[str, str]:
    """The bare answer, and the worked solution that came with it ("" for none)."""
    solution, marker, answer = text.rpartition("####")
    if marker and not is_solution:
        return answer.strip(), solution.strip()
    boxed = last_boxed(text)
    return (boxed or "") if is_solution else (boxed or text), ""


class _Collector:
    """Turns rows into problems, one per distinct text."""

    def __init__(self, mapping: dict[str, str], faults: Faults) -> None:
        self.mapping = mapping
        self.faults = faults
        self.num_read = 0
        self.renamed_ids = 0
        self.dropped: Counter[str] = Counter()
        self._kept: dict[str, Problem] = {}
        """`text_key` -> the first row with it."""
        self._copies: Counter[str] = Counter()
        self._conflicts: set[str] = set()

    def take(self, row: Row) -> None:
        """Read one row: keep it, drop it under a reason, or note a fault."""
        self.num_read += 1
        where, values = row
        fields: dict[str, str | None] = {}
        for field in ALIASES:
            read = _question if field == "problem" else _text
            try:
                fields[field] = read(_value(values, self.mapping.get(field)))
            except (TypeError, ValueError, OverflowError) as error:
                self.faults.add(where, f"column {self.mapping[field]!r} ({field}): {error}")
        if len(fields) < len(ALIASES):
            return
        is_solution = self.mapping["answer"] == self.mapping.get("reference")
        answer, worked = _answer(fields["answer"], is_solution)
        if not fields["problem"]:
            self.dropped["no problem text"] += 1
        elif not answer:
            self.dropped["no answer"] += 1
        elif len(answer) > MAX_CHARS:
            self.dropped[f"answer longer than {MAX_CHARS} characters"] += 1
        else:
            fields |= {"answer": answer, "reference": fields["reference"] or worked or None}
            self._keep(Problem(**fields, source=where))

    def _keep(self, problem: Problem) -> None:
        key = text_key(problem.problem)
        self._copies[key] += 1
        first = self._kept.setdefault(key, problem)
        if compare_quickly(first.answer, problem.answer) is not Reason.CORRECT:
            self._conflicts.add(key)

    def problems(self, limit: int | None) -> list[Problem]:
        """What is kept, with unique ids; completes the counts."""
        for key in self._conflicts:
            self.dropped["same problem with different answers"] += self._copies[key]
        clean = {k: p for k, p in self._kept.items() if k not in self._conflicts}
        self.dropped["duplicate"] += sum(self._copies[key] - 1 for key in clean)
        claims = Counter(problem.id for problem in clean.values())
        named = []
        for key, problem in clean.items():
            if not problem.id or claims[problem.id] > 1:
                content = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
                self.renamed_ids += bool(problem.id)
                name = f"{problem.id}-{content}" if problem.id else content
                problem = msgspec.structs.replace(problem, id=name)
            named.append(problem)
        if limit is not None and len(named) > limit:
            self.dropped[f"above the limit of {limit}"] += len(named) - limit
        return named[:limit]
