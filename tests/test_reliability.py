"""The campaigns at small size: the promises hold, and the broken variants are caught."""

import random

import pytest

from benchmarks.reliability import __main__ as command
from benchmarks.reliability import function, grader, hostile_answers, rows, verifier
from intfast import sources, verdict
from intfast.grading.grader import Grader

pytestmark = pytest.mark.campaign


def test_the_dispatcher_knows_the_campaigns():
    assert {"function", "grader", "rows", "verifier"} <= set(command.names())


def test_no_hijack_succeeds_and_naive_readers_are_hijacked():
    figures = verifier.run(200, seed=1)
    assert figures["passed"] and figures["control_failed"]
    assert figures["hijacked"] == 0 and min(figures["controls"].values()) > 0


def test_the_verifier_campaign_catches_a_reader_without_the_mark(monkeypatch):
    monkeypatch.setattr(verdict, "mark_of", lambda text: "00000000")
    forged = verifier.FORGERIES[11].replace("{m}", "00000000").replace("{n}", "1")
    monkeypatch.setattr(verifier, "FORGERIES", (forged,))
    assert not verifier.run(12, seed=0)["passed"]


def test_hostile_calls_of_a_scoring_function_are_unscored_and_cost_nobody_else():
    figures = function.run(200, seed=0)
    assert figures["passed"] and figures["control_failed"], figures


def test_every_mutated_row_is_accepted_counted_or_named():
    figures = rows.run(300, seed=1)
    assert figures["passed"] and figures["control_failed"], figures


def test_the_rows_campaign_catches_a_silent_drop(monkeypatch):
    monkeypatch.setattr(sources.Faults, "add", lambda *_: None)
    assert not rows.run(100, seed=1)["passed"]


def test_fuzzed_and_hostile_answers_cost_nothing_and_do_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = list(hostile_answers.fuzzed(random.Random(3), 150))
    texts += [("17", rf"\boxed{{{a}}}") for a in hostile_answers.hostile()[::25]]
    texts += hostile_answers.hacks()
    with Grader(workers=1, timeout_s=5) as warm:
        warm.grade_many([("x+1", r"\boxed{1+x}")])
    with Grader(workers=2, timeout_s=2) as graded, grader.audited() as events:
        grades = graded.grade_many(texts)
        found = {name: count for name, count in events.items() if name != "hooked"}
    assert found == {} and list(tmp_path.iterdir()) == []
    assert len(grades) == len(texts)
    fishing = grades[-len(hostile_answers.hacks()) :]
    assert [g for g in fishing if g.status == "correct"] == []


@pytest.mark.parametrize(
    "act", ["eval('1')", "open('x', 'w').close()", "__import__('os').system('true')"]
)
def test_the_audit_sees_what_must_not_happen(tmp_path, monkeypatch, act):
    monkeypatch.chdir(tmp_path)
    code = compile(act, "act", "exec")
    with grader.audited() as events:
        exec(code)
        assert sum(n for name, n in events.items() if name != "hooked") > 0


def test_data_and_verdicts_are_read_without_running_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = [rows.mutated(random.Random(n), n) for n in range(150)]
    lines += [
        rows.json.dumps(rows.GOOD | {"problem": payload, "answer": payload}).encode()
        for payload in hostile_answers.CODE
    ]
    path.write_bytes(b"\n".join(lines))
    attempts = verifier.cases(60, seed=2)

    def read_all() -> None:
        with pytest.raises(ValueError, match="faults"):
            rows.load(path)
        for steps, _ in attempts:
            text = "".join(steps)
            verdict.read(text, verdict.mark_of(text), len(steps), verifier.CONTROL)
            verdict.neutralise(text)

    read_all()  # imports and regular expressions are compiled once
    with grader.audited() as events:
        read_all()
        found = {name: count for name, count in events.items() if name != "hooked"}
    assert found == {} and list(tmp_path.iterdir()) == [path]


def test_a_grader_that_takes_the_first_box_is_fished_from():
    assert len(hostile_answers.hacks()) >= 300
    assert grader.answers_first_box() > 0
