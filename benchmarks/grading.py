"""The grader on pairs of our own making: false accepts and rejects, against math-verify alone.

grading_pairs.py computes each pair's verdict with integers and fractions; the held-back set has
other templates and another seed. Math-verify gets the whole completion, with its defaults.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import grading_pairs
from benchmarks.grading_pairs import Pair
from benchmarks.harness import RESULTS
from intfast.grading.grader import Grader
from intfast.study.read import read_rows

NAME = "grading"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many pairs, and which."""
    parser.add_argument("--pairs", type=int, default=55, help="a class (%(default)s)")
    parser.add_argument("--held", action="store_true", help="the held-back templates too")
    parser.add_argument(
        "--show", action="store_true", help="print every pair that is graded wrongly"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a set."""
    rows = []
    for held in (False, True) if args.held else (False,):
        pairs = grading_pairs.made(args.seed + held, args.pairs, held)
        graded = {"intfast": ours(pairs), "math-verify": math_verify(pairs)}
        rows.append({"setting": {"held": held}, "figures": figures(pairs, graded)})
        print(table([rows[-1]["figures"]]))
        for pair, verdict in zip(pairs, graded["intfast"], strict=True) if args.show else ():
            if (verdict == "correct") != pair.is_right:
                print(verdict, *pair)
    return rows


def ours(pairs: Sequence[Pair]) -> list[str]:
    """The reasons of this product's grades."""
    with Grader(workers=1, timeout_s=20) as grader:
        return [g.reason.value for g in grader.grade_many([(p.gold, p.text) for p in pairs])]


def math_verify(pairs: Sequence[Pair]) -> list[str]:
    """The verdicts of math-verify with its defaults."""
    from math_verify import parse, verify

    return ["correct" if verify(parse(f"${p.gold}$"), parse(p.text)) else "wrong" for p in pairs]


def figures(pairs: Sequence[Pair], graded: dict[str, list[str]]) -> dict[str, Any]:
    """Counts by class and grader: [right pairs, refused, wrong pairs, accepted]."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, verdicts in graded.items():
        for pair, verdict in zip(pairs, verdicts, strict=True):
            counts = found.setdefault(pair.category, {}).setdefault(name, [0, 0, 0, 0])
            at = 0 if pair.is_right else 2
            counts[at] += 1
            counts[at + 1] += (verdict == "correct") != pair.is_right
    reasons = Counter(v for p, v in zip(pairs, graded["intfast"], strict=True) if not p.is_right)
    return {"pairs": len(pairs), "classes": found, "reasons_of_wrong": dict(reasons.most_common())}


def table(sets: Sequence[dict[str, Any]]) -> str:
    """The table of the README: a class a line, "first set / held-back set" in a cell."""
    lines = [
        "| class | right | refused | math-verify | wrong | accepted | math-verify |",
        "| --- | " + " | ".join(["---:"] * 6) + " |",
    ]
    rows = [(name, [found["classes"][name] for found in sets]) for name in sets[0]["classes"]]
    everything = [
        {who: [sum(c) for c in zip(*(by[who] for by in found["classes"].values()), strict=True)]
         for who in ("intfast", "math-verify")}
        for found in sets
    ]  # fmt: skip
    for name, by in [*rows, ("**all**", everything)]:
        columns = []
        for found in by:
            ours, plain = found["intfast"], found["math-verify"]
            columns.append((ours[0], ours[1], plain[1], ours[2], ours[3], plain[3]))
        cells = [" / ".join(map(str, column)) for column in zip(*columns, strict=True)]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stored(folder: Path = RESULTS) -> str:
    """The table of the last rows of both sets in cpu.jsonl."""
    rows = [row for row in read_rows(folder / "cpu.jsonl") if row["benchmark"] == NAME]
    last = {row["setting"]["held"]: row["figures"] for row in rows}
    return table([last[False], last[True]])
