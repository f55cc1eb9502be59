"""The grader against fuzzed and hostile answers: nothing crashes, hangs, runs or is let through.

Controls: graders as they are often written. One evaluates the answer and runs a payload; one calls
math-verify without a filter and a deadline that works and does not come back; one compares text.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reliability import hostile_answers as answers
from benchmarks.reliability.answer_pairs import RIGHT, RIGHT_UNICODE, WRONG, pairs
from intfast.grading import grader as grading
from intfast.grading.answers import Reason
from intfast.grading.grader import Grader

TRIALS = 10_000
DEADLINE_S = 5.0
SLACK_S = 0.5
"""What killing a worker and the load of a shared machine may add."""
MEMORY_BYTES = grading.WORKER_MEMORY_BYTES

_WATCHED = ("compile", "exec", "os.system", "socket.", "pickle.find_class", "shutil.", "os.mkdir")
_events: Counter[str] = Counter()
_watching = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    is_worker = event == "subprocess.Popen" and str(grading.WORKER) in list(map(str, args[1]))
    # Starting a worker opens pipes and /dev/null, and nothing else.
    if event.startswith(_WATCHED) or (event == "subprocess.Popen" and not is_worker):
        _events[event] += 1
    elif writes and isinstance(args[0], str) and args[0] != os.devnull:
        _events[f"open {args[0]}"] += 1


@contextmanager
def audited() -> Iterator[Counter[str]]:
    """Count what this process must not do while it reads others' text."""
    global _watching
    if not _events.get("hooked"):
        sys.addaudithook(_audit)
    _events.clear()
    _watching = True
    try:
        yield _events
    finally:
        _watching = False
        _events["hooked"] = 1


class _Measured:
    """Grades one text at a time, and takes the time and the memory of each."""

    def __init__(self, grader: Grader) -> None:
        self.grader = grader
        self.seconds: list[float] = []
        self.reasons: Counter[str] = Counter()
        self.worker_bytes = 0
        self._number = 0

    def warm(self) -> None:
        """Have a worker ready, so that its start is not taken for the time of an answer."""
        self._number += 1
        self.grader.grade_many([(f"x+{self._number}", rf"\boxed{{{self._number}+x}}")])

    def grade(self, gold: str, text: str) -> Reason:
        """The reason of one grade."""
        if not self.grader._workers:
            self.warm()
        start = time.perf_counter()
        (grade,) = self.grader.grade_many([(gold, text)])
        self.seconds.append(time.perf_counter() - start)
        self.reasons[grade.reason.value] += 1
        for worker in self.grader._workers:
            self.worker_bytes = max(self.worker_bytes, _peak_bytes(worker.process.pid))
        return grade.reason

    def figures(self) -> dict[str, Any]:
        """Reasons, and latency in milliseconds."""
        ordered = sorted(self.seconds)
        at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        ms = {k: round(1e3 * ordered[int(q * (len(ordered) - 1))], 2) for k, q in at.items()}
        return {"answers": len(ordered), "ms": ms, "reasons": dict(self.reasons.most_common())}


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) * 1024 if found else 0


def table() -> dict[str, Any]:
    """How the known pairs are graded: numbers, and the pairs that are not graded as known."""
    right, wrong = pairs(RIGHT) + RIGHT_UNICODE, pairs(WRONG)
    with Grader(workers=1, timeout_s=20) as grader:
        grades = grader.grade_many([(g, rf"\boxed{{{a}}}") for g, a in [*right, *wrong]])
    verdicts = list(zip([*right, *wrong], grades, strict=True))
    return {
        "known_pairs": len(right) + len(wrong),
        "rejected": [p for p, g in verdicts[: len(right)] if g.status != "correct"],
        "accepted": [p for p, g in verdicts[len(right) :] if g.status != "wrong"],
    }


def attack(texts: Iterable[tuple[str, str]], deadline_s: float = DEADLINE_S) -> _Measured:
    """Grade (gold, text) one by one; an exception in this process ends the campaign."""
    with Grader(workers=1, timeout_s=deadline_s) as grader:
        measured = _Measured(grader)
        measured.warm()
        for gold, text in texts:
            measured.grade(gold, text)
    return measured


def run(trials: int, seed: int) -> dict[str, Any]:
    """10,000 fuzzed texts, over 500 hostile answers, 400 that fish for reward, 339 known pairs."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            table()  # imports everything once, outside the audit
            with audited() as events:
                fuzz = attack(answers.fuzzed(random.Random(seed), trials))
                hostile = attack([("17", rf"\boxed{{{a}}}") for a in answers.hostile()])
                hacks = attack(answers.hacks())
                found = {name: n for name, n in events.items() if name != "hooked"}
            left_behind = sorted(os.listdir(folder))
            known = table()
        finally:
            os.chdir(home)
    late = sum(s > DEADLINE_S + SLACK_S for m in (fuzz, hostile, hacks) for s in m.seconds)
    accepted = hostile.reasons["correct"] + hacks.reasons["correct"]
    peak = max(m.worker_bytes for m in (fuzz, hostile, hacks))
    controls = naive_controls()
    figures = {
        "fuzzed": fuzz.figures(),
        "hostile": hostile.figures(),
        "reward_hacks": hacks.figures() | {"accepted": hacks.reasons["correct"]},
        "deadline_s": DEADLINE_S,
        "over_the_deadline": late,
        "exceptions_in_the_trainer": 0,
        "worker_crashes": sum(m.reasons["crash"] for m in (fuzz, hostile, hacks)),
        "peak_worker_mib": round(peak / 2**20),
        "peak_trainer_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "audit_events": found,
        "files_left_behind": left_behind,
        **known,
        "controls": controls,
        "control_failed": all(controls.values()),
    }
    figures["passed"] = (
        late == accepted == 0
        and not found
        and not left_behind
        and peak <= MEMORY_BYTES
        and figures["worker_crashes"] == 0
        and not known["rejected"]
        and not known["accepted"]
    )
    return figures


def naive_controls() -> dict[str, bool]:
    """Whether each broken grader fails as it must."""
    known = pairs(RIGHT)
    return {
        "an evaluating parser runs the payload": _evaluates(),
        "math-verify alone passes the deadline": not _returns(_ALONE, DEADLINE_S + SLACK_S),
        "comparing text rejects right answers": sum(g != a for g, a in known) > len(known) / 2,
        "the first box takes a quoted answer": answers_first_box() > 0,
    }


def answers_first_box() -> int:
    """How many reward hacks a grader accepts that takes the first box for the answer."""
    prefix = r"\boxed{"
    return sum(
        text.partition(prefix)[2].partition("}")[0] == gold for gold, text in answers.hacks()
    )


_ALONE = r"""
from math_verify import parse, verify
gold, answer = parse("$17$"), parse("$9^{9^{9^{9}}}$", parsing_timeout=None)
str(answer[0])
verify(gold, answer, timeout_seconds=None)
"""


def _returns(program: str, deadline_s: float) -> bool:
    """Whether a program ends in time; its imports count for nothing here."""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        process.wait(deadline_s + 10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def _evaluates() -> bool:
    payload = f"__import__('os').mkdir('{answers.CANARY}')"
    program = f"from sympy.parsing.sympy_parser import parse_expr\nparse_expr({payload!r})"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", program], cwd=folder, stderr=subprocess.DEVNULL)
        return os.listdir(folder) == [answers.CANARY]
