"""Stored rows graded again: what the grader of today says of the records of a run."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from intfast import cli, ranks
from intfast.config import GradeConfig
from intfast.grading.function import check_named, grader_of
from intfast.grading.grader import Grader, Submission
from intfast.prompts import split_steps
from intfast.records import Attempt, Intervention, Problem
from intfast.safe_text import shown
from intfast.state.command import outcome
from intfast.study import read
from intfast.study.read import MAX_SHOWN, read_problems


class Row(msgspec.Struct):
    """What is read of a stored row; it may have any other field."""

    text: str
    answer: str | None = None
    problem_id: str = ""
    intervention_id: str = ""
    start: str = ""
    finish_reason: str = "stop"
    grade: str = ""
    reason: str = ""


def report(path: Path, grader: Grader, problems: Path | None = None) -> str:
    """Counts per reason of the rows of a JSONL file, and the rows whose verdict changed.

    A row has `text` and either `answer` or the `problem_id` of a problem in `problems`
    (default: problems.jsonl beside the file). The rows of continuations.jsonl are read behind the
    partial answer that they continue, as the run did.
    Raises ValueError for rows that cannot be read or belong to no problem.
    """
    if path.name == "interventions.jsonl":
        raise ValueError(
            f"{path} holds no answers; expected attempts.jsonl, continuations.jsonl, or rows with "
            "`text` and `answer`"
        )
    rows: Sequence[Row] = read.rows(path, Row, finished=True)
    golds = _golds(path, rows, problems)
    begun = _begun(path) if any(row.intervention_id for row in rows) else {}
    grades = grader.grade_many(
        Submission(
            golds[row.problem_id].answer if row.answer is None else row.answer,
            begun.get((row.intervention_id, row.start), "") + row.text,
            row.finish_reason,
            golds[row.problem_id].row if row.answer is None else UNSET,
        )
        for row in rows
    )
    counts = Counter(grade.reason.value for grade in grades)
    lines = [f"{len(rows)} rows", *(f"{n:8d}  {reason}" for reason, n in counts.most_common())]
    changed = [
        f"{path}:{number}: was {row.grade} ({row.reason or 'no reason stored'}), "
        f"is {grade.status} ({grade.reason})"
        for number, (row, grade) in enumerate(zip(rows, grades, strict=True), 1)
        if row.grade and row.grade != grade.status
    ]
    lines.append(f"{len(changed)} rows with another verdict than the stored one")
    more = len(changed) - MAX_SHOWN
    return "\n".join(lines + changed[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else []))


def _golds(path: Path, rows: Sequence[Row], named: Path | None) -> dict[str, Problem]:
    wanted = {row.problem_id for row in rows if row.answer is None}
    if not wanted:
        return {}
    problems = named or path.with_name("problems.jsonl")
    if named is None and not problems.is_file():
        raise ValueError(f"{path} has rows without `answer`; name its problems: --problems")
    golds = read_problems(problems, True)
    if missing := wanted - golds.keys():
        raise ValueError(f"{problems} lacks problem {min(missing)!r} ({len(missing)} in all)")
    return golds


def _begun(path: Path) -> Mapping[tuple[str, str], str]:
    """(intervention id, start) -> the text of the partial answer that was continued."""
    names = ("config.toml", "attempts.jsonl", "interventions.jsonl")
    config, attempts, interventions = (path.with_name(name) for name in names)
    if missing := [str(f) for f in (config, attempts, interventions) if not f.is_file()]:
        raise ValueError(f"{path}: where its rows begin is in {', '.join(missing)}; not found")
    prompt = cli.load(config).prompt
    # The words of the compact style are tokens; texts of tokens are joined by a space.
    between = " " if prompt.style == "compact" else ""
    drawn = read.rows(attempts, Attempt, finished=True)
    places = {(a.problem_id, a.sample): place for place, a in enumerate(drawn)}
    begun = {}
    for record in read.rows(interventions, Intervention, finished=True):
        if not record.location:
            continue
        attempt = (record.problem_id, record.attempt)
        if attempt not in places:
            raise ValueError(f"{attempts} lacks attempt {attempt}, which {interventions} names")
        steps = split_steps(drawn[places[attempt]].text, prompt.separator)
        before = "".join(steps[: record.location - 1])
        begun[record.id, "prefix"] = before + between
        begun[record.id, "error"] = "".join(steps[: record.location]) + between
        begun[record.id, "intervention"] = before + record.content + between
    return begun


def main(arguments: Sequence[str]) -> int:
    """Grade the stored rows of a file again (attempts.jsonl, continuations.jsonl, or your own with
    `text` and `answer`); prints counts per reason and the verdicts that changed."""
    parser = argparse.ArgumentParser(
        prog="python -m intfast.study regrade", description=main.__doc__
    )
    parser.add_argument("file", type=cli.expanded)
    parser.add_argument("--problems", type=cli.expanded, help="default: problems.jsonl beside FILE")
    parser.add_argument("--function", default="", help="the scoring function, as grade.function")
    parser.add_argument("--mode", help='default: as in config.toml beside FILE, else "boxed"')
    parser.add_argument("--workers", default="2")
    parser.add_argument("--timeout-s", default="5.0")
    with outcome("nothing was graded") as ended:
        ranks.require_one()
        options = parser.parse_args(arguments)
        config = options.file.with_name("config.toml")
        own = cli.load(config).grade if config.is_file() else GradeConfig()
        mode = options.mode or own.mode
        # Under the rules of the settings that they stand for.
        words = [f"workers={options.workers}", f"timeout_s={options.timeout_s}", f"mode={mode}"]
        check_named(config, own.function, options.function, "--function ")
        words.append(f"function={options.function}")
        grade = cli.load(None, ["data.train=unread", *(f"grade.{word}" for word in words)]).grade
        kept = {name: getattr(own, name) for name in ("digits", "correct_at", "range")}
        with grader_of(replace(grade, **kept)) as grader:
            print(shown(report(options.file, grader, options.problems)))
    return ended.code
