"""Columns and cells of problem files: which column holds which field, and what a cell says.

Columns are resolved once per source (see ALIASES, and `columns` to say them yourself): names match
without regard to case, "Short Answer" is short_answer, "a.b" is field b of column a.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from intfast.grading.answers import MAX_CHARS, Reason, compare_quickly, is_marker, last_boxed

_MAX_DIGITS = 1000
"""Digits before or behind the point that a number of a file may have: "1e999999999" has more."""

ALIASES: dict[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "prompt", "messages", "conversations", "conversation"),
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


# ---- columns


def resolve(
    source: str, head: list[dict[str, Any]], asked: Mapping[str, str], is_scored: bool = False
) -> dict[str, str]:
    """Field -> column; that of the answer may be missing where a function scores.

    Raises ValueError with the columns seen and the nearest names.
    """
    columns = _columns(head)
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
    problem = mapping["problem"]
    if not mapping["reference"] and any(is_answered(value(r, problem)) for r in head):
        mapping["reference"] = problem
    if not mapping["answer"] and not is_scored:
        # Many sets keep the answer only inside the solution.
        mapping["answer"] = mapping["reference"]
    needed = ("problem",) if is_scored else ("problem", "answer")
    lines = [_missing(field, columns) for field in needed if not mapping[field]]
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


def not_read(mapping: Mapping[str, str], head: list[dict[str, Any]]) -> dict[str, list[str]]:
    """A note for every column that claims a field which another column fills."""
    notes: dict[str, list[str]] = {}
    column = mapping["problem"]
    if column != mapping.get("reference") and any(is_answered(value(r, column)) for r in head):
        notes[f"the assistant's turns at the end of {column!r} are not read"] = []
    return notes | {
        f"column {column!r} is not read: the {field} is taken from {mapping[field]!r}": []
        for field in ("problem", "answer", "reference")
        for column in _columns(head)
        if column.strip().lower().replace(" ", "_") in ALIASES[field]
        and field in mapping
        and column not in mapping.values()
    }


# ---- cells


def value(row: dict[str, Any], column: str | None) -> Any:
    """The content of a column or of a nested field; None where it is missing."""
    if column is None or column in row:
        return row.get(column)
    outer, _, inner = column.partition(".")
    nested = row.get(outer)
    return nested.get(inner) if isinstance(nested, dict) else None


def text(value: Any) -> str:
    """Text, or a number in its shortest exact form, or "" for nothing. Raises TypeError."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(f"expected text or a number, got {type(value).__name__}")
    # Of a float its shortest text, which is the one that somebody wrote.
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite() or abs(number.adjusted()) > _MAX_DIGITS:
        raise TypeError(f"expected text or a number of at most {_MAX_DIGITS} digits, got {value}")
    digits = format(number, "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
"""Other names of the roles."""


def _role(turn: Any) -> str | None:
    """Who speaks in a turn, as {"role", "content"} or {"from", "value"}."""
    role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return _ROLES.get(role, role) if isinstance(role, str) else None


def _turns(value: list[Any]) -> list[tuple[str, str]]:
    """(role, text) of the turns of a conversation that say something. Raises TypeError."""
    turns = []
    for turn in value:
        role = _role(turn)
        content = turn.get("content", turn.get("value")) if role else None
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(texts) if all(isinstance(t, str) for t in texts) else None
        if not isinstance(content, str):
            raise TypeError('expected a list of {"role", "content"} with texts')
        if content.strip():
            turns.append((role, content.strip()))
    if not any(role == "user" for role, _ in turns):
        raise TypeError('expected a list of {"role", "content"} with a user turn of text')
    return turns


def question(value: Any) -> str:
    """A problem text, or of a conversation the system's and the user's turns. Raises TypeError."""
    if isinstance(value, list):
        # What the system says is part of the question ("answer in base 7"), wherever it is shown.
        return "\n\n".join(said for role, said in _turns(value) if role in ("system", "user"))
    if isinstance(value, bool | int | float | Decimal) and value == value:
        raise TypeError(f"expected text, got the number {value}")
    return text(value)


def is_answered(value: Any) -> bool:
    """Whether a cell is a conversation that ends in an assistant's turn."""
    return isinstance(value, list) and bool(value) and _role(value[-1]) == "assistant"


def solution(value: Any) -> str:
    """A reference, or of a conversation the assistant's turn at its end; "" where there is none."""
    if not isinstance(value, list):
        return text(value)
    turns = _turns(value)
    return turns[-1][1] if turns[-1][0] == "assistant" else ""


def lost_turns(value: Any) -> str:
    """Why a conversation cannot be kept whole as one question, "" where it can."""
    if not isinstance(value, list):
        return ""
    roles = [role for role, _ in _turns(value)]
    if [role for role in roles if role != "system"] in (["user"], ["user", "assistant"]):
        return ""
    return "a conversation that is more than one question and its answer"


def has_system(value: Any) -> bool:
    """Whether a cell is a conversation in which the system speaks."""
    return isinstance(value, list) and any(role == "system" for role, _ in _turns(value))


READ = {"problem": question, "reference": solution}
"""How the cell of a field is read, where not by `text`."""
MARK = "####"
_SAYS = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?(?:answer|solution|result)"
    r"\s*(?:is\b|:|=)\s*:?|####",
    re.IGNORECASE,
)
_DRESS = re.compile(r"\\(?:boxed|f(?:rame)?box)(?![A-Za-z])|[{}$\s]|\.$")


def is_no_solution(solution: str, answer: str) -> bool:
    """Whether a worked solution is a marker, or says the answer and nothing else."""
    if len(solution) > 2 * MAX_CHARS:
        return False
    if is_marker(solution):
        return True
    said = _SAYS.sub("", solution, count=1).strip() if _SAYS.match(solution) else solution
    plain = _DRESS.sub("", said)
    if plain == _DRESS.sub("", answer):
        return True
    return any(compare_quickly(answer, given) is Reason.CORRECT for given in (said, plain))


def answer(text: str, is_solution: bool) -> tuple[str, str, str]:
    """The bare answer, the worked solution that came with it ("" for none), and how it was found:
    behind a "mark", in a "box", or as the "whole" text."""
    worked, mark, behind = text.rpartition(MARK)
    boxed = last_boxed(text)
    # A heading of Markdown has the same sign, and lines behind it.
    if mark and "\n" not in behind.strip() and not (is_solution and boxed):
        return behind.strip(), worked.strip(), "mark"
    if boxed or is_solution:
        return boxed or "", text, "box"
    return text, "", "whole"
