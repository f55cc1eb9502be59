import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reliability.answer_pairs import RIGHT, RIGHT_UNICODE, WRONG, pairs
from intfast.grading import grader as grading
from intfast.grading.answers import compare_quickly
from intfast.grading.grader import Grader
from intfast.grading.reasons import Reason, Status


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout_s=20) as grader:
        yield grader


def boxed(table: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(gold, rf"So the answer is \boxed{{{answer}}}.") for gold, answer in table]


def test_table_of_right_and_wrong_answers(grader):
    right, wrong = pairs(RIGHT) + RIGHT_UNICODE, pairs(WRONG)
    assert len(set(right)) + len(set(wrong)) >= 300
    grades = grader.grade_many(boxed(right + wrong))
    verdicts = dict(zip(right + wrong, (g.status for g in grades), strict=True))
    assert {p: v for p, v in verdicts.items() if p in right and v is not Status.CORRECT} == {}
    assert {p: v for p, v in verdicts.items() if p in wrong and v is not Status.WRONG} == {}


def test_arithmetic_agrees_with_the_parser(grader):
    """Where both decide, they say the same, but for chains and texts the parser cannot read."""
    quick = {pair: compare_quickly(*pair) for pair in pairs(RIGHT) + pairs(WRONG)}
    both = [pair for pair, r in quick.items() if r in (Reason.CORRECT, Reason.WRONG)]
    parsed = grader._judge(both)
    known = {("17", "6=17"), ("17", "1=2=17"), ("1/2", r"\frac{-1}{-2}"), ("2i", "2 i")}
    known.add(("5", r"\boldsymbol{5}"))
    decided = (Reason.CORRECT, Reason.WRONG)
    differ = {p for p in both if parsed[p] in decided and parsed[p] is not quick[p]}
    assert differ <= known, differ
    assert len(both) > 50


def test_a_noun_behind_the_answer_is_no_error(grader):
    said = [f"Answer: 9 + 9 = 18 {noun}." for noun in ("apples", "marbles", "books")]
    said += [r"\boxed{18 marbles}", "Answer: $18$ .", 'Answer: "18."']
    assert {g.status for g in grader.grade_many([("18", text) for text in said])} == {
        Status.CORRECT
    }
    wrong = ["Answer: 9 + 9 = 17 marbles.", "Answer: 18 hundred", "Answer: 18 or 19 marbles"]
    assert {g.status for g in grader.grade_many([("18", text) for text in wrong])} == {Status.WRONG}


def test_a_stated_answer_is_mathematics_too():
    said = "So it is 9 + 9 = 18. The answer is 18."
    for mode, status in {"stated": Status.CORRECT, "boxed": Status.WRONG}.items():
        with Grader(mode=mode, workers=1) as grader:
            assert grader.grade_many([("18.0", said)])[0].status is status


@pytest.mark.parametrize("mode", ["", "box", "tail", "tail:", "tail:a b", "boxed:x"])
def test_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match="grading mode"):
        Grader(mode=mode)


def test_no_answer_and_truncated():
    with Grader() as grader:
        grades = grader.grade_many(
            [
                ("5", "hm"),
                ("5", "hm", "stop"),
                ("5", r"\boxed{", "length"),
                ("5", r"\boxed{5} and", "length"),
            ]
        )
        assert [g.reason for g in grades] == ["no_answer", "no_answer", "truncated", "correct"]
        assert [g.status for g in grades] == ["wrong", "wrong", "wrong", "correct"]
        assert grader._workers == []


def test_tail_mode_compares_text_and_never_starts_a_worker():
    with Grader(mode="tail:ans") as grader:
        texts = ["x ans d 4 c 5", "ans  d 4\nc 5 ", "ans d 04 c 5", "d 4 c 5", "ans d 4", "ans 8/2"]
        grades = grader.grade_many([("d 4 c 5", text) for text in texts])
        assert [g.status == "correct" for g in grades] == [True, True, *[False] * 4]
        assert grader._workers == []


HOSTILE = {
    r"9^{9^{9^{9}}}": "too_complex",
    r"9^{9^{9}}": "too_complex",
    r"9^9^9^9": "too_complex",
    r"x^{y^{z^{w}}}": "too_complex",
    r"10^{999999999}": "too_complex",
    r"100000!": "too_complex",
    r"(10^8)!": "too_complex",
    r"((9!)!)!": "too_complex",
    r"\binom{1000000000}{500000000}": "too_complex",
    "{" * 100 + "1" + "}" * 100: "too_complex",
    "(" * 140 + "1" + ")" * 140: "too_complex",
    "1" * 301: "too_long",
    "9" * 1_000_000: "too_long",
    r"\frac{" * 200_000: "no_answer",
    '__import__("os").system("touch pwned")': "bad_characters",
    "__import__('os').system('touch pwned')": "bad_characters",
    "().__class__": "bad_characters",
    "5\x00": "bad_characters",
    "5\x1b[2J": "bad_characters",
    "5\u200b6": "bad_characters",
    "\u202e5": "bad_characters",
    "\uff15": "wrong",
    "`5`": "bad_characters",
    "5;6@7": "bad_characters",
    r"16$ or $17": "unparseable",
    r"\undefinedmacro": None,
    "lambda: 5": None,
    "eval(5)": None,
    "os.system(5)": None,
    "exec('5')": None,
    r"\sqrt" * 60: None,
    "-" * 300: None,
    "!" * 300: None,
    r"\int_0^1 \int_0^1": None,
    r"\input{/etc/passwd}": None,
}


def test_hostile_answers_are_wrong_with_a_reason(grader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    grades = grader.grade_many([("17", rf"\boxed{{{answer}}}") for answer in HOSTILE])
    assert time.monotonic() - start < 60
    for (answer, reason), grade in zip(HOSTILE.items(), grades, strict=True):
        assert grade.status == "wrong", (answer[:50], grade)
        assert reason in (None, grade.reason), (answer[:50], grade)
    assert list(tmp_path.iterdir()) == []


SLOW = r"\int_0^{9} e^{\sin(x^x)} dx"


def test_late_worker_is_killed_and_replaced():
    with Grader(workers=1, timeout_s=4) as grader:
        assert grader.grade_many(boxed([("x+1", "1+x")]))[0].reason == "correct"
        first = grader._workers[0].process
        start = time.monotonic()
        grades = grader.grade_many(boxed([("17", SLOW), ("a+b", "b+a"), ("a+b", "b-a")]))
        assert [g.reason for g in grades] == ["timeout", "correct", "wrong"]
        assert grades[0].status == "unscored"
        assert time.monotonic() - start < 60
        assert first.returncode == -signal.SIGKILL
        assert grader._workers[0].process.pid != first.pid


def test_a_worker_that_died_idle_is_replaced_and_costs_nothing():
    with Grader(workers=1, timeout_s=20) as grader:
        grader.grade_many(boxed([("x+1", "1+x")]))
        os.kill(grader._workers[0].process.pid, signal.SIGKILL)
        grader._workers[0].process.wait()
        assert grader.grade_many(boxed([("a+b", "b+a")]))[0].reason == "correct"


def test_what_would_have_to_be_evaluated_is_refused_and_its_worker_replaced():
    hard = r"\gcd(2^{99}, 2^{88})"
    with Grader(workers=1, timeout_s=20) as grader:
        grades = grader.grade_many(boxed([("x", hard), (hard, "x"), ("a+b", "b+a")]))
        assert [g.reason for g in grades] == ["unparseable", "gold_unparseable", "correct"]


def test_crash_is_unscored_and_the_next_answer_is_graded(monkeypatch):
    with Grader(workers=1, timeout_s=20) as grader:
        grader.grade_many(boxed([("x+1", "1+x")]))
        job, after = boxed([("a+b", "b+a"), ("a+c", "c+a")])
        give = grading._Worker.give

        def give_and_die(worker, job):
            os.kill(worker.process.pid, signal.SIGSTOP)
            give(worker, job)
            os.kill(worker.process.pid, signal.SIGKILL)

        monkeypatch.setattr(grading._Worker, "give", give_and_die)
        assert grader.grade_many([job])[0] == grading.Grade(status="unscored", reason="crash")
        monkeypatch.undo()
        # A crash may be nobody's fault, so it is not remembered.
        assert [g.reason for g in grader.grade_many([job, after])] == ["correct", "correct"]


def test_interrupted_grading_leaves_no_verdict_behind(monkeypatch):
    with Grader(workers=1, timeout_s=20) as grader:
        grader.grade_many(boxed([("x+1", "1+x")]))

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(grading, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grader.grade_many(boxed([("a+b", "b+a")]))
        monkeypatch.undo()
        assert grader.grade_many(boxed([("a+b", "b-a")]))[0].reason == "wrong"


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_worker_is_bare_and_ends_with_the_grader(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame-17")
    with Grader(workers=2, timeout_s=20) as grader:
        grader.grade_many(boxed([("x+1", "1+x"), ("x+2", "2+x"), ("x+3", "3+x")]))
        pids = [worker.process.pid for worker in grader._workers]
        assert len(pids) == 2
        if sys.platform == "linux":
            for pid in pids:
                # A second worker may still be starting when the first has graded everything.
                deadline = time.monotonic() + 20
                while os.readlink(f"/proc/{pid}/fd/1") != "/dev/null":
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                assert b"PYTHONPATH" in environment
                assert b"sesame-17" not in environment and b"HF_TOKEN" not in environment
                # Its own session, no modules of the trainer, no files but pipes and /dev/null.
                assert os.getsid(pid) == pid
                assert b"libtorch" not in Path(f"/proc/{pid}/maps").read_bytes()
                files = {f.name: os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()}
                assert files.pop("1") == files.pop("2") == "/dev/null"
                assert all(f.startswith("pipe:") or f == "/dev/null" for f in files.values())
                limits = Path(f"/proc/{pid}/limits").read_text()
                most = int(re.search(r"Max address space +(\d+)", limits)[1])
                status = Path(f"/proc/{pid}/status").read_text()
                now = [
                    int(re.search(rf"{key}:\s+(\d+)", status)[1]) << 10
                    for key in ("VmSize", "VmRSS")
                ]
                assert most - now[0] + now[1] <= grading.WORKER_MEMORY_BYTES + (16 << 20)
    assert not any(process_exists(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_when_the_trainer_dies():
    program = (
        "import os\n"
        "from intfast.grading.grader import Grader\n"
        "grader = Grader(workers=1)\n"
        "grader.grade_many([('x+1', 'Answer: 1+x')])\n"
        "print(grader._workers[0].process.pid, flush=True)\n"
        "os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    command = Path(f"/proc/{int(done.stdout)}/cmdline")
    deadline = time.monotonic() + 20
    # A dead process that nobody has reaped has an empty command line.
    while command.exists() and command.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not command.exists() or not command.read_bytes()


def test_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(grading, "WORKER", "/nowhere/worker.py")
    with (
        Grader(workers=1) as grader,
        pytest.raises(RuntimeError, match=r"did not start.*\n.*nowhere"),
    ):
        grader.grade_many(boxed([("x+1", "1+x")]))
    assert grader._workers == []


def test_evaluating_parser_is_closed_to_expressions():
    program = (
        "import runpy, sympy\n"
        f"runpy.run_path({str(grading.WORKER)!r})"
        "['restrict_eval']()\n"
        "print(sympy.sympify('5') + sympy.sympify('x'), flush=True)\n"
        "print(sympy.sympify('open(0)'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "x + 5\n"), done.stderr


def test_verdicts_are_cached_and_order_is_kept(grader, monkeypatch):
    table = [("y+1", "1+y"), ("y+1", "y"), ("17", "16"), ("y+1", "1+y"), ("17", "17")]
    expected = ["correct", "wrong", "wrong", "correct", "correct"]
    assert [g.reason for g in grader.grade_many(boxed(table))] == expected
    monkeypatch.setattr(grading._Worker, "give", None)
    assert [g.reason for g in grader.grade_many(boxed(table))] == expected
    assert [g.reason for g in grader.grade_many(boxed(table[::-1]))] == expected[::-1]


def test_a_comparison_that_was_started_early_is_not_repeated(monkeypatch):
    given = []
    give = grading._Worker.give
    monkeypatch.setattr(grading._Worker, "give", lambda w, job: given.append(job) or give(w, job))
    table = boxed([("z+1", "1+z"), ("z+1", "z"), ("17", "16"), ("z+1", "1+z")])
    with Grader(workers=1) as grader:
        for row in table:
            grader.start(grading.Submission(*row))
        grades = grader.grade_many(table)
        assert [g.reason for g in grades] == ["correct", "wrong", "wrong", "correct"]
        assert given == [("z+1", "1+z"), ("z+1", "z")]
        assert [g.reason for g in grader.grade_many(table[1:])] == ["wrong", "wrong", "correct"]
        assert len(given) == 2


def test_a_verdict_is_there_before_anybody_waits_for_it():
    row = boxed([("w+2", "2+w")])[0]
    with Grader(workers=1) as grader:
        until = time.monotonic() + 60
        while grader._begun.get(("w+2", "2+w")) is None and time.monotonic() < until:
            grader.start(grading.Submission(*row))
            time.sleep(0.01)
        assert grader._begun == {("w+2", "2+w"): Reason.CORRECT}


def test_ungradable_golds(grader):
    golds = ["17", r"\frac12", r"\text{yes}", "x>3", "2^{2^{2021}}-1", " ", "1" * 400, "\u732b"]
    assert grader.check_golds(golds) == [True] * 4 + [False] * 4
    # What only the parser can tell, alone and as a part.
    assert grader.check_golds([r"\frac{", r"(1, \frac{)", r"(1, \frac{2}{x})"]) == [
        False,
        False,
        True,
    ]
    grades = grader.grade_many(boxed([(gold, "17") for gold in golds[4:]]))
    assert {(g.status, g.reason) for g in grades} == {("unscored", "gold_unparseable")}


SENT = """
import pickle, sys, types
class Lazy(types.ModuleType):
    def __getattr__(self, name): raise ModuleNotFoundError(name)
sys.modules["lazy"] = Lazy("lazy")  # before the module that has the name of UNSET
from intfast.grading.grader import Grade
from intfast.grading.reasons import Reason
grade = Grade(status=Reason.WRONG.status, reason=Reason.WRONG)
assert pickle.loads(pickle.dumps(grade)) == grade
"""


def test_a_grade_is_sent_to_other_ranks_without_a_search_through_all_modules():
    subprocess.run([sys.executable, "-c", SENT], check=True, timeout=60)
