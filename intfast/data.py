"""Problem files of any usual cells -> Problems, and a report of what was taken from where.

Rows dropped, each kind counted in the report and its rows named: no problem text; no answer, or a
word that stands for one ("proof"); no #### where the others have it; an answer longer than the
grader reads; a conversation of which turns would be lost; duplicates (of each problem the first row
is kept); every row of a problem that occurs with different answers, since nothing says which is
right; and rows above a limit. A reference that is no more than the answer is none, and noted.

Nothing that differs as mathematics is taken for the same: no letter case, superscript or space
between numbers is folded away, and no number is rounded.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

from intfast import cells
from intfast.grading.answers import MATHEMATICS, MAX_CHARS, Reason, compare_quickly, is_marker
from intfast.records import Problem, Record
from intfast.sources import Faults, Row, named, open_source

_ROWS_FOR_COLUMNS = 1000
_NO_SOLUTION = "reference that holds no solution (the answer alone, a word for none), left out"


class DataReport(Record):
    """What a source gave. `str(report)` is for the console.

    Example: DataReport(source="aime.jsonl", split="", note="", columns={"problem": "question",
    "answer": "answer"}, num_read=31, num_kept=30, dropped={"duplicate": 1},
    dropped_rows={"duplicate": ["aime.jsonl:9 (as aime.jsonl:2)"]}, notes={}, renamed_ids=0,
    example={"id": "7", "problem": "What is 1 + 1?", "answer": "2"}, fingerprint="5f1c...")
    """

    source: str
    split: str
    note: str
    columns: dict[str, str]
    num_read: int
    num_kept: int
    dropped: dict[str, int]
    dropped_rows: dict[str, list[str]]
    """Reason -> the rows, each with what a person needs to decide."""
    notes: dict[str, list[str]]
    """What was not taken of rows that are kept -> the rows; of whole columns, no rows."""
    renamed_ids: int
    example: dict[str, str]
    fingerprint: str
    """Hash of the kept problems in their order."""

    def __str__(self) -> str:
        head = f"{self.source}: {self.num_kept} problems of {self.num_read} rows"
        lines = [f"{head} ({self.note})" if self.note else head]
        lines += [f"  {field:9s} <- {column}" for field, column in self.columns.items()]
        lines += _dropped_lines(self.dropped_rows)
        for note, rows in self.notes.items():
            lines.append(
                f"  noted {len(rows)}: {note}: {named(rows)}" if rows else f"  note: {note}"
            )
        if self.renamed_ids:
            lines.append(f"  {self.renamed_ids} ids were not unique and got a content hash")
        lines += [f"  example {field}: {text}" for field, text in self.example.items()]
        return "\n".join([*lines, f"  fingerprint {self.fingerprint}"])


def _dropped_lines(dropped: Mapping[str, list[str]]) -> list[str]:
    return [f"  dropped {len(rows)}: {reason}: {named(rows)}" for reason, rows in dropped.items()]


def load_problems(
    source: str,
    *,
    purpose: Literal["train", "test"] = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    mode: str = "boxed",
    keeps_rows: bool = False,
) -> tuple[list[Problem], DataReport]:
    """The problems of a source, in its order.

    source   a path or hub name with an optional @split, see sources.py
    purpose  the split taken when there are several
    columns  {"problem" | "answer" | "reference" | "id": column name}
    limit    the most problems to keep
    mode     how answers are graded, see grading.answers.extract
    keeps_rows  whether a function grades: it reads the row, and needs no answer
    Raises ValueError with every fault of the source at once, RuntimeError where a package or
    the network is missing.
    """
    faults = Faults()
    opened = open_source(source, purpose, faults)
    head = list(itertools.islice(opened.rows, _ROWS_FOR_COLUMNS))
    if not head:
        faults.raise_any(source)
        raise ValueError(f"{source} holds no rows")
    try:
        mapping = cells.resolve(source, [row for _, row in head], columns or {}, keeps_rows)
    except ValueError as error:
        # What is wrong with single rows is told with it.
        deque(opened.rows, maxlen=0)
        raise ValueError("\n".join([str(error), *faults.lines(source)])) from error
    collector = _Collector(mapping, faults, mode, keeps_rows)
    for row in itertools.chain(head, opened.rows):
        collector.take(row)
    problems = collector.problems(limit)
    lines = _dropped_lines(collector.dropped)
    faults.raise_any(source, lines)
    if not problems:
        raise ValueError("\n".join([f"no usable problem is left of {source}", *lines]))
    report = DataReport(
        source=source,
        split=opened.split,
        note=opened.note,
        columns=collector.described(),
        num_read=collector.num_read,
        num_kept=len(problems),
        dropped={reason: len(rows) for reason, rows in collector.dropped.items()},
        dropped_rows=dict(collector.dropped),
        notes=cells.not_read(mapping, [row for _, row in head]) | collector.notes,
        renamed_ids=collector.renamed_ids,
        example=_abridged(problems[0]),
        fingerprint=fingerprint(problems),
    )
    return problems, report


def with_unique_ids(problems: Iterable[Problem], taken: Collection[str] = ()) -> list[Problem]:
    """The problems with ids that no other of them has, nor is in `taken`.

    An id that is free stays. One that is missing, claimed twice or taken gets the hash of the
    problem's text, which does not depend on the order of the rows. The texts must differ.
    """
    problems = list(problems)
    claims = Counter(problem.id for problem in problems)
    free = {name for name, count in claims.items() if name and count == 1 and name not in taken}
    used = free.union(taken)
    made = []
    for problem in problems:
        if problem.id not in free:
            key = text_key(problem.problem).encode()
            content = hashlib.blake2b(key, digest_size=8).hexdigest()
            name = f"{problem.id}-{content}" if problem.id else content
            # A row may have the very name as its own id.
            while name in used:
                name += f"-{content}"
            used.add(name)
            problem = msgspec.structs.replace(problem, id=name)
        made.append(problem)
    return made


def fingerprint(problems: Iterable[Problem]) -> str:
    """A hash of everything training reads from the problems, in order; not of where they lay."""
    digest = hashlib.blake2b(digest_size=16)
    for p in problems:
        read = (p.id, p.problem, p.answer, p.reference, *([p.row] if p.row else []))
        digest.update(msgspec.json.encode(read) + b"\n")
    return digest.hexdigest()


def overlap(
    train: Iterable[Problem], test: Iterable[Problem]
) -> tuple[list[tuple[Problem, Problem]], list[tuple[Problem, Problem]]]:
    """The (test, training) problems that are the same by `text_key`, and those that merely look so.

    The latter have equal answers and texts that differ in letter case, spaces or Unicode forms
    alone: copies for the most part, but "3 Mg" and "3 mg" are two problems.
    """
    train = list(train)
    same = {text_key(problem.problem): problem for problem in reversed(train)}
    like = {(_loose(p.problem), p.answer): p for p in reversed(train)}
    equal, alike = [], []
    for p in test:
        if found := same.get(text_key(p.problem)):
            equal.append((p, found))
        elif found := like.get((_loose(p.problem), p.answer)):
            alike.append((p, found))
    return equal, alike


# Not zero-width joiners, nor the invisible operators: those mean something.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))


@functools.lru_cache(maxsize=1 << 16)
def text_key(text: str) -> str:
    """The same for problem texts that show the same: but for how much white space separates words,
    the Unicode composition of letters, and characters without width.

    Not NFKC, which makes 2² 22; not case, which tells Mg from mg; no space taken away, since
    "1, 234" is two numbers.
    """
    return " ".join(unicodedata.normalize("NFC", text.translate(_UNSEEN)).split())


def _loose(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _abridged(problem: Problem) -> dict[str, str]:
    fields = msgspec.structs.asdict(problem) | {"row": ""}
    texts = {name: " ".join(text.split()) for name, text in fields.items() if text}
    return {name: t if len(t) <= 100 else t[:97] + "..." for name, t in texts.items()}


def _plain(value: Any) -> Any:
    """A cell that JSON does not know, as what it is for a function: a number, else a text."""
    if isinstance(value, Decimal):
        return float(value)
    return value.item() if hasattr(value, "item") else str(value)


class _Collector:
    """Turns rows into problems, one per distinct text."""

    def __init__(
        self, mapping: dict[str, str], faults: Faults, mode: str, keeps_rows: bool = False
    ) -> None:
        self.mapping = mapping
        self.faults = faults
        self.is_mathematics = mode in MATHEMATICS and not keeps_rows
        self.keeps_rows = keeps_rows
        self.num_read = 0
        self.renamed_ids = 0
        self.dropped: dict[str, list[str]] = defaultdict(list)
        """Reason -> the rows that were dropped, in words."""
        self.notes: dict[str, list[str]] = defaultdict(list)
        self._kept: dict[str, list[Problem]] = defaultdict(list)
        """`text_key` -> the rows with it."""
        self._found: dict[str, list[str]] = defaultdict(list)
        """How the answer was found in its text, see cells.answer -> the rows."""
        self._has_worked = False

    def take(self, row: Row) -> None:
        """Read one row: keep it, drop it under a reason, or note a fault."""
        self.num_read += 1
        where, values = row
        is_solution = self.mapping.get("answer", "") == self.mapping.get("reference")
        # The answer may be in the same cell as the solution, which may be a conversation.
        read = cells.READ | ({"answer": cells.solution} if is_solution else {})
        fields: dict[str, str | None] = {}
        for field in cells.ALIASES:
            try:
                value = cells.value(values, self.mapping.get(field))
                fields[field] = read.get(field, cells.text)(value)
            except (TypeError, ValueError, ArithmeticError) as error:
                self.faults.add(where, f"column {self.mapping[field]!r} ({field}): {error}")
        if len(fields) < len(cells.ALIASES):
            return
        value = cells.value(values, self.mapping["problem"])
        answer, worked, how = cells.answer(fields["answer"], is_solution)
        if reason := cells.lost_turns(value) or self._no_problem(fields["problem"], answer):
            self.dropped[reason].append(where)
            return
        self._found[how].append(where)
        if cells.has_system(value):
            self.notes["system turn, now the beginning of the problem's text"].append(where)
        given = fields["reference"]
        if self.is_mathematics and given and cells.is_no_solution(given, answer):
            self.notes[_NO_SOLUTION].append(where)
            given = ""
        if not given and worked and not cells.is_no_solution(worked, answer):
            given, self._has_worked = worked, True
        problem = fields | {"answer": answer, "reference": given or None, "source": where}
        if self.keeps_rows:
            problem["row"] = json.dumps(values, default=_plain)
        self._kept[text_key(fields["problem"])].append(Problem(**problem))

    def _no_problem(self, text: str, answer: str) -> str:
        """Why a row is no problem, "" where it is."""
        if not text:
            return "no problem text"
        if self.keeps_rows:
            return ""
        if not answer:
            return "no answer"
        if self.is_mathematics and is_marker(answer):
            return "no answer but a word for none"
        return f"answer longer than {MAX_CHARS} characters" if len(answer) > MAX_CHARS else ""

    def _same(self, gold: str, answer: str) -> bool:
        if not self.is_mathematics:
            return gold.split() == answer.split()
        return compare_quickly(gold, answer) is Reason.CORRECT

    def problems(self, limit: int | None) -> list[Problem]:
        """What is kept, with unique ids; completes the counts."""
        clean = []
        # Where some answers stand behind a mark, a text without one is no answer, taken whole.
        unmarked = set(self._found["whole"]) if self._found["mark"] else set()
        for rows in self._kept.values():
            for problem in rows:
                if problem.source in unmarked:
                    reason = f"no {cells.MARK} and no box, where others have"
                    self.dropped[reason].append(problem.source)
            rows = [problem for problem in rows if problem.source not in unmarked]
            if not all(self._same(rows[0].answer, problem.answer) for problem in rows):
                told = [f"{problem.source} ({problem.answer[:40]!r})" for problem in rows]
                self.dropped["same problem with different answers"] += told
                continue
            for problem in rows[1:]:
                self.dropped["duplicate"].append(f"{problem.source} (as {rows[0].source})")
            clean += rows[:1]
        unique = with_unique_ids(clean)
        self.renamed_ids = sum(
            bool(a.id) and a.id != b.id for a, b in zip(clean, unique, strict=True)
        )
        for problem in unique[limit:] if limit is not None else ():
            self.dropped[f"above the limit of {limit}"].append(problem.source)
        return unique[:limit]

    def described(self) -> dict[str, str]:
        """Field -> where it was taken from, in words."""
        words = {"reference": "none", "id": "hash of the problem"} | self.mapping
        answer, reference = words.setdefault("answer", "none"), self.mapping.get("reference")
        if answer == reference:
            words["answer"] = f"last \\boxed{{}} of {answer}"
            words["answer"] += f", else behind {cells.MARK}" if self._found["mark"] else ""
        elif self._found["mark"]:
            words["answer"] = f"behind {cells.MARK} in {answer}"
        if self._has_worked:
            own = f"{reference}, else " if reference else ""
            words["reference"] = f"{own}the worked solutions in {answer}"
        return {field: words[field] for field in cells.ALIASES}
