"""The page of a comparison, and of runs that differ in their seed alone."""

import json
import shutil
from pathlib import Path

import pytest
from report_compare import FEW, NAMES, make_comparison
from report_run import HOSTILE, make_run
from test_report import Seen

from intfast.study import compare_page, compare_table, report
from intfast.study.page_data import interval, read_evaluations


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_comparison(tmp_path_factory.mktemp("compare") / "all")


@pytest.fixture(scope="module")
def page(root):
    return Seen(report.page([root]))


@pytest.fixture
def copy(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "copy"))


def found(*folders):
    return Seen(report.page(folders)).block("runs")


def test_the_rows_are_those_of_the_table(root, page):
    about = page.block("runs")["comparison"]
    stored = json.loads((root / "compare.json").read_text())
    assert [arm["name"] for arm in about["arms"]] == NAMES
    for arm in about["arms"]:
        row = stored["arms"][arm["name"]]
        assert arm["label"] == row["label"]
        for key in compare_page.ESTIMATES:
            expected = row[key] and [row[key][k] for k in ("value", "low", "high", "num_problems")]
            assert arm[key] == (expected and pytest.approx(expected, rel=1e-5))
        assert arm["pass"][0][:2] == [1, pytest.approx(row["accuracy"]["value"], rel=1e-5)]
        assert [k for k, *_ in arm["pass"]] == [1, 2, 4]
        assert dict(map(tuple, arm["by_seed"])) == {
            int(seed): pytest.approx(value) for seed, value in row["accuracy_by_seed"].items()
        }


def test_equal_tokens_steps_and_purposes(page):
    arms = {arm["name"]: arm for arm in page.block("runs")["comparison"]["arms"]}
    assert arms["rl"]["steps"] == [16, 20.5] and arms["int_rl"]["steps"] == [16, 16]
    assert arms["rl"]["rollouts"] == [160, 205]
    assert arms["rl"]["collection"] == {
        "attempts": 1000,
        "verify": 20,
        "continue": 300,
        "guided": 0,
    }
    assert (
        arms["reference"]["accuracy_tokens"] is None and arms["reference"]["by_seed_tokens"] == []
    )
    # 12 of 12 after the longer RL, 10 of 12 at equal steps.
    assert [value for _, value in arms["reference_rl"]["by_seed_tokens"]] == [1, 1]
    assert arms["reference_rl"]["accuracy"][0] == pytest.approx(10 / 12, rel=1e-5)


def test_curves_are_means_over_seeds_with_their_spread(page):
    curves = page.block("runs")["comparison"]["curves"]
    assert set(curves) == {"rl", "reference_rl", "int_rl"}
    # Steps 1 to 20, which both seeds have; the second seed went one further.
    assert curves["rl"]["reward"][0] == [1, 0.015, 0.01, 0.02]
    assert [point[0] for point in curves["rl"]["reward"]] == list(range(1, 21))
    assert curves["int_rl"]["length"][-1] == [16, 80.5, 80, 81]


def test_a_hinted_rollout_is_not_in_the_reward_that_is_shown(copy):
    for seed in (0, 1):
        path = copy / f"seed-{seed}/rl/metrics.jsonl"
        rows = [json.loads(line) | {"reward_bare": 0.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = compare_page.collect(copy)["curves"]
    assert {value for _, value, _, _ in curves["rl"]["reward"]} == {0}


def test_settings_folders_and_interventions(page):
    figures = page.block("runs")
    about = figures["comparison"]
    own = {run: (rows, words) for run, rows, words in about["own"]}
    assert own["reference_rl"] == (["reference", "reference_rl"], ['sft.data="reference"'])
    assert own["int_rl"] == (["int", "int_rl"], [])
    assert about["given"] == {"int": ["sft.epochs=7"]}
    assert [0, "rl", "finished"] in about["folders"] and len(about["folders"]) == 8
    assert [run["name"] for run in figures["runs"]] == ["seed 0", "seed 1"]
    assert page.block("items-1")["items"]


def test_without_our_arm_there_is_a_page_without_interventions(copy):
    stored = json.loads((copy / "compare.json").read_text())
    stored["arms"] = {name: stored["arms"][name] for name in ("base", "rl")}
    (copy / "compare.json").write_text(json.dumps(stored | {"compared_with": None}))
    figures = found(copy)
    assert figures["runs"] == [] and figures["comparison"]["standard"] == "collection"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "compare.json").unlink(), "has not finished"),
        (lambda root: spoil_name(root), "knows no arm mystery"),
    ],
)
def test_what_cannot_be_shown_is_explained(copy, capsys, spoil, message):
    spoil(copy)
    assert report.main([str(copy)]) == 2
    assert message in capsys.readouterr().err


def spoil_name(root):
    stored = json.loads((root / "compare.json").read_text())
    stored["arms"]["mystery"] = stored["arms"]["rl"]
    (root / "compare.json").write_text(json.dumps(stored))


def test_a_comparison_stands_alone(root, tmp_path, capsys):
    run = make_run(tmp_path / "run", *FEW)
    assert report.main([str(run), str(root)]) == 2
    assert "has a page of its own" in capsys.readouterr().err


def test_hostile_labels_and_settings_are_data(tmp_path):
    text = report.page([make_comparison(tmp_path / "hostile", (0,), HOSTILE)])
    page = Seen(text)
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "noscript", "p", "main", "script")
    }
    arms = page.block("runs")["comparison"]["arms"]
    assert arms[0]["label"] == f"base{HOSTILE}"
    for attrs, block in page.of("script"):
        assert not attrs or not set("<>&") & set(block)


# --- several seeds -----------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_pooled(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", *FEW, f"seed={seed}") for seed in (3, 4)]
    other = make_run(tmp_path / "other", *FEW, "seed=5", "sft.epochs=2")
    (group,) = found(*runs, other)["pooled"]
    assert (group["names"], group["seeds"]) == (["s3", "s4"], [3, 4])
    assert [row["label"] for row in group["rows"]] == ["base", "InT", "InT + RL"]
    tables = {seed: read_evaluations(run) for seed, run in zip((3, 4), runs, strict=True)}
    ours, base = ({s: t[n] for s, t in tables.items()} for n in ("int_rl", "base"))
    last = group["rows"][-1]
    assert last["accuracy"] == interval(compare_table.pooled(ours, compare_table.accuracy))
    assert last["by_seed"] == [[3, 0.75], [4, 0.75]]
    expected = ["InT + RL", "base", *interval(compare_table.difference(ours, base))]
    assert expected in group["differences"]


def test_the_same_seed_twice_is_no_repetition(tmp_path):
    runs = [make_run(tmp_path / name, *FEW) for name in "ab"]
    assert found(*runs)["pooled"] == []
