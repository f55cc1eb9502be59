"""A scoring function that hangs, eats memory, dies, returns rubbish: no worker lost, no run ended.

Every call has the one reason it should be unscored under, and answers between them keep their own.
Control: a grader that takes a call that did not come back for a reward.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from intfast.config import GradeConfig
from intfast.grading import function
from intfast.grading.function import FunctionGrader
from intfast.grading.grader import Submission
from intfast.state import interrupt

TRIALS = 10_000
CONTROL = 60
TIMEOUT_S = 2.0
GROUP = 100
"""Texts that are graded together."""
SOURCE = """
import os, socket, subprocess, sys, time

def score(problem, completion):
    word = completion.partition(" ")[0]
    if word == "hang": time.sleep(1000)
    if word == "spin":
        while True: pass
    if word == "memory": return len(b"x" * (1 << 34))
    if word == "pile": return len([bytes(1 << 20) for _ in range(1 << 14)])
    if word == "die": os._exit(3)
    if word == "abort": os.abort()
    if word == "garbage": os.write(3, bytes(range(256))); return 1.0
    if word == "forged": os.write(3, b"[1.0, 1.0, 1.0]\\\\n"); return 1.0
    if word == "closed": os.close(3); return 1.0
    if word == "fork": os.fork()
    if word == "socket": socket.socket()
    if word == "program": subprocess.run(["true"])
    if word == "file": open("left", "w")
    if word == "eval": return eval(completion[5:])
    if word == "exit": sys.exit()
    if word == "deep": return score(problem, completion)
    if word == "raise": raise RuntimeError(completion * 100)
    if word == "type": return {"reward": 1.0}
    if word == "text": return "1.0"
    if word == "complex": return 1j
    if word == "nan": return float("nan")
    if word == "huge": return 10 ** 400
    if word == "above": return 2.0
    if word == "none": return None
    if word == "print": print("x" * 100_000); sys.stderr.write("y" * 100_000)
    return 0.5

def scores(problems, completions):
    return [score(p, c) for p, c in zip(problems, completions)]
"""
KINDS = {
    "hang": ("timeout", 4),
    "spin": ("timeout", 2),
    "memory": ("crash", 10),
    "pile": ("crash", 10),
    "die": ("crash", 20),
    "abort": ("crash", 10),
    "garbage": ("crash", 15),
    "forged": ("crash", 5),
    "closed": ("crash", 5),
    "fork": ("forbidden", 5),
    "socket": ("forbidden", 5),
    "program": ("forbidden", 5),
    "file": ("forbidden", 5),
    "eval __import__('os').getpid()": ("forbidden", 5),
    "exit": ("raised", 40),
    "deep": ("raised", 20),
    "raise": ("raised", 100),
    "type": ("wrong_type", 150),
    "text": ("wrong_type", 100),
    "complex": ("wrong_type", 80),
    "nan": ("not_finite", 100),
    "huge": ("raised", 50),
    "above": ("out_of_range", 100),
    "none": ("no_reward", 50),
    "print": ("wrong", 50),
    "plain": ("wrong", 54),
}
"""Text -> the reason that its grade must have, and how many of a thousand begin so."""


def attack(name: str, trials: int, seed: int) -> dict[str, Any]:
    """Grade so many texts; the counts, and the texts whose reason is not the expected one."""
    rng = random.Random(seed)
    texts = rng.choices([*KINDS], [share for _, share in KINDS.values()], k=trials)
    asked = [Submission("", f"{text} #{n}", row='{"a": 1}') for n, text in enumerate(texts)]
    settings = GradeConfig(function=name, workers=2, timeout_s=TIMEOUT_S, range=(0.0, 1.0))
    grades, told, start = [], [], time.perf_counter()
    with FunctionGrader(settings, told.append) as grader:
        for begin in range(0, trials, GROUP):
            grades += grader.grade_many(asked[begin : begin + GROUP])
            interrupt.beat()
        workers = [worker.process for worker in grader._workers]
        alive = sum(process.poll() is None for process in workers)
    wrong = [
        (text, grade.reason.value)
        for text, grade in zip(texts, grades, strict=True)
        if grade.reason != KINDS[text][0]
    ]
    return {
        "calls": len(grades),
        "reasons": dict(Counter(grade.reason.value for grade in grades).most_common()),
        "wrong": Counter(wrong).most_common(10),
        "workers_at_the_end": alive,
        "left": sum(process.poll() is None for process in workers) + len(list(Path().glob("left"))),
        "tracebacks_told": len(told),
        "seconds": round(time.perf_counter() - start, 1),
    }


def run(trials: int, seed: int) -> dict[str, Any]:
    """Nine tenths one by one, the rest in lists; then the control."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("hostile.py").write_text(SOURCE.replace("\\\\", "\\"))
            single = attack("hostile:score", trials - trials // 10, seed)
            lists = attack("hostile:scores", trials // 10, seed + 1)

            def trusting(self: Any, reason: Any = 1.0) -> list[Any]:
                job = self._left.popleft()
                self.grader.again(self._left)
                return [(job, 1.0)]

            with mock.patch.object(function._FunctionWorker, "late", trusting):
                control = attack("hostile:score", min(trials, CONTROL), seed)
        finally:
            os.chdir(home)
    sound = [not a["wrong"] and a["workers_at_the_end"] and not a["left"] for a in (single, lists)]
    return {
        "passed": all(sound),
        "control_failed": bool(control["wrong"]),
        "single": single,
        "lists": lists,
        "control_wrong": len(control["wrong"]),
    }
