"""Reading run folders, also while a run writes to them; nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from intfast.evaluate import Estimate, Evaluation
from intfast.records import Problem, Record
from intfast.state.files import read_json
from intfast.state.journal import Rows


class TokenLogprobs(Record):
    """One SFT example before and after SFT, for reports; all lists are as long as its tokens.

    Log-probs are natural, and None where a token carries no loss.
    Example: TokenLogprobs(example=0, pieces=["a", " b"], weights=[0, 1], base=[None, -2.5],
    trained=[None, -0.5])
    """

    example: int
    """The line of examples.jsonl, counted from 0."""
    pieces: list[str]
    """The text of each token; a character of several tokens is with its last one."""
    weights: list[float]
    base: list[float | None]
    trained: list[float | None]


MAX_SHOWN = 20
"""Faulty lines that an error lists."""


def rows(path: Path, kind: type = dict, finished: bool = False) -> Rows[Any]:
    """The records of a JSONL file, read as they are asked for; none where it does not exist.

    A last line without its end is left out: a run may be writing it. `finished` says that nobody
    writes: then every line counts, and the file must exist.
    Raises ValueError with every line that is no `kind`.
    """
    try:
        found: Rows[Any] = Rows(path, kind, finished)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if faults := [f"{path}:{n}: no {kind.__name__} record ({error})" for n, error in found.faults]:
        more = [f"and {len(faults) - MAX_SHOWN} more"] if len(faults) > MAX_SHOWN else []
        raise ValueError("\n".join([*faults[:MAX_SHOWN], *more]))
    return found


def read_rows(path: Path, kind: type = dict, finished: bool = False) -> list[Any]:
    """All that `rows` gives, in memory: for files that are small."""
    return list(rows(path, kind, finished))


def read_problems(path: Path, finished: bool = False) -> dict[str, Problem]:
    """The problems of a JSONL file by id, read as `rows` does.

    Raises ValueError where an id names two problems, so that no row is shown or graded with
    another problem's text or answer.
    """
    found: dict[str, Problem] = {}
    for number, problem in enumerate(rows(path, Problem, finished), 1):
        if found.setdefault(problem.id, problem) != problem:
            raise ValueError(
                f"{path}:{number}: id {problem.id!r} names another problem further up; expected "
                "ids that are unique (runs of before 2026-12 may lack them: their evaluations "
                "asked test problems by the texts of training problems)"
            )
    return found


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """The evaluations of a run so far, by key."""
    return read_json(folder / "evaluations.json", dict[str, Evaluation]) or {}


def read_figures(path: Path) -> Any:
    """As `read_json`, with the estimates in it as Estimates."""
    return _estimates(read_json(path))


def _estimates(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == set(Estimate.__struct_fields__):
        return msgspec.convert(value, Estimate)
    return {key: _estimates(inner) for key, inner in value.items()}
