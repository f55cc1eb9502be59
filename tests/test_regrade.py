"""Stored rows graded again: counts, changes, and where a continuation began."""

import json
from collections import Counter
from pathlib import Path

import pytest

from intfast.grading.grader import Grader
from intfast.study.regrade import main, report


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_regrade_counts_reasons_and_lists_changes(tmp_path, capsys):
    rows = [
        {"text": r"\boxed{5}", "answer": "5", "grade": "wrong", "token_ids": [1]},
        {"text": r"\boxed{4}", "answer": "5", "grade": "wrong"},
        {"text": "", "answer": "5", "finish_reason": "length"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "3 rows" in printed and "1 rows with another verdict" in printed
    assert "rows.jsonl:1: was wrong (no reason stored), is correct (correct)" in printed
    assert Counter(printed.split())["truncated"] == 1


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["--timeout-s", "nan"], "grade.timeout_s"),
        (["--timeout-s=-1"], "grade.timeout_s"),
        (["--workers", "0"], "grade.workers"),
        (["--workers=two"], "grade.workers"),
        (["--mode", "exact"], "grade.mode"),
    ],
)
def test_its_numbers_follow_the_rules_of_the_settings(tmp_path, capsys, words, setting):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": r"\boxed{5}", "answer": "5"}])
    assert main([str(path), *words]) == 2
    assert f"\n  {setting}: expected " in capsys.readouterr().err


def test_its_paths_begin_at_home(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "problems.jsonl", [{"id": "p1", "problem": "?", "answer": "5"}])
    (tmp_path / "rows").mkdir()
    rows = [{"problem_id": "p1", "text": r"\boxed{5}", "grade": "correct"}]
    write_lines(tmp_path / "rows" / "rows.jsonl", rows)
    assert main(["~/rows/rows.jsonl", "--problems", "~/problems.jsonl"]) == 0
    assert "0 rows with another verdict" in capsys.readouterr().out


def test_regrade_reads_the_problems_of_a_run_folder(tmp_path):
    problem = {"id": "p1", "problem": "?", "answer": "5"}
    problems = write_lines(tmp_path / "problems.jsonl", [problem])
    rows = [{"problem_id": "p1", "text": r"\boxed{5}", "grade": "correct"}]
    path = write_lines(tmp_path / "attempts.jsonl", rows)
    with Grader() as grader:
        assert "0 rows with another verdict" in report(path, grader, problems)
        with pytest.raises(ValueError, match=r"cannot read .*absent\.jsonl: No such file"):
            report(path, grader, tmp_path / "absent.jsonl")
        problems = problems.rename(tmp_path / "other.jsonl")
        with pytest.raises(ValueError, match="name its problems: --problems"):
            report(path, grader)
        write_lines(path, [*rows, {"problem_id": "p2", "text": ""}])
        with pytest.raises(ValueError, match=r"lacks problem 'p2' \(1 in all\)"):
            report(path, grader, problems)
        path.write_text('{"text": 5}\n')
        with pytest.raises(ValueError, match=r"attempts\.jsonl:1"):
            report(path, grader, problems)


def test_user_errors_are_code_2_and_say_what_is_wrong(tmp_path, capsys):
    absent = tmp_path / "absent.jsonl"
    assert main([str(absent)]) == 2
    assert f"error: cannot read {absent}: No such file" in capsys.readouterr().err
    path = write_lines(tmp_path / "interventions.jsonl", [{"reply": "x", "problem_id": "p"}] * 3)
    assert main([str(path)]) == 2
    assert "expected attempts.jsonl, continuations.jsonl" in capsys.readouterr().err


BODY = "a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :"
ATTEMPT = "d a # b : 7 # 3 > 7 - 3 = d 4 ; e d + c : 4 + 5 = e 9 ; ans d 4 c 5 e 9"


def write_run(folder: Path, continuations: list[dict]) -> Path:
    """The files of a compact run with one attempt and one intervention at its second step."""
    (folder / "config.toml").write_text(
        '[data]\ntrain = "x"\n[grade]\nmode = "tail:ans"\n'
        '[prompt]\nstyle = "compact"\nseparator = " ;"\n'
    )
    problem = {"id": "p", "problem": BODY, "answer": "d 4 c 5 e 1"}
    write_lines(folder / "problems.jsonl", [problem])
    attempt = {"problem_id": "p", "sample": 0, "prompt_ids": [], "token_ids": [], "text": ATTEMPT}
    attempt |= {"finish_reason": "stop", "grade": "wrong", "reason": "wrong", "policy_version": 0}
    write_lines(folder / "attempts.jsonl", [attempt])
    record = {"id": "p/0/0", "problem_id": "p", "attempt": 0, "sample": 0, "guided": ""}
    record |= {"reply": "", "gate": "kept", "location": 3, "content": " ans d 4"}
    write_lines(folder / "interventions.jsonl", [record])
    same = {"intervention_id": "p/0/0", "problem_id": "p", "sample": 0, "token_ids": []}
    same |= {"finish_reason": "stop", "reason": "wrong"}
    return write_lines(folder / "continuations.jsonl", [same | row for row in continuations])


def test_a_continuation_is_read_behind_the_partial_answer_that_it_continues(tmp_path, capsys):
    """Alone, none of these texts names an answer."""
    path = write_run(
        tmp_path,
        [
            {"start": "intervention", "text": "c 5 e 1", "grade": "correct"},
            {"start": "intervention", "text": "c 5 e 2", "grade": "wrong"},
            {"start": "error", "text": "", "grade": "wrong"},
            {"start": "prefix", "text": "ans d 4 c 5 e 1", "grade": "correct"},
        ],
    )
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "0 rows with another verdict" in printed
    assert Counter(printed.split())["correct"] == 1 and "no_answer" not in printed
    (tmp_path / "attempts.jsonl").write_text("")
    assert main([str(path)]) == 2
    assert "lacks attempt" in capsys.readouterr().err
    (tmp_path / "attempts.jsonl").unlink()
    assert main([str(path)]) == 2
    assert "attempts.jsonl; not found" in capsys.readouterr().err


def test_all_unreadable_rows_are_named_and_nothing_steers_the_terminal(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": 1}\n{"text": "x", "answer": "5"}\n{"\x1b[2J\n' + b"{\n" * 30)
    assert main([str(path)]) == 2
    message = capsys.readouterr().err
    assert (
        "rows.jsonl:1:" in message and "rows.jsonl:3:" in message and "rows.jsonl:2:" not in message
    )
    assert "and 12 more" in message and "\x1b" not in message
