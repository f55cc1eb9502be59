"""The comparison: arms as settings, shared collection, tokens, pairing, and the table."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from report_run import Seen
from small_run import Quiet

from intfast import cli, collect
from intfast.evaluate import Evaluation, count_samples
from intfast.sample import _Drawn
from intfast.study import arms, compare, compare_table, finish, report
from intfast.study.paired import bootstrap_seeds

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "quickstart_short.toml")
WORDS = [
    f"model.path={ROOT / 'configs/quickstart/base'}",
    f"data.train={ROOT / 'configs/quickstart/train.jsonl'}",
    f"data.test={ROOT / 'configs/quickstart/test.jsonl'}",
    "data.train_limit=6",
    "data.test_limit=4",
    "attempts.samples=2",
    "intervene.continuations=2",
    "intervene.wave=2",
    "sft.epochs=1",
    "rl.steps=1",
    "rl.problems_per_step=2",
    "rl.group_size=2",
    "grade.workers=1",
    "evaluate.samples=2",
    "evaluate.ks=[1,2]",
]
NAMES = ["base", "rl", "rft", "int", "int_rl"]


def plan_of(folder: Path, *words: str) -> compare.Plan:
    return compare.read_plan([CONFIG, *WORDS, f"run={folder}", *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One comparison of a few arms with two seeds: its plan and compare.json."""
    folder = tmp_path_factory.mktemp("compare") / "all"
    plan = plan_of(folder, f"arms={','.join(NAMES)}", "seeds=0,1")
    return plan, compare.run(plan, Quiet())


def read(path: Path):
    return json.loads(path.read_text())


# --- arms --------------------------------------------------------------------------------------


def test_every_arm_is_a_config_that_passes_its_checks():
    base = cli.load(CONFIG, WORDS)
    seen = set()
    for name, arm in arms.ARMS.items():
        if name.startswith("bare_prefix"):
            # In the compact style, what the arm prefix runs.
            with pytest.raises(ValueError, match='the same as "prefix"'):
                cli.load(CONFIG, [*WORDS, *arm.settings])
            continue
        config = cli.load(CONFIG, [*WORDS, *arm.settings])
        key = str(cli.differences(config, base))
        assert key not in seen, f"{name} runs what another arm runs"
        seen.add(key)
        assert bool(config.rl.steps) == (name.endswith("rl") or name == "base")


def test_rows_before_and_after_rl_share_a_run_and_ours_comes_first():
    names = arms.check(["reference", "int", "reference_rl", "int_rl", "base", "star"])
    assert names == ["base", "reference", "reference_rl", "star", "int", "int_rl"]
    assert arms.runs(names) == ["int_rl", "reference_rl", "star"]
    assert arms.run_of("int", names) == "int_rl" and arms.run_of("int", ["int"]) == "int"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arms=rl,no_such"], "no arm no_such; arms are base, rl"),
        (["arms="], "names no arm"),
        (["seeds=1,x"], "seeds= expects"),
        (["equal_tokens=maybe"], "true or false"),
        (["rl.steps=0", "rl.from_base=false"], "arms rl, hint_rl"),
        (["sft.epochs=0", "rl.from_base=false"], "arms reference, reference_rl"),
        (["rl.stesp=3"], "did you mean rl.steps?"),
        (["rl.problems=unlocked"], "set rl.problems=selected"),
        (["equal_tokens=true", "arms=rl"], "equal_tokens=true needs int_rl"),
        (["equal_tokens=true", "rl.optim.schedule=linear"], "rl.optim.schedule = constant"),
        (["arms=rl,int_rl", "rl:rl.optim.schedule=cosine"], "arm rl: "),
    ],
)
def test_bad_words_stop_before_any_work(tmp_path, capsys, words, message):
    assert compare.main([CONFIG, *WORDS, f"run={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_references_are_named(tmp_path, capsys):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"problem": "a 1 ; ? a :", "answer": "a 1"}\n')
    words = [*WORDS, f"run={tmp_path / 'run'}", f"data.train={bare}", "arms=hint_rl"]
    assert compare.main([CONFIG, *words]) == 2
    assert "no problem has a reference solution" in capsys.readouterr().err


def test_a_dry_run_prints_arms_and_bounds_and_writes_nothing(tmp_path, capsys):
    words = [*WORDS, f"run={tmp_path / 'run'}", "arms=rl,int_rl", "seeds=0,1", "--dry-run"]
    assert compare.main([CONFIG, *words]) == 0
    shown = capsys.readouterr().out
    # 6 problems x 2 attempts x 150 tokens, and 1 step of 2 x 2 rollouts.
    assert "rl (rows: rl)" in shown and "(attempts 1,800, rollouts 600)" in shown
    assert "sft.epochs = 0 (was 2)" not in shown and "sft.epochs = 0 (was 1)" in shown
    assert "2 runs x 2 seeds" in shown
    # All arms read the same two files.
    assert shown.count("fingerprint") == 2
    assert not (tmp_path / "run").exists()


def test_methods_of_rl_are_arms_of_one_table(tmp_path, capsys):
    names = "rl,vppo_rl,capo_rl,int_rl"
    words = [*WORDS, f"run={tmp_path / 'run'}", f"arms={names}", "--dry-run"]
    assert compare.main([CONFIG, *words, "capo_rl:rl.method_args.votes=2"]) == 0
    shown = capsys.readouterr().out
    # One critique, and two, of each of 2 x 2 rollouts; the plain arm has none.
    assert "rollouts 600, critiques 600)" in shown and "rollouts 600, critiques 1,200)" in shown
    assert "(attempts 1,800, rollouts 600)" in shown
    assert "rl.method = 'vppo' (was 'outcome')" in shown
    assert compare.main([CONFIG, *words, "rl:rl.method=vppo"]) == 2
    assert "rl.method tells the arms apart" in capsys.readouterr().err


def test_all_arms_are_those_that_can_run(tmp_path, capsys):
    words = [*WORDS, f"run={tmp_path / 'run'}", "arms=all", "rl.refill=1"]
    plan = compare.read_plan([CONFIG, *words])
    assert {"vppo_rl", "capo_rl", "bread_rl", "bare_prefix"} <= set(plan.left_out)
    assert "rl.refill: expected 0" in plan.left_out["vppo_rl"]
    assert set(plan.names) | set(plan.left_out) == set(arms.ARMS)
    assert {"base", "int_rl", "regft", "questa_rl"} <= set(plan.names)
    assert compare.main([CONFIG, *words, "--dry-run"]) == 0
    assert "vppo_rl is left out: rl.refill: expected 0" in capsys.readouterr().out


def test_a_dry_run_looks_at_the_model(tmp_path, capsys):
    words = [*WORDS, f"run={tmp_path / 'run'}", f"model.path={tmp_path / 'nope'}", "--dry-run"]
    assert compare.main([CONFIG, *words]) == 2
    assert "nope" in capsys.readouterr().err


# --- a whole comparison ------------------------------------------------------------------------


def test_every_arm_is_an_ordinary_run_on_shared_records(finished):
    plan, _ = finished
    for seed in (0, 1):
        shared = plan.root / f"seed-{seed}" / "collection"
        for name in ("rl", "rft", "int_rl"):
            folder = plan.root / f"seed-{seed}" / name
            assert (folder / "attempts.jsonl").read_bytes() == (
                shared / "attempts.jsonl"
            ).read_bytes()
            assert (folder / "interventions.jsonl").exists() == (name == "int_rl")
    both = [(plan.root / f"seed-{s}/collection/attempts.jsonl").read_bytes() for s in (0, 1)]
    assert both[0] != both[1]


def test_an_arm_without_an_example_is_a_row_and_not_a_failure(finished):
    plan, found = finished
    assert found["arms"]["rft"]["without_examples"] == [0, 1]
    assert found["arms"]["rft"]["accuracy"] is None
    assert "no example with seed 0, 1" in (plan.root / "compare.md").read_text()


def test_tokens_add_up(finished):
    plan, found = finished
    for seed in (0, 1):
        folder = plan.root / f"seed-{seed}" / "int_rl"
        lines = {
            name: [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("attempts", "interventions", "continuations", "metrics")
        }
        attempts = sum(
            len(r["token_ids"]) + (r["finish_reason"] == "stop") for r in lines["attempts"]
        )
        verify = sum(r["num_tokens"] for r in lines["interventions"])
        more = sum(len(r["token_ids"]) for r in lines["continuations"])
        rl = sum(r["sampled_tokens"] for r in lines["metrics"] if r["stage"] == "int_rl")
        assert all(r["start"] == "intervention" for r in lines["continuations"])
        assert min(attempts, verify, more, rl) > 0
        summary = read(folder / "summary.json")["generated_tokens"]
        assert summary == {
            "attempts": attempts, "verify": verify, "continue": more, "guided": 0, "int_rl": rl
        }  # fmt: skip
        cells = compare_table.measure(plan.root, "int_rl", NAMES, seed)
        assert cells["tokens"] == attempts + verify + more + rl
        before = compare_table.measure(plan.root, "int", NAMES, seed)
        assert before["tokens"] == attempts + verify + more
    assert found["arms"]["base"]["tokens"] == 0


def test_rl_of_the_others_goes_on_until_equal_tokens(finished):
    plan, found = finished
    for seed in (0, 1):
        ours = compare_table.measure(plan.root, "int_rl", NAMES, seed)
        rl = compare_table.measure(plan.root, "rl", NAMES, seed)
        assert ours["longer"] is None and ours["steps"] == rl["steps"] == 1
        longer = rl["longer"]
        assert rl["tokens"] < ours["tokens"] <= longer["tokens"]
        rows = [
            json.loads(line)
            for line in (plan.root / f"seed-{seed}/rl/metrics.jsonl").read_text().splitlines()
        ]
        last = [row for row in rows if row["stage"] == "base_rl"][-1]
        assert longer["steps"] == last["step"] > 1
        assert longer["tokens"] - last["sampled_tokens"] < ours["tokens"]
        names = read(plan.root / f"seed-{seed}/rl/evaluations.json")
        assert set(names) == {"base", "base_rl@1", "base_rl"}
    assert found["arms"]["rl"]["steps_tokens"] > found["arms"]["rl"]["steps"] == 1


def test_a_finished_comparison_is_read_and_not_repeated(finished, monkeypatch):
    plan, found = finished
    monkeypatch.setattr(finish, "train", None)
    again = compare.run(plan, Quiet())
    assert again["arms"] == found["arms"]


def test_other_settings_in_the_same_folder_are_refused(finished):
    plan, _ = finished
    other = plan_of(plan.root, f"arms={','.join(NAMES)}", "seeds=0,1", "rl.optim.lr=0.1")
    with pytest.raises(ValueError, match=r"rl\.optim\.lr"):
        compare.run(other, Quiet())


def test_a_comparison_that_was_moved_is_read_and_not_repeated(finished, tmp_path, monkeypatch):
    plan, found = finished
    shutil.copytree(plan.root, tmp_path / "moved")
    monkeypatch.setattr(finish, "train", None)
    moved = plan_of(tmp_path / "moved", f"arms={','.join(NAMES)}", "seeds=0,1")
    assert compare.run(moved, Quiet())["arms"] == found["arms"]


@pytest.mark.parametrize("call", [1, 9, 17])
def test_a_stopped_comparison_says_so_and_continues(finished, tmp_path, monkeypatch, capfd, call):
    words = [CONFIG, *WORDS, f"run={tmp_path / 'run'}", "arms=int", "seeds=1"]
    end, calls = _Drawn.end, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return end(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(_Drawn, "end", stopping)
        assert compare.main(words) == 143
    said = capfd.readouterr().err
    assert "stopped by SIGTERM; the same command continues this comparison" in said
    assert compare.main(words) == 0
    again = read(tmp_path / "run" / "compare.json")["arms"]["int"]["accuracy_by_seed"]
    assert again == {"1": finished[1]["arms"]["int"]["accuracy_by_seed"][1]}


def test_arms_that_cannot_join_what_is_there_are_refused_before_any_work(
    finished, tmp_path, monkeypatch
):
    plan, _ = finished
    root = Path(shutil.copytree(plan.root, tmp_path / "copy"))
    monkeypatch.setattr(collect, "gather", None)
    monkeypatch.setattr(finish, "train", None)
    for words in (["equal_tokens=false"], ["arms=rl"]):
        other = plan_of(root, f"arms={','.join(NAMES)}", "seeds=0,1", *words)
        with pytest.raises(ValueError, match=r"its RL went on; .* it ends at rl\.steps"):
            compare.run(other, Quiet())
    for seed in (0, 1):
        stored = root / f"seed-{seed}" / "rl" / "config.toml"
        lines = stored.read_text().splitlines()
        stored.write_text("\n".join(line for line in lines if "until_tokens" not in line))
    with pytest.raises(ValueError, match=r"its RL ended at rl\.steps; .* it goes on"):
        compare.run(plan_of(root, f"arms={','.join(NAMES)}", "seeds=0,1"), Quiet())


def test_without_equal_tokens_no_table_speaks_of_them(finished):
    plan, found = finished
    assert found["equal_tokens"] and "At equal generated tokens" in compare_table.markdown(found)
    equal = compare_table.build(plan.root, NAMES, [0, 1], {}, equal_tokens=False)
    assert "equal generated tokens" not in compare_table.markdown(equal)
    assert {row["accuracy_tokens"] for row in equal["arms"].values()} == {None}
    alone = compare_table.build(plan.root, ["rl"], [0, 1], {}, equal_tokens=True)
    assert alone["arms"]["rl"]["accuracy_tokens"] is None


def test_a_comparison_without_a_single_example_says_so(finished):
    plan, _ = finished
    found = compare_table.build(plan.root, ["rft"], [0, 1], {}, equal_tokens=False)
    assert found["arms"]["rft"]["accuracy"] is None
    assert "nothing to compare" in compare_table.markdown(found)


# --- figures by hand ---------------------------------------------------------------------------


def evaluation(**right_of_4: int) -> Evaluation:
    problems = [
        count_samples(
            name,
            ["correct"] * right + ["wrong"] * (4 - right),
            ["x"] * 4,
            ["stop"] * 4,
            [1] * 4,
        )
        for name, right in right_of_4.items()
    ]
    return Evaluation(name="e", seed=0, problems=problems)


def test_differences_are_paired_by_seed_and_problem():
    ours = {0: evaluation(a=4, b=2), 1: evaluation(b=3, a=1), 2: evaluation(a=0, b=0)}
    theirs = {1: evaluation(a=0, b=1), 0: evaluation(a=2, b=0)}
    found = compare_table.difference(ours, theirs)
    # Seed 0: a +2/4, b +2/4; seed 1: a +1/4, b +2/4; seed 2 has no partner.
    assert found.value == pytest.approx((0.5 + 0.5 + 0.25 + 0.5) / 4)
    assert (found.num_problems, found.low) == (2, pytest.approx(0.25))
    assert compare_table.difference(ours, {9: evaluation(a=1)}) is None


def test_pooling_leaves_out_problems_without_enough_samples():
    both = {0: evaluation(a=4, b=0), 1: evaluation(a=2, c=4)}
    assert compare_table.pooled(both, compare_table.accuracy).value == pytest.approx(0.75)
    at_2 = compare_table.pooled({0: evaluation(a=1)}, compare_table.at_k(2), 2)
    assert at_2.value == pytest.approx(0.5)
    with pytest.raises(ValueError, match="enough scored samples"):
        compare_table.pooled({0: evaluation(a=1)}, compare_table.at_k(5), 5)


def test_pass_curves_end_where_a_problem_has_no_more_samples():
    unscored = count_samples("u", ["unscored"] * 4, ["timeout"] * 4, ["stop"] * 4, [1] * 4)
    found = evaluation(a=4, b=0)
    found = Evaluation(name="e", seed=0, problems=[*found.problems, unscored])
    curve = compare_table.pass_curve({0: found, 1: evaluation(a=2, b=0)})
    assert [k for k, _ in curve] == [1, 2, 4]
    assert [estimate.value for _, estimate in curve] == pytest.approx([3 / 8, (1 + 5 / 6) / 4, 0.5])


def test_the_interval_knows_of_seeds_and_of_problems():
    rng = np.random.default_rng(0)
    problems = rng.random(200)
    alike = np.stack([problems, problems, problems])
    apart = np.stack([problems - 0.3, problems, problems + 0.3])
    narrow, wide = (bootstrap_seeds(values.tolist(), seed=1) for values in (alike, apart))
    assert narrow.value == wide.value == pytest.approx(problems.mean())
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)
    one = bootstrap_seeds([problems.tolist()], seed=1)
    half = 1.96 * problems.std() / np.sqrt(200)
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)
    with pytest.raises(ValueError, match="seeds x problems"):
        bootstrap_seeds([], seed=0)


def test_a_comparison_ends_with_its_page(finished):
    plan, found = finished
    page = report.page([plan.root])
    assert (plan.root / "report.html").read_text() == page
    tables = Seen(page).tables["settings"]
    assert ["seed-0/rft", "no example to learn from"] in [row for rows in tables for row in rows]
    assert len(Seen(page).tables["results"][0]) == 1 + len(found["arms"])


def test_rows_where_ours_is_not_ahead_are_named(finished):
    _, found = finished
    assert {"base", "rl", "int"} <= set(found["not_ahead"])
    text = compare_table.markdown(found)
    assert "is not clearly ahead (the interval reaches 0) of: base, RL" in text
    assert text.count("| InT + RL |") == 2


def test_an_arm_can_be_added_and_a_lost_one_is_made_again(finished):
    # The last test here: it changes the folder of the fixture.
    plan, found = finished
    shutil.rmtree(plan.root / "seed-1" / "rl")
    words = [f"arms={','.join([*NAMES, 'prefix'])}", "seeds=0,1"]
    again = compare.run(plan_of(plan.root, *words), Quiet())
    assert again["arms"]["rl"] == found["arms"]["rl"]
    assert again["arms"]["prefix"]["examples"] > 0


# --- settings of single arms -------------------------------------------------------------------


def test_a_setting_of_one_arm_reaches_that_arm_alone(tmp_path):
    words = ["arms=rl,int,int_rl,reference_rl", "int:sft.epochs=7", "reference_rl:rl.group_size=3"]
    plan = plan_of(tmp_path / "run", *words)
    epochs = {name: plan.config(name, 0).sft.epochs for name in arms.runs(plan.names)}
    assert epochs == {"int_rl": 7, "rl": 0, "reference_rl": 1}
    assert [plan.config(n, 0).rl.group_size for n in ("int_rl", "reference_rl")] == [2, 3]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("star:sft.epochs=2", "no arm star here; arms are int, int_rl"),
        ("int:intervene.samples=2", "expected a setting of sft or rl"),
        ("int:evaluate.samples=9", "expected a setting of sft or rl"),
        ("int:sft.epoch=2", "arm int_rl: "),
        ("int:sft.data=reference", "sft.data tells the arms apart"),
        ("int:rl.steps=2", "rl.steps tells the arms apart"),
        ("int:rl.hint=0.5", "rl.hint tells the arms apart"),
        ("int:sft.epochs=0", "arm int_rl: sft.epochs = 0"),
    ],
)
def test_a_setting_that_one_arm_cannot_have_is_refused(tmp_path, capsys, word, message):
    words = [CONFIG, *WORDS, f"run={tmp_path / 'run'}", "arms=int,int_rl", word]
    assert compare.main(words) == 2
    assert message in capsys.readouterr().err
