"""grade.function: a scoring function of the user, in processes that can be killed."""

import json
import math

import msgspec
import pytest
from small_run import TOKENIZER, Script, words, write_inputs

from intfast import cli, credit, data
from intfast.config import CreditConfig, GradeConfig
from intfast.evaluate import Evaluation, count_samples
from intfast.grading import function as module
from intfast.grading.function import FunctionGrader, grader_of
from intfast.grading.grader import Grade, Grader, Submission
from intfast.grading.reasons import Reason, Status
from intfast.records import Attempt, Problem
from intfast.study import ablate, regrade
from intfast.train import main as train

SOURCE = '''
import os, socket, subprocess, sys, threading, time
calls = 0

def score(problem, completion):
    """What the text asks for."""
    global calls
    calls += 1
    word, _, rest = completion.partition(" ")
    if word == "print":
        print("x" * 10_000, flush=True)
        sys.stderr.write("y")
        return 1.0
    if word == "hang":
        time.sleep(60)
    if word == "spin":
        while True: pass
    if word == "fork": os.fork()
    if word == "socket": socket.socket()
    if word == "start": subprocess.Popen(["true"])
    if word == "write": open("left", "w")
    if word == "exit": sys.exit(0)
    if word == "die": os._exit(0)
    if word == "eat": return len([bytearray(1 << 20) for _ in range(4000)])
    if word == "raise": raise ZeroDivisionError("of text " + rest)
    if word == "eval": return eval(rest)
    if word == "list": return [1.0]
    if word == "text": return "1.0"
    if word == "nan": return float("nan")
    if word == "none": return None
    if word == "ask": return input()
    if word == "garbage": os.write(3, b"garbage" + bytes(9)); return 1.0
    if word == "true": return completion == "true"
    if word == "calls": return calls
    if word == "column": return problem["points"][rest]
    return float(rest)

def scores(problems, completions):
    return [score(p, c) for p, c in zip(problems, completions)]

def short(problems, completions): return scores(problems, completions)[1:]
def one(problem): return 1.0
async def later(problem, completion): return 1.0
def half(problem, completion): return 0.5
def broken(problem, completion): return problem["no such column"]
'''
ROW = json.dumps({"question": "?", "points": {"a": 0.25, "b": 1}})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(name: str = "mine:score", **settings) -> FunctionGrader:
    grader = grader_of(GradeConfig(function=name, **{"timeout_s": 20.0, "workers": 1} | settings))
    grader.told = []
    grader.say = grader.told.append
    return grader


def ask(*texts: str) -> list[Submission]:
    return [Submission("", text, row=ROW) for text in texts]


def graded(grader: FunctionGrader, *texts: str) -> list[tuple[str, float | None]]:
    grades = grader.grade_many(ask(*texts))
    return [(grade.reason.value, credit.reward(grade)) for grade in grades]


@pytest.mark.parametrize("name", ["mine:score", "mine:scores"])
def test_values_and_bad_outcomes_of_single_calls(folder, name):
    told = {
        "value 1": ("correct", 1.0),
        "value 0": ("wrong", 0.0),
        "value 0.5": ("wrong", 0.5),
        "value 1.5": ("out_of_range", None),
        "true": ("correct", 1.0),
        "true not": ("wrong", 0.0),
        "column a": ("wrong", 0.25),
        "column b": ("correct", 1.0),
        "column c": ("raised", None),
        "raise 7": ("raised", None),
        "list": ("wrong_type", None),
        "text": ("wrong_type", None),
        "nan": ("not_finite", None),
        "value inf": ("not_finite", None),
        "none": ("no_reward", None),
        "print": ("correct", 1.0),
        "fork": ("forbidden", None),
        "socket": ("forbidden", None),
        "start": ("forbidden", None),
        "write": ("forbidden", None),
        "exit": ("raised", None),
        "ask": ("raised", None),
        "die": ("crash", None),
        "eat": ("crash", None),
        "garbage": ("crash", None),
        "eval __import__('os').getpid() * 0 + 1": ("forbidden", None),
        "eval (lambda: 1)()": ("forbidden", None),
        "eval problem": ("forbidden", None),
        "value -0.0": ("wrong", 0.0),
        "eval 3 + 4 * 0 - 2": ("correct", 1.0),
    }

    with opened(name, range=(-1.0, 1.0)) as grader:
        assert dict(zip(told, graded(grader, *told), strict=True)) == told
        raised = [line for line in grader.told if "raised" in line]
        assert len(raised) == 1 and "Traceback" in raised[0] and "KeyError: 'c'" in raised[0]
        assert any("not allowed here: os.fork" in line for line in grader.told)
        assert not (folder / "left").exists()
        # What came to harm did not take the others with it, and the process goes on.
        assert graded(grader, "value 0.75", "value 1") == [("wrong", 0.75), ("correct", 1.0)]


@pytest.mark.parametrize("name", ["mine:score", "mine:scores"])
def test_a_call_that_hangs_is_killed_alone(folder, name):
    texts = [f"value 0.{n}" for n in range(1, 9)]
    texts[3:3], texts[6:6] = ["hang"], ["spin"]
    with opened(name, timeout_s=0.5) as grader:
        found = graded(grader, *texts)
    assert [reason for reason, _ in found].count("timeout") == 2
    assert found[3] == found[6] == ("timeout", None)
    assert [value for _, value in found if value] == [float(t[6:]) for t in texts if t[0] == "v"]


def test_the_answer_that_is_graded_ahead_is_not_scored_again(folder):
    with opened() as grader:
        grader.sources()
        for row in ask("calls", "value 0.5"):
            grader.start(row)
        assert graded(grader, "calls", "value 0.5") == [("correct", 1.0), ("wrong", 0.5)]
        assert graded(grader, "calls")[0] == ("correct", 3.0)


def test_correct_at_decides_what_is_right_and_the_value_stays(folder):
    with opened(correct_at=0.5) as grader:
        assert graded(grader, "value 0.5", "value 0.25") == [("correct", 0.5), ("wrong", 0.25)]
    with opened(correct_at=2.0) as grader:
        (one, two) = grader.grade_many(ask("value 1", "value 2"))
    assert (one.status, one.reward, two.status, two.reward) == ("wrong", 1.0, "correct", 2.0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:score", "No module named 'nowhere'"),
        ("mine:nothing", "has no attribute 'nothing'"),
        ("mine:one", r"expected score\(problem, completion\) or scores\(problems, completions\)"),
        ("mine:later", "coroutine: remove async"),
        ("mine:calls", "expected score"),
        ("reasoning-gym", "pip install reasoning-gym"),
        ("verifiers:x", "pip install verifiers"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_its_name(folder, name, said):
    if name.partition(":")[0].replace("-", "_") in ("reasoning_gym", "verifiers"):
        for package in ("reasoning_gym", "verifiers"):
            (folder / f"{package}.py").write_text("raise ImportError('not here')")
    with opened(name) as grader, pytest.raises(ValueError, match=said) as error:
        grader.grade_many(ask("value 1"))
    assert f"grade.function = {name!r} cannot be loaded" in str(error.value)
    assert str(folder) in str(error.value) and grader._workers == []


def test_a_name_is_looked_up_where_the_command_was_started_and_its_source_is_known(folder):
    (folder / "helper.py").write_text("VALUE = 1.0\n")
    (folder / "pack").mkdir()
    (folder / "pack/rules.py").write_text(
        "import helper\n\ndef score(problem, completion):\n    return helper.VALUE\n"
    )
    with opened("pack.rules:score") as grader:
        before = grader.sources()
        assert before.keys() == {"helper", "pack.rules"}
        (folder / "helper.py").write_text("VALUE = 0.0\n")
        with opened("pack.rules:score") as other:
            after = other.sources()
        assert before["helper"] != after["helper"] and before["pack.rules"] == after["pack.rules"]
        # A worker that starts later in the same run would grade by other rules.
        grader.close()
        with pytest.raises(ValueError, match="was changed while the run went on"):
            grader.grade_many(ask("value 1"))


def test_a_batch_of_another_length_is_no_verdict(folder):
    with opened("mine:short") as grader:
        found = grader.grade_many(ask("value 1", "value 0"))
    assert {grade.reason for grade in found} == {Reason.WRONG_TYPE}
    assert "expected a list of" in grader.told[0]


def test_a_function_that_does_not_decide_by_the_text_alone_is_said(folder, monkeypatch):
    (folder / "dice.py").write_text(
        "import itertools\ncount = itertools.count()\n"
        "def score(problem, completion):\n    return next(count) / 100\n"
    )
    monkeypatch.setattr(module, "CHECK_EVERY", 1)
    with opened("dice:score") as grader:
        grader.grade_many(ask("a"))
        grader.grade_many(ask("b"))
    (line,) = grader.told
    assert "the same text was given 0 and then 0.01" in line
    with opened("mine:half") as grader:
        grader.grade_many(ask("a"))
    assert grader.told == []


# --- the references ----------------------------------------------------------------------------


def problem(n: int, reference: str | None, answer: str = "") -> Problem:
    return Problem(
        id=str(n), problem="?", answer=answer, reference=reference, source=f"t:{n}", row=ROW
    )


def test_references_are_tried_first_and_what_they_lack_is_said(folder):
    with opened() as grader:
        (said,) = grader.tried([problem(1, "value 1"), problem(2, None, "value 1")])
        assert said.startswith("grade.function = 'mine:score' gives the reference of t:1 1: ")
        _, said = grader.tried([problem(1, "value 1"), problem(2, "value 0.5"), problem(3, "none")])
        assert "warning" in said and "2 of the first 3" in said and "t:2 0.5, t:3 no_reward" in said
        assert "not tried" in grader.tried([problem(1, None)])[0]
    with opened(timeout_s=0.3) as grader:
        _, said = grader.tried([problem(1, "value 1"), problem(2, "hang")])
        assert "t:2 timeout" in said
        with pytest.raises(ValueError, match="scores none of the first 1 references: 1 timeout"):
            grader.tried([problem(1, "hang")])
    with opened("mine:broken") as grader, pytest.raises(ValueError, match="2 raised"):
        grader.tried([problem(1, "a"), problem(2, "b")])
    assert "no such column" in grader.told[0]


def test_the_built_in_grader_has_nothing_to_say():
    with Grader() as grader:
        assert grader.tried([problem(1, "1")]) == [] and grader.sources() == {}
        assert not grader.gives_away(problem(1, "1"), r"\boxed{1}")
        assert grader._workers == []


def test_a_step_that_scores_by_itself_is_a_leak(folder):
    from intfast import intervene
    from intfast.config import PromptConfig
    from intfast.prompts import CompactStyle
    from intfast.sample import Sampler

    style = CompactStyle(PromptConfig(style="compact", separator=" ;"), TOKENIZER)
    found = {"intervention_ids": [1], "prefix_ids": [1]}
    attempt = Attempt(
        problem_id="1",
        sample=0,
        prompt_ids=[1],
        token_ids=[1],
        text="a",
        finish_reason="stop",
        grade="wrong",
        reason="wrong",
        policy_version=0,
    )
    config = cli.load(None, ["data.train=x", "intervene.continuation={max_new_tokens=9}"]).intervene
    with opened() as grader:
        sampler = Sampler(Script([]), TOKENIZER, style, grader, 100)
        for content, gate in (("value 1", "leak"), ("value 0.5", "passed")):
            row = found | {"content": content}
            assert intervene._gate(sampler, problem(1, "r"), attempt, row, config) == gate
        off = msgspec.structs.replace(config, leak_gate=False)
        row = found | {"content": "value 1"}
        assert intervene._gate(sampler, problem(1, "r"), attempt, row, off) == "passed"


# --- rewards -----------------------------------------------------------------------------------


def test_what_is_not_a_reward_of_its_own_is_not_written():
    plain = Grade(status=Status.CORRECT, reason=Reason.CORRECT)
    assert msgspec.json.encode(plain) == b'{"status":"correct","reason":"correct"}'
    record = Attempt(
        problem_id="1",
        sample=0,
        prompt_ids=[],
        token_ids=[],
        text="",
        finish_reason="stop",
        policy_version=0,
        **plain.recorded,
    )
    assert b"reward" not in msgspec.json.encode(record)
    own = msgspec.structs.replace(plain, reward=0.7)
    written = msgspec.json.encode(msgspec.structs.replace(record, **own.recorded))
    assert written.endswith(b',"reward":0.7}')
    assert msgspec.json.decode(written, type=Attempt).reward == 0.7
    found = [problem(1, "r"), msgspec.structs.replace(problem(1, "r"), row=msgspec.UNSET)]
    assert [b'"row"' in msgspec.json.encode(p) for p in found] == [True, False]
    assert data.fingerprint(found[:1]) != data.fingerprint(found[1:])


def test_evaluation_has_accuracy_and_mean_reward_and_of_zeros_and_ones_only_the_first():
    def counted(rewards, status):
        return count_samples("p", status, status, ["stop"] * 3, [1] * 3, rewards)

    status = ["correct", "wrong", "unscored"]
    plain = counted([1.0, 0.0, None], status)
    assert b'"reward"' not in msgspec.json.encode(plain)
    own = counted([0.9, 0.3, None], status)
    assert own.reward == pytest.approx(0.6)
    both = Evaluation(name="e", seed=0, problems=[plain, own]).summary([])
    assert both.accuracy.value == 0.5 and both.reward.value == pytest.approx(0.55)
    assert not Evaluation(name="e", seed=0, problems=[plain]).summary([]).reward
    # Equal sums: 0.5 and 0.5 of one right and one wrong.
    assert counted([0.5, 0.5, None], status).reward is msgspec.UNSET


@pytest.mark.parametrize("scale", ["none", "group", "group-population"])
@pytest.mark.parametrize(
    "rewards",
    [[1 + k * 1e-9 for k in (0, 1, 2, 5)], [1e6, 1e6 + 1e-3, 1e6 - 1e-3], [0.1, 0.1 + 1e-8]],
)
def test_rewards_that_nearly_agree_keep_what_they_differ_by(rewards, scale):
    config = CreditConfig(scale=scale)
    ((*found,),) = credit.group_advantages([rewards], config).advantages_P_G
    mean = math.fsum(rewards) / len(rewards)
    squares = math.fsum((r - mean) ** 2 for r in rewards)
    divisor = {
        "none": 1.0,
        "group": math.sqrt(squares / (len(rewards) - 1)) + credit.EPS,
        "group-population": math.sqrt(squares / len(rewards)) + credit.EPS,
    }[scale]
    expected = [(r - mean) / divisor for r in rewards]
    most = max(map(abs, expected))
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-6 * most


def test_groups_of_zeros_and_ones_are_what_they_were():
    groups = [[1.0, 0.0, 0.0], [1.0, 1.0, None], [0.0, None, 0.0], [None, None, None]]
    found = credit.group_advantages(groups, CreditConfig())
    assert found.advantages_P_G[0] == [0.6666666865348816, -0.3333333432674408, -0.3333333432674408]
    counts = (found.num_active, found.num_all_right, found.num_all_wrong, found.num_unscored_groups)
    assert counts == (1, 1, 1, 1)


# --- rows --------------------------------------------------------------------------------------


def test_a_row_needs_no_answer_where_a_function_scores_it_and_keeps_all_its_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a?", "n": 0.1, "big": 12345678901234567890, "x": {"y": [1]}}\n')
    (found,), report = data.load_problems(str(path), keeps_rows=True)
    assert json.loads(found.row) == {
        "question": "a?",
        "n": 0.1,
        "big": 12345678901234567890,
        "x": {"y": [1]},
    }
    assert (found.answer, report.columns["answer"]) == ("", "none")
    with pytest.raises(ValueError, match="no column for the answer"):
        data.load_problems(str(path))


def test_settings_that_a_function_does_not_read_are_refused(folder):
    def faults(*words):
        with pytest.raises(ValueError) as error:
            cli.load(None, ["data.train=x", *words])
        return str(error.value)

    assert "grade.range: expected its default None" in faults("grade.range=[0.0, 1.0]")
    assert "grade.mode: expected" in faults("grade.function=a:b", "grade.mode=stated")
    assert "grade.function: expected a name" in faults("grade.function=a/b.py")
    assert "low < high" in faults("grade.function=a:b", "grade.range=[1.0, 0.0]")
    config = cli.load(None, ["data.train=x", "grade.function=a.b:c.d", "grade.range=[0.0, 2.0]"])
    assert cli.load(None, ["data.train=x"]).grade.function == ""
    path = folder / "c.toml"
    path.write_text(cli.to_toml(config))
    assert cli.load(path) == config


# --- whole runs --------------------------------------------------------------------------------

SHARES = """
def score(problem, completion):
    words = completion.split()
    return sum(word in problem["problem"].split() for word in words) / max(1, len(words))
"""


def test_a_run_learns_from_real_rewards_and_its_evaluation_has_both(folder, capsys):
    (folder / "shares.py").write_text(SHARES)
    inputs = write_inputs(folder)
    (folder / "c.toml").write_text("")
    line = ["c.toml", *words(inputs, folder / "run", 12), "grade.function=shares:score"]
    line = [word for word in line if not word.startswith("grade.mode")]
    line += ["grade.correct_at=0.5", "rl.steps=2", "rl.problems_per_step=2", "rl.group_size=4"]
    line += ["evaluate.samples=2", "analysis.texts=0", "attempts.unsolved_only=true"]
    assert train([*line, "--dry-run"]) == 0
    assert "grade.function = 'shares:score' gives the reference of train.jsonl:1" in (
        capsys.readouterr().out
    )
    assert train(line) == 0
    said = capsys.readouterr().out
    assert "mean reward 0." in said and "mean reward" in said.partition("Held-out problems")[2]
    steps = [json.loads(text) for text in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [step["reward"] for step in steps if "zero_advantage" in step]
    assert len(rewards) == 2 and all(0 < reward < 1 for reward in rewards)
    rows = (folder / "run/attempts.jsonl").read_text().splitlines()
    own = [json.loads(row) for row in rows if '"reward"' in row]
    assert own and all((row["grade"] == "correct") == (row["reward"] >= 0.5) for row in own)
    stored = json.loads((folder / "run/evaluations.json").read_text())
    assert all(any("reward" in p for p in found["problems"]) for found in stored.values())
    assert "row" in json.loads((folder / "run/problems.jsonl").read_text().splitlines()[0])
    # Graded again the name has to be said: whose folder is it?
    attempts = str(folder / "run/attempts.jsonl")
    assert regrade.main([attempts]) == 2
    assert "add --function shares:score" in capsys.readouterr().err
    assert regrade.main([attempts, "--function", "shares:score"]) == 0
    assert "0 rows with another verdict" in capsys.readouterr().out
    (folder / "run/continuations.jsonl").touch()
    with pytest.raises(ValueError, match=r"add grade\.function=shares:score"):
        ablate.ablate(folder / "run", [])
    # The same folder with another function is refused, by what has changed.
    (folder / "shares.py").write_text(SHARES + "\n")
    assert train(line) == 2
    assert "code shares: was" in capsys.readouterr().err
