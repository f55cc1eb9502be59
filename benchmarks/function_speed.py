"""Completions a second of a trivial scoring function; the built-in grader against another checkout.

CPU seconds are of this process and its workers, which other load does not stretch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from intfast.config import GradeConfig
from intfast.grading.function import FunctionGrader
from intfast.grading.grader import Submission

NAME = "function"
SOURCE = """
def score(problem, completion): return float(completion.endswith(problem["answer"]))
def scores(problems, completions): return [score(p, c) for p, c in zip(problems, completions)]
"""
BUILT_IN = """
import resource, sys
from benchmarks import grading_pairs
from intfast.grading.grader import Grader
pairs = grading_pairs.made(0, 12, False)
with Grader(workers=1, timeout_s=60) as grader:
    for _ in range(4):
        grader._cache.clear()
        grader.grade_many([(p.gold, p.text) for p in pairs])
use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(sum(u.ru_utime + u.ru_stime for u in use))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many texts, and the other checkout."""
    parser.add_argument("--texts", type=int, default=20_000, help="of 1,000 characters")
    parser.add_argument("--base", help="a checkout whose built-in grader is timed, too")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each form of the function, and one for the built-in grader."""
    home, rows = Path.cwd(), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "trivial.py").write_text(SOURCE)
        os.chdir(folder)
        try:
            for form in ("score", "scores"):
                rows.append({"setting": {"form": form}, "figures": speed(form, args.texts)})
        finally:
            os.chdir(home)
    if args.base:
        rows.append(
            {"setting": {"form": "built-in"}, "figures": against(Path(args.base), args.rounds)}
        )
    print(*rows, sep="\n")
    return rows


def speed(form: str, num: int) -> dict[str, Any]:
    """Of two workers that have started; also the CPU seconds of the process that asks."""
    texts = [f"{n:04d} " + "word " * 199 for n in range(num)]
    asked = [Submission("", text, row='{"answer": "word ", "n": 1}') for text in texts]
    with FunctionGrader(GradeConfig(function=f"trivial:{form}", workers=2)) as grader:
        grader.grade_many(asked[:200])
        start, cpu = time.perf_counter(), time.process_time()
        for begin in range(0, num, 1000):
            grader.grade_many(asked[begin : begin + 1000])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"a_second": round(num / seconds), "asking_cpu_us": round(1e6 * cpu / num, 1)}


def against(base: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of this checkout's built-in grader over those of the other, in turns."""
    taken: dict[Path, list[float]] = {Path.cwd(): [], base.resolve(): []}
    for turn in range(rounds):
        for folder in list(taken)[:: 1 if turn % 2 else -1]:
            environment = os.environ | {"PYTHONPATH": str(folder)}
            command = [sys.executable, "-c", BUILT_IN]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=True
            )
            taken[folder].append(float(done.stdout))
    ratios = [ours / theirs for ours, theirs in zip(*taken.values(), strict=True)]
    return {
        "cpu_ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
    }
