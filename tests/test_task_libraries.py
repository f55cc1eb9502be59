"""Problems and rewards of the real libraries: tests/task-libraries.txt says how to get them."""

from __future__ import annotations

import json
import re
from importlib import util
from pathlib import Path

import pytest
from byte_model import settings, write_model

from intfast import adapters, credit, data
from intfast.config import GradeConfig
from intfast.grading.function import grader_of
from intfast.grading.grader import Submission
from intfast.train import main as train

missing = [name for name in ("reasoning_gym", "trl", "verifiers") if util.find_spec(name) is None]
pytestmark = [
    pytest.mark.tasks,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]
README = (Path(__file__).parents[1] / "intfast/grading/README.md").read_text()
# Their scorers compare tuples, which JSON does not have: the run says so at its start.
NOT_THROUGH_JSON = {"arc_agi", "rearc"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    return tmp_path


def rewards(name: str, rows: list[dict], texts: list[str], **changes) -> list:
    """What grade.function = name gives, in workers; and what it was told of the first fault."""
    config = GradeConfig(function=name, workers=1, timeout_s=60.0, **changes)
    asked = [
        Submission("", text, row=json.dumps(row, default=data._plain))
        for row, text in zip(rows, texts, strict=True)
    ]
    with grader_of(config) as grader:
        told = []
        grader.say = told.append
        grades = grader.grade_many(asked)
    return [(credit.reward(grade), grade.reason.value) for grade in grades], told


# --- reasoning-gym -----------------------------------------------------------------------------


def test_every_task_scores_its_own_answer_as_the_library_does():
    from reasoning_gym.factory import DATASETS

    score, takes_lists = adapters.scorer("reasoning-gym", lambda text: None)
    assert not takes_lists
    differ, right = set(), 0
    for name in sorted(DATASETS.keys() - {"composite"}):
        _, rows = adapters.rows(f"reasoning-gym:{name}:size=1,seed=3", "train")
        ((where, row),) = rows
        assert where == f"{name}:1"
        entry = json.loads(json.dumps(row, default=data._plain))
        if not row["answer"]:
            continue
        expected = DATASETS[name][0](DATASETS[name][1]()).score_answer(row["answer"], row)
        found = score(entry, f"So it is\n<answer>\n{row['answer']}\n</answer>.")
        if found != expected:
            differ.add(name)
        right += found == 1
    assert differ <= NOT_THROUGH_JSON and right > 80, (differ, right)


def test_settings_of_a_task_reach_it_and_wrong_ones_are_named():
    note, rows = adapters.rows("reasoning-gym:lcm:size=2,seed=5,min_value=40,max_value=50", "test")
    assert "'max_value': 50" in note and note.startswith("2 made")
    numbers = [n for _, row in rows for n in row["metadata"]["numbers"]]
    assert len(numbers) >= 4 and all(40 <= n <= 50 for n in numbers)
    seeds = [adapters.rows("reasoning-gym:lcm:size=1", p)[0] for p in ("train", "test")]
    assert "'seed': 0" in seeds[0] and "'seed': 1" in seeds[1]
    for source, said in (
        ("reasoning-gym:nowhere", "not registered"),
        ("reasoning-gym:lcm:sizes=3", "sizes"),
        ("reasoning-gym:lcm:size", "key=value"),
        ("reasoning-gym:lcm:size=0,min_numbers=-1", "lcm"),
    ):
        with pytest.raises(ValueError, match=said):
            list(adapters.rows(source, "train")[1])


def test_a_task_that_evaluates_answers_evaluates_numbers_and_nothing_else():
    ((_, row),) = adapters.rows("reasoning-gym:countdown:size=1,seed=1", "train")[1]
    texts = [row["metadata"]["expression"], "__import__('os').getpid()", "(lambda: 1)()"]
    found, _ = rewards("reasoning-gym", [row] * 3, [f"<answer>{t}</answer>" for t in texts])
    assert found[0] == (1.0, "correct")
    # The library's own guards may refuse a text before it is evaluated: then it is merely wrong.
    assert all(reason in ("forbidden", "wrong") and value != 1 for value, reason in found[1:])
    ((_, row),) = adapters.rows("reasoning-gym:n_queens:size=1,seed=1", "train")[1]
    attack = "__import__('os').getpid()"
    (hostile,), _ = rewards("reasoning-gym", [row], [f"<answer>[[{attack}]]</answer>"])
    assert hostile[1] in ("forbidden", "wrong") and hostile[0] != 1


def test_a_task_without_derivations_trains_and_says_what_interventions_need(folder, capsys):
    words = [
        "config.toml",
        *settings(folder / "model", folder / "run"),
        "data.train=reasoning-gym:chain_sum:size=12",
        "data.test=reasoning-gym:chain_sum:size=4",
        "grade.function=reasoning-gym",
        "prompt.domain=general",
    ]
    Path("config.toml").write_text("")
    assert train(words) == 2
    assert "no problem has a reference solution" in capsys.readouterr().err
    assert train([*words, "sft.epochs=0", "rl.problems=selected"]) == 0
    said = capsys.readouterr().out
    assert "gives the reference of chain_sum:1 1:" in said
    assert "evaluation of" in said and (folder / "run/report.html").is_file()
    stored = json.loads((folder / "run/manifest.json").read_text())
    assert stored["code"] == {"reasoning-gym": "0.1.25"}
    assert train([*words, "sft.epochs=0", "rl.problems=selected"]) == 0


def test_a_task_with_derivations_is_verified_and_its_page_counts_the_gates(folder, capsys):
    """A random model writes no verdict: the run says in one sentence why nothing was kept."""
    Path("config.toml").write_text("")
    words = [
        "config.toml",
        *settings(folder / "model", folder / "run"),
        "data.train=reasoning-gym:string_manipulation:size=4,max_string_length=8",
        "grade.function=reasoning-gym",
        "prompt.domain=general",
        r"prompt.separator=re:\n+",
        "attempts.samples=2",
        "attempts.wrong_per_problem=1",
        "intervene.samples=1",
        "sft.epochs=1",
    ]
    assert train([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"gives the reference of string_manipulation:\d 1: .*<answer>", said)
    assert train(words) == 2
    told = capsys.readouterr()
    assert "interventions: 4 unparsed" in told.out
    assert "no intervention" in told.err or "nothing" in told.err, told.err
    assert "unparsed" in (folder / "run/report.html").read_text()


def test_the_worked_example_of_the_readme(folder, capsys):
    """Its files and its commands, with a model of a few thousand parameters."""
    ((_, code), (_, config)) = re.findall(r"```(python|toml)\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 20
    Path("knights.py").write_text(code)
    Path("knights.toml").write_text(config)
    tiny = settings(folder / "model", folder / "runs/knights")
    tiny += ["data.train_limit=6", "data.test_limit=3"]
    assert train(["knights.toml", *tiny, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "gives the reference of knights_knaves:1 1: ..." in said
    assert train(["knights.toml", *tiny]) == 0
    assert "evaluation of" in capsys.readouterr().out
    stored = json.loads((folder / "runs/knights/manifest.json").read_text())
    assert stored["code"].keys() == {"knights"}
    # Another function is another run.
    Path("knights.py").write_text(code + "\n# changed\n")
    assert train(["knights.toml", *tiny]) == 2
    assert "code knights: was" in capsys.readouterr().err


# --- TRL ---------------------------------------------------------------------------------------


def test_reward_functions_of_trl_in_one_line(folder):
    from trl.rewards import think_format_reward

    rows = [{"prompt": [{"role": "user", "content": "?"}], "target": n} for n in (3, 4, 5)]
    texts = ["<think>\na\n</think>\nb", "a", "<think>a</think> <think>b"]
    expected = think_format_reward([[{"content": text}] for text in texts])
    found, _ = rewards("trl:trl.rewards:think_format_reward", rows, texts)
    assert [value for value, _ in found] == expected and set(expected) == {0.0, 1.0}
    Path("mine.py").write_text(
        "def reward(prompts, completions, target, **kwargs):\n"
        "    assert kwargs['trainer_state'] is None and prompts[0][0]['role'] == 'user'\n"
        "    texts = [c[0]['content'] for c in completions]\n"
        "    return [None if t == '?' else len(t) / n for t, n in zip(texts, target)]\n"
        "def plain(prompts, completions):\n"
        "    return [float(p == c) for p, c in zip(prompts, completions)]\n"
    )
    found, told = rewards("trl:mine:reward", rows, ["abc", "?", "a"])
    assert told == []
    assert found == [(1.0, "correct"), (None, "no_reward"), (0.2, "wrong")]
    found, _ = rewards("trl:mine:plain", [{"prompt": "a"}, {"prompt": "b"}], ["a", "a"])
    assert [value for value, _ in found] == [1.0, 0.0]


# --- verifiers ---------------------------------------------------------------------------------

ENVIRONMENT = """
import verifiers as vf
from datasets import Dataset

def exact(completion, answer, **kwargs):
    return float(completion[-1]["content"].strip() == answer)

async def short(completion, info):
    if completion[-1]["content"] == "raise":
        raise KeyError("of short")
    return 1.0 if len(completion[-1]["content"]) < info["most"] else 0.0

def load_environment(num=3):
    info = {"most": 5}
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "info": info} for n in range(num)]
    rubric = vf.Rubric(funcs=[exact, short], weights=[0.75, 0.25])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), system_prompt="Add.", rubric=rubric)
"""


def test_a_single_turn_environment_of_verifiers(folder):
    Path("sums.py").write_text(ENVIRONMENT)
    import sys

    sys.path.insert(0, str(folder))
    try:
        problems, report = data.load_problems("verifiers:sums:num=4", keeps_rows=True)
    finally:
        sys.path.remove(str(folder))
    assert len(problems) == 4 and report.note == "4 rows"
    assert problems[0].problem == "Add.\n\n0 + 1?" and problems[0].answer == "1"
    rows = [json.loads(problem.row) for problem in problems]
    texts = ["1", "no", "2 and more", "raise"]
    found, told = rewards("verifiers:sums", rows, texts)
    assert found == [(1.0, "correct"), (0.25, "wrong"), (0.0, "wrong"), (None, "raised")]
    assert "of short" in told[0]
    Path("many.py").write_text(ENVIRONMENT.replace("SingleTurnEnv(", "MultiTurnEnv("))
    with pytest.raises(ValueError, match="cannot be loaded"):
        rewards("verifiers:many", rows[:1], ["1"])
