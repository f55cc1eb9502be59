"""What does not fit is counted and dropped, never cut; ids and gold answers over a whole run."""

import json
from pathlib import Path

import msgspec
import pytest
from small_run import Quiet

from benchmarks.quickstart_task import task
from intfast import cli, collect, intake, plan
from intfast.config import AttemptConfig, BatchConfig, Config, RlConfig, SamplingConfig, SftConfig
from intfast.grading.grader import Grader
from intfast.prompts import decode
from intfast.records import Example, Problem
from intfast.run import open_run
from intfast.sample import Sampler
from intfast.state import metrics as state_metrics
from intfast.state.metrics import Metrics, Row
from intfast.state.runfolder import RunFolder
from intfast.study import browser, page_data, regrade
from intfast.study.read import read_problems
from intfast.train import main as train_main

ROOT = Path(__file__).parents[1]

PROBLEMS = [Problem(id=str(n), problem="x " * n, answer="1", source=f"t:{n}") for n in (5, 50, 90)]
SAMPLING = SamplingConfig(max_new_tokens=20)


def prompt_of(problem: Problem) -> list[int]:
    return [0] * len(problem.problem.split())


def ids(problems) -> list[str]:
    return [problem.id for problem in problems]


@pytest.mark.parametrize(("context", "kept"), [(110, 3), (109, 2), (70, 2), (69, 1)])
def test_a_prompt_must_leave_room_to_answer(context, kept):
    problems, said = intake.fitting_problems(PROBLEMS, prompt_of, context, [SAMPLING])
    assert problems == PROBLEMS[:kept]
    assert bool(said) == (kept < 3)
    if said:
        assert f"dropped {3 - kept} of 3 problems" in said and "up to 90 tokens" in said
        assert said.endswith("t:90" if kept == 2 else "t:50, 90")


def test_a_rollout_must_fit_the_training_batch():
    for budget, kept in ((110, 3), (109, 2)):
        found, _ = intake.fitting_problems(PROBLEMS, prompt_of, 1000, [SAMPLING], budget)
        assert len(found) == kept


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"dropped 3 of 3 problems .*lower max_new_tokens"):
        intake.fitting_problems(PROBLEMS, prompt_of, 10, [SAMPLING])
    assert intake.fitting_problems([], prompt_of, 10, [SAMPLING]) == ([], "")


def test_only_the_stages_of_the_run_decide():
    small, large = SAMPLING, SamplingConfig(max_new_tokens=60)
    config = Config(
        attempts=AttemptConfig(sampling=small),
        rl=RlConfig(sampling=large),
        batch=BatchConfig(max_tokens=100),
    )

    def kept(**changes) -> list[str]:
        changed = msgspec.structs.replace(config, **changes)
        return ids(intake.fitting_train(PROBLEMS, prompt_of, 120, changed)[0])

    assert kept() == ["5"]
    assert kept(batch=BatchConfig(max_tokens=100, too_long="alone")) == ["5", "50"]
    assert kept(rl=msgspec.structs.replace(config.rl, steps=0)) == ["5", "50", "90"]
    assert kept(sft=SftConfig(epochs=0), batch=BatchConfig(max_tokens=110)) == ["5", "50"]


def test_sequences_above_the_budget_are_counted_and_not_cut():
    examples = [Example(token_ids=[1] * n, weights=[1.0] * n) for n in (3, 9, 10)]
    found = intake.Fitting(examples, BatchConfig(max_tokens=9))
    assert list(found) == examples[:2] and "dropped 1 of 3" in found.said
    for batch in (BatchConfig(max_tokens=1, too_long="alone"), BatchConfig(max_tokens=10)):
        found = intake.Fitting(examples, batch)
        assert (list(found), found.said) == (examples, "")


# --- ids and gold answers over a whole run -----------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, train: Path, test: Path | None, *more: str) -> Config:
    words = [f"run={folder}", f"data.train={train}", *([f"data.test={test}"] if test else [])]
    return cli.load(ROOT / "configs/quickstart_short.toml", [*words, *more])


SHORT = ["attempts.samples=2", "attempts.max_problems=2", "intervene.continuations=4"]
SHORT += ["rl.steps=0", "rl.from_base=false", "analysis.texts=0", "evaluate.ks=[1]"]
SHORT += ["evaluate.samples=1", "evaluate.sampling={temperature=0.0}", "analysis.held_out=0.0"]


def test_files_that_number_their_rows_alike_are_asked_their_own_problems(tmp_path, capsys):
    """In prompts, evaluation, regrading, report and resume."""
    rows = task.problem_rows(0, "train", 6)
    easy = task.problem_rows(0, "easy", 6)
    number = [row | {"id": n} for n, row in enumerate(rows)]
    train = write_rows(tmp_path / "train.jsonl", number)
    own = write_rows(tmp_path / "own.jsonl", easy)
    same = write_rows(tmp_path / "same.jsonl", [row | {"id": n} for n, row in enumerate(easy)])
    evaluations, folders = [], []
    for test in (own, same):
        folders.append(tmp_path / f"run_{test.stem}")
        config = settings(folders[-1], train, test, *SHORT)
        with open_run(config, Quiet()) as run:
            for problem in run.problems + run.tests:
                assert problem.problem in decode(run.sampler.tokenizer, run.sampler.prompt(problem))
            assert [p.id for p in run.problems] == [str(n) for n in range(6)]
            ids = [p.id for p in run.problems + run.tests]
            assert len(set(ids)) == 12
            evaluations.append(collect.evaluation(run, "base"))
            gathered = collect.gather(run, [config])
    # The very same answers, whatever the ids: the base model solves most of these problems.
    counts = [[(p.correct, p.mean_tokens) for p in e.problems] for e in evaluations]
    assert counts[0] == counts[1] and sum(correct for correct, _ in counts[0]) >= 4
    assert [p.problem_id for p in evaluations[1].problems] == ids[6:]
    folder = folders[1]
    with Grader("tail:ans") as grader:
        assert "0 rows with another verdict" in regrade.report(folder / "attempts.jsonl", grader)
    assert gathered.interventions
    shown = browser.browse(page_data.RunData(folder, "run"))["problems"]
    texts = {p.id: [p.problem, p.answer, p.reference or ""] for p in run.problems}
    assert shown and shown.items() <= texts.items()
    # The same command goes on with the same problems and draws nothing again.
    console = Quiet()
    before = (folder / "attempts.jsonl").read_bytes()
    with open_run(config, console) as run:
        assert [p.id for p in run.problems + run.tests] == ids
        assert list(collect.gather(run, [config]).attempts) == list(gathered.attempts)
        assert collect.evaluation(run, "base") == evaluations[1]
    assert (folder / "attempts.jsonl").read_bytes() == before
    said = "\n".join(console.lines)
    assert "6 test ids are also ids of training problems and got a content hash" in said


def test_problems_with_one_id_are_not_looked_up(tmp_path):
    """Runs of before ids were unique over files."""
    problems = [Problem(id="0", problem=text, answer=text) for text in ("1", "2")]
    path = write_rows(tmp_path / "problems.jsonl", map(msgspec.to_builtins, problems))
    with pytest.raises(ValueError, match=r"problems\.jsonl:2: id '0' names another problem"):
        read_problems(path)
    attempts = write_rows(tmp_path / "attempts.jsonl", [{"problem_id": "0", "text": "2"}])
    with Grader() as grader, pytest.raises(ValueError, match="id '0' names another problem"):
        regrade.report(attempts, grader)


def test_prompts_are_told_apart_where_ids_are_not():
    class Style:
        def solve(self, problem):
            return [ord(problem.problem)]

    sampler = Sampler(None, None, Style(), None, 9)
    first, second = (Problem(id="0", problem=text, answer="1") for text in "ab")
    assert [sampler.prompt(p) for p in (first, second, first)] == [[97], [98], [97]]


def test_faults_of_both_files_and_their_settings_are_in_one_report(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"problem": "a", "answer": []}])
    test = write_rows(tmp_path / "test.jsonl", [{"problem": "a"}])
    with pytest.raises(ValueError) as caught:
        intake.load(settings(tmp_path / "run", train, test), Quiet())
    message = str(caught.value)
    assert f"data.train: {train} has 1 fault" in message and "train.jsonl:1: column" in message
    assert f"data.test: {test} cannot be read as problems" in message


def test_test_problems_that_are_trained_on_are_refused_by_row(tmp_path):
    rows = [{"problem": "Find $x$ in 3 Mg", "answer": "1"}, {"problem": "b", "answer": "2"}]
    train = write_rows(tmp_path / "train.jsonl", rows)
    copy = write_rows(tmp_path / "copy.jsonl", rows[::-1])
    config = settings(
        tmp_path / "run", train, copy, "sft.epochs=0", "rl.problems=selected", "rl.from_base=false"
    )
    with pytest.raises(
        ValueError, match=r"also training problems; .*: copy\.jsonl:1 \(training train"
    ):
        intake.load(config, Quiet())
    with pytest.raises(ValueError, match=r"copy\.jsonl:1 \(training train\.jsonl:2\), copy\.j"):
        intake.load(config, Quiet())
    # What looks alike is another problem; where its answer is the same too, it is said.
    write_rows(
        copy, [{"problem": "Find $x$ in 3 mg", "answer": "1"}, {"problem": "B", "answer": "3"}]
    )
    console = Quiet()
    assert len(intake.load(config, console)[1]) == 2
    said = "\n".join(console.lines)
    assert (
        "letter case, spaces or Unicode forms alone: copy.jsonl:1 (training train.jsonl:1)" in said
    )
    assert "copy.jsonl:2 (" not in said


class Counting(Grader):
    """A grader that counts the gold answers that it was asked for."""

    asked = 0

    def check_golds(self, golds):
        self.asked += len(golds)
        return super().check_golds(golds)


def checked(folder: RunFolder, golds: list[str], **options) -> tuple[dict[str, bool], int, Quiet]:
    console = Quiet()
    metrics = Metrics(folder.journal("metrics", Row), console)
    problems = [Problem(id=str(n), problem="p", answer=gold) for n, gold in enumerate(golds)]
    with Counting(workers=1, **options) as grader:
        found = intake.check_golds(problems, grader, folder, metrics)
        return found, grader.asked, console


def test_gold_answers_are_checked_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "CHUNK_GOLDS", 2)
    monkeypatch.setattr(state_metrics, "PLAIN_EVERY_S", 0.0)
    golds = ["1", r"\frac{2\pi}{9}", r"\frac{", r"\frac{2\pi}{9}", "see figure"]
    right = {"1": True, r"\frac{2\pi}{9}": True, r"\frac{": False, "see figure": False}
    with RunFolder(cli.load(None, [f"run={tmp_path}", "data.train=x"])) as folder:
        found, asked, console = checked(folder, golds)
        assert found == right and asked == 4
        assert [line.split(", ")[0] for line in console.lines] == [
            "gold answers checked once: 2/4",
            "gold answers checked once: 4/4",
        ]
        assert checked(folder, golds)[:2] == (right, 0)
        found, asked, _ = checked(folder, [*golds, "2", "3"])
        assert found == right | {"2": True, "3": True} and asked == 2
        # Another grader decides anew: other settings, other code, other packages.
        assert checked(folder, golds, timeout_s=9.0)[1] == 4
        assert checked(folder, golds, mode="stated")[1] == 4
        monkeypatch.setattr(intake.metadata, "version", lambda name: "9.9")
        assert checked(folder, golds, mode="stated")[1] == 4
        (tmp_path / "golds.json").write_text('{"golds": []}')
        with pytest.raises(ValueError, match=r"golds\.json: .*; delete it to check the answers"):
            checked(folder, golds)


def test_a_stop_while_golds_are_checked_keeps_what_was_decided(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "CHUNK_GOLDS", 1)
    with RunFolder(cli.load(None, [f"run={tmp_path}", "data.train=x"])) as folder:
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            once = Counting.check_golds

            def stops(self, golds):
                if self.asked:
                    raise KeyboardInterrupt
                return once(self, golds)

            patch.setattr(Counting, "check_golds", stops)
            checked(folder, ["1", "2", "3"])
        assert checked(folder, ["1", "2", "3"])[:2] == ({"1": True, "2": True, "3": True}, 2)


def test_a_dry_run_names_what_is_dropped_and_why(tmp_path, capsys, monkeypatch):
    rows = [
        {"problem": "a", "answer": "4 + 4 = 8 #### 8"},
        {"problem": "b", "answer": "He has 9 in total."},
        {"problem": "c", "answer": r"So \boxed{\frac{}"},
        {"problem": "d", "answer": "#### see figure"},
        {"problem": "e", "answer": r"#### \frac{"},
        {"problem": "f", "answer": "2 + 5 = 7 #### 7"},
    ]
    train = write_rows(tmp_path / "train.jsonl", rows)
    words = [f"data.train={train}", "data.test=absent", "grade.mode=boxed", f"run={tmp_path / 'r'}"]
    words += ["prompt.style=compact", "sft.epochs=0", "rl.problems=selected", "rl.from_base=false"]
    line = [str(ROOT / "configs/quickstart_short.toml"), *words, "--dry-run"]
    assert train_main(line) == 0
    printed = capsys.readouterr().out
    assert "dropped 2: no #### and no box, where others have: train.jsonl:2-3\n" in printed
    assert "dropped 1: no answer but a word for none: train.jsonl:4\n" in printed
    assert r"dropped 1 of 3 problems: ungradable answers: train.jsonl:5 ('\\frac{')" in printed
    monkeypatch.setattr(plan, "MAX_GOLDS", 1)
    assert train_main(line) == 0
    assert "1 of 3 gold answers were checked; the run checks the others" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_limits_that_the_context_does_not_reach_are_said():
    config = cli.load(None, ["data.train=x", "sampling.max_new_tokens=100"])
    said = []
    intake.fitting(PROBLEMS, [], prompt_of, 201, config, said.append)
    assert said == []
    config = cli.load(
        None,
        ["data.train=x", "sampling.max_new_tokens=100", "attempts.sampling.max_new_tokens=5000"],
    )
    intake.fitting(PROBLEMS, [], prompt_of, 2048, config, said.append)
    (sentence,) = said
    assert sentence.startswith("answers are bounded by the context of 2,048 tokens")
    assert "attempts.sampling.max_new_tokens = 5,000: lower" in sentence
    assert "intervene" not in sentence
