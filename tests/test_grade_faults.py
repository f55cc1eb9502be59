"""Grading workers that misbehave: the sample is unscored, the others are graded as without it."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from intfast import credit
from intfast.config import CreditConfig
from intfast.engine.protocol import Completion
from intfast.grading import grader as grading
from intfast.grading import watch as grade_watch
from intfast.grading.grader import Grade, Grader
from intfast.grading.watch import MIN_ANSWERS, GradeWatch

REAL = grading.WORKER
# A worker that is right about sums, and does what it is told to for the answer "x".
BAD_WORKER = """
import json, os, runpy, sys, time
real = runpy.run_path({real!r})
fd = os.dup(1)
real["set_limits"](600 << 20)
os.write(fd, b"R")
for line in sys.stdin.buffer:
    gold, answer = json.loads(line)
    if "x" in answer:
        {fault}
    os.write(fd, b"C" if sorted(gold) == sorted(answer) else b"W")
"""
MARKER = "faulty_grading_worker_"
FAULTS = {
    "sleeps": ("time.sleep(600)", "timeout"),
    "segfaults": ("os.kill(os.getpid(), 11)", "crash"),
    "eats memory": ("bytearray(1 << 30)", "crash"),
    "forks": ("os.fork() == 0 and time.sleep(600)", None),
    "leaves a child": ("os.fork() and os._exit(0); time.sleep(600)", "timeout"),
    "floods": ("os.write(fd, b'C' * 5000)", "crash"),
    "says too much": ("os.write(fd, b'CC')", "crash"),
    "says nonsense": ("os.write(fd, b'?')", "crash"),
}
JOBS = [("a+b", "b+a"), ("a+b", "b-x"), ("a+c", "c+a"), ("a+d", "d-a"), ("a+e", "e+a")]


def boxed(jobs):
    return [(gold, rf"\boxed{{{answer}}}") for gold, answer in jobs]


def children() -> list[str]:
    """Command lines of living processes that run the script of these tests."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = file.read_bytes().decode()
            found += [line] if MARKER in line and str(os.getpid()) in line else []
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_worker_costs_only_its_own_sample(name, tmp_path, monkeypatch):
    fault, reason = FAULTS[name]
    script = tmp_path / f"{MARKER}{os.getpid()}.py"
    script.write_text(BAD_WORKER.format(real=str(REAL), fault=fault))
    monkeypatch.setattr(grading, "WORKER", script)
    with Grader(workers=1, timeout_s=1.0) as grader:
        for _ in range(2):
            grades = grader.grade_many(boxed(JOBS))
            assert [g.reason for g in grades[:1] + grades[2:]] == [
                "correct",
                "correct",
                "wrong",
                "correct",
            ]
            if reason is not None:
                assert grades[1] == Grade(status="unscored", reason=reason)
            grader._cache.clear()
    # The kill is sent; the kernel may take a moment.
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children() == []


def test_a_verdict_that_comes_late_is_never_that_of_the_next_answer(tmp_path, monkeypatch):
    """The extra byte arrives after its own verdict was read, so only `give` can see it."""
    fault = "os.write(fd, b'W'); time.sleep(0.3); os.write(fd, b'C'); continue"
    script = tmp_path / "worker.py"
    script.write_text(BAD_WORKER.format(real=str(REAL), fault=fault))
    monkeypatch.setattr(grading, "WORKER", script)
    with Grader(workers=1, timeout_s=5.0) as grader:
        assert grader.grade_many(boxed([("a+b", "b-x")]))[0].reason == "wrong"
        grading.wait([grader._workers[0].verdict_fd], 5)
        assert grader.grade_many(boxed([("a+b", "b-a")]))[0].reason == "wrong"


@pytest.mark.parametrize(
    "code",
    [
        "open('x', 'w')",
        "os.open('x', os.O_CREAT | os.O_WRONLY)",
        "os.system('true')",
        "subprocess.Popen(['true'])",
        "os.fork()",
        "socket.socket()",
        "os.remove('x')",
        "os.mkdir('x')",
        "shutil.rmtree('x')",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_a_side_effect_ends_the_worker_process(code, tmp_path):
    program = (
        "import os, runpy, shutil, socket, subprocess\n"
        f"runpy.run_path({str(REAL)!r})['forbid_side_effects']()\n"
        f"open({str(REAL)!r}).read(9)\n"
        f"try:\n    {code}\nexcept BaseException:\n    pass\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []


# --- unscored answers leave baseline and loss --------------------------------------------------


def completion(token_id: int) -> Completion:
    return Completion(token_ids=[token_id], logprobs=[-0.5], finish_reason="stop", policy_version=0)


def credited(statuses: list[str], config: CreditConfig):
    """What a group with these grades teaches: {its completion's token: advantage}."""
    rewards = [[credit.REWARDS[status] for status in statuses]]
    found = credit.group_advantages(rewards, config)
    completions = [[completion(10 + place) for place in range(len(statuses))]]
    made = credit.examples([[1, 2]], completions, found.advantages_P_G, config)
    total = credit.divisor(made, config, 8)
    return {e.token_ids[-1]: (e.advantages, e.weights) for e in made}, total, found


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scale", ["none", "group", "group-population", "batch"])
def test_an_unscored_answer_is_in_neither_baseline_nor_loss(baseline, scale):
    config = CreditConfig(baseline=baseline, scale=scale, normalisation="token")
    without, total, _ = credited(["correct", "wrong", "wrong"], config)
    with_it, total_with, found = credited(["correct", "wrong", "wrong", "unscored"], config)
    assert with_it == without and total_with == total and 13 not in with_it
    assert found.num_unscored == 1
    as_wrong, _, _ = credited(["correct", "wrong", "wrong", "wrong"], config)
    assert as_wrong != with_it  # the control: counted as wrong it would move the baseline


def test_a_group_that_cannot_be_scored_teaches_nothing():
    config = CreditConfig()
    found = credit.group_advantages([[None, None], [1.0, None], [1.0, 0.0]], config)
    assert found.advantages_P_G[:2] == [[None, None], [0.0, None]]
    assert (found.num_unscored_groups, found.num_all_right, found.num_active) == (1, 1, 1)


# --- rates, and the stop -----------------------------------------------------------------------


def grades(**counts: int) -> list[Grade]:
    made = []
    for reason, count in counts.items():
        status = grading.Reason(reason).status
        made += [Grade(status=status, reason=grading.Reason(reason))] * count
    return made


def test_rates_are_shares_since_the_last_row():
    watch = GradeWatch()
    watch.add(grades(correct=1, wrong=2, timeout=1))
    expected = {"graded": 4, "grade_correct": 0.25, "grade_timeout": 0.25, "grade_wrong": 0.5}
    assert watch.take() == expected
    assert watch.take() == {}


def test_too_many_unscored_answers_stop_the_run_with_reasons_and_remedies(monkeypatch):
    watch = GradeWatch()
    watch.add(grades(timeout=MIN_ANSWERS - 1))  # too few to mean anything
    with pytest.raises(ValueError, match=r"100% of the last 64 .*63 timeout, 1 crash") as caught:
        watch.add(grades(crash=1))
    message = str(caught.value)
    assert "more than 50%" in message
    assert "raise grade.timeout_s" in message and "free memory" in message
    GradeWatch().add(grades(timeout=32, wrong=32))
    monkeypatch.setattr(grade_watch, "MAX_UNSCORED", 0.0)
    with pytest.raises(ValueError, match="gold_unparseable"):
        GradeWatch().add(grades(gold_unparseable=1, correct=63))


def test_the_stop_looks_at_the_latest_answers_only():
    watch = GradeWatch()
    watch.add(grades(correct=10_000))
    with pytest.raises(ValueError, match="of the last 256 answers"):
        watch.add(grades(timeout=129))


def test_texts_without_an_answer_are_warned_of_once():
    said = []
    watch = GradeWatch(said.append)
    watch.add(grades(no_answer=60, wrong=4))
    watch.add(grades(no_answer=60))
    assert len(said) == 1 and "grade.mode" in said[0]
    watch = GradeWatch(said.append)
    watch.add(grades(truncated=60, wrong=40))
    assert len(said) == 1
