"""The shape of the code in numbers: what tests/test_layout.py holds, and what it aims at.

Frames are counted by tests/test_frames.py.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from intfast import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "intfast"
CORE = {
    "pipeline.py": "the stages of a run, in plain sight",
    "run.py": "the open run: model, engine, grader, records, held weights",
    "config.py": "every setting with its help text",
    "records.py": "Problem, Attempt, Intervention, Example; the legend of shapes",
    "prompts.py": "what the model is asked, and how a text is cut into steps",
    "verdict.py": "the reply of a verification, read as hostile input",
    "sample.py": "problems or partial answers in, graded completions out",
    "collect.py": "attempts, interventions, continuations, evaluations: draw what is missing",
    "intervene.py": "verify, intervene, gates, continue, keep",
    "leak.py": "does a step give the answer away",
    "waves.py": "which continuations to draw next",
    "sft.py": "the SFT stage",
    "rl.py": "the RL stage: the step as one straight piece",
    "update.py": "one optimizer step, and a stage that can stop and go on",
    "credit.py": "rewards of a group -> advantages -> weighted tokens",
    "batch.py": "Examples -> packed batches; where tokens are shifted by one",
    "loss.py": "SFT and policy losses on the ops of kernels/",
    "evaluate.py": "accuracy, pass@k, coverage, intervals",
    "model/decoder.py": "the dense families of model/families.py: packed or cached",
}
"""The files to read, in this order, and what each is for."""
FLOORS = [
    "adapters",
    "labels ranks records safe_text sources tokens words",
    "config",
    "checks evaluate verdict waves",
    "cli template",
    "kernels prompts state",
    "grading model",
    "cells",
    "data engine leak",
    "batch credit sample",
    "intake intervene loss",
    "run",
    "update",
    "parity",
    "collect sft",
    "methods",
    "plan rl",
    "pipeline",
    "study",
    "train compare report",
]
"""From the ground up: a file or package of intfast/ imports from lower floors, or its own."""
FLOOR = {name: rank for rank, names in enumerate(FLOORS) for name in names.split()}


class File(NamedTuple):
    """What is counted of one Python file."""

    lines: int
    comments: int
    raising: int
    """Lines inside raise statements."""


def measured(path: Path) -> File:
    """The counts of a file."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    raising = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Raise)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return File(len(text.splitlines()), len(comments), len(raising))


def imported(path: Path) -> set[str]:
    """The dotted names below `intfast` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module.split(".")
            if module[0] == "intfast":
                found |= {".".join([*module[1:], alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name[8:] for a in node.names if a.name.startswith("intfast.")}
    return found - {"__version__"}


def crossings() -> Iterator[tuple[str, str]]:
    """(file, imported name) of every import between the rooms of intfast/."""
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in sorted(imported(path)) if own != "__init__" else ():
            if name.partition(".")[0] != own:
                yield path.relative_to(PACKAGE).as_posix(), name


def upward() -> list[tuple[str, str]]:
    """The imports that do not point to a lower floor; circles between rooms are among them."""
    return [
        (file, name)
        for file, name in crossings()
        if FLOOR[name.partition(".")[0]] >= FLOOR[file.removesuffix(".py").partition("/")[0]]
    ]


def core_table() -> list[str]:
    """The rows of the README's table of the core."""
    return [
        f"| [`{name}`](intfast/{name}) | {measured(PACKAGE / name).lines} | {what} |"
        for name, what in CORE.items()
    ]


def main() -> None:
    """Print the numbers: python -m benchmarks house."""
    core = {name: measured(PACKAGE / name) for name in CORE}
    files = {path: measured(path) for path in PACKAGE.rglob("*.py")}
    page = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (PACKAGE / "study/page").rglob("*")
        if path.is_file()
    )
    lines, comments, raising = (sum(column) for column in zip(*core.values(), strict=True))
    largest = max(files, key=lambda path: files[path].lines)
    print(*core_table(), sep="\n")
    print(f"{lines:7}  lines of the core in {len(core)} files (aim: 4,130 in 19)")
    print(f"{comments / lines:7.1%}  of them with a comment (6 %); inside raise: {raising}")
    print(f"{sum(found.lines for found in files.values()):7}  lines of intfast/ (13,000)")
    print(f"{page:7}  lines of the page (750)")
    print(f"{files[largest].lines:7}  lines of the largest file, {largest.relative_to(ROOT)} (400)")
    print(f"{len(list(cli.settings())):7}  settings (115)")
    print(f"{len(list(crossings())):7}  imports between rooms, {len(upward())} upward (0)")


if __name__ == "__main__":
    main()
