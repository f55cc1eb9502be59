"""Arithmetic word problems of a few steps, with references step by step, for a small real model.

    python -m benchmarks.word_problems FOLDER

writes train.jsonl and test.jsonl, which share no problem. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

NAMES = (
    "Anna", "Ben", "Clara", "David", "Ella", "Finn", "Grace", "Hugo",
    "Ida", "Jack", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul",
)  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps")
# The event, with a number and another name, and what it does to the count.
EVENTS = (
    ("{who} buys {n} more {things}.", "+"),
    ("{other} gives {who} {n} {things}.", "+"),
    ("{who} finds {n} {things}.", "+"),
    ("{who} gives {n} {things} to {other}.", "-"),
    ("{who} loses {n} {things}.", "-"),
    ("{who} sells {n} {things}.", "-"),
)


class WordProblem(NamedTuple):
    """A row of a problem file."""

    problem: str
    answer: str
    reference_solution: str


def make(rnd: random.Random, steps: int) -> WordProblem:
    """A problem of so many events; the count stays above zero.

    Example: "Mia has 7 shells. Mia loses 3 shells. How many shells does Mia have now?"
    """
    who, other = rnd.sample(NAMES, 2)
    things = rnd.choice(THINGS)
    count = rnd.randint(4, 12)
    told = [f"{who} has {count} {things}."]
    solved = [f"{who} starts with {count} {things}."]
    for template, sign in rnd.sample(EVENTS, steps):
        num = rnd.randint(2, 9) if sign == "+" else rnd.randint(1, count - 1)
        after = count + num if sign == "+" else count - num
        event = template.format(who=who, other=other, n=num, things=things)
        told.append(event)
        solved.append(f"{event} Now {who} has {count} {sign} {num} = {after} {things}.")
        count = after
        if count < 2:
            break
    told.append(f"How many {things} does {who} have now?")
    solved.append(f"The answer is \\boxed{{{count}}}.")
    return WordProblem(" ".join(told), str(count), "\n\n".join(solved))


def make_all(num: int, steps: int, seed: int) -> list[WordProblem]:
    """`num` different problems of up to `steps` events."""
    rnd = random.Random(seed)
    found: dict[str, WordProblem] = {}
    while len(found) < num:
        problem = make(rnd, rnd.randint(1, steps))
        found[problem.problem] = problem
    return list(found.values())


def main() -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.word_problems", description=__doc__, formatter_class=raw
    )
    parser.add_argument("folder", type=Path, help="where the two files go")
    parser.add_argument("--train", type=int, default=24, help="problems (%(default)s)")
    parser.add_argument("--test", type=int, default=24, help="problems (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, choices=range(1, len(EVENTS) + 1))
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    problems = make_all(args.train + args.test, args.steps, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": problems[: args.train], "test": problems[args.train :]}
    for name, rows in parts.items():
        text = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
        (args.folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
