"""The page of a comparison."""

import json
import shutil
from pathlib import Path

import pytest
from report_compare import FEW, NAMES, make_comparison
from report_run import HOSTILE, make_run
from test_report import Seen
from test_report_page import assert_harmless

from intfast.safe_text import printable
from intfast.study import compare_page, compare_table, report
from intfast.study.tables import interval


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_comparison(tmp_path_factory.mktemp("compare") / "all")


@pytest.fixture(scope="module")
def page(root):
    return Seen(report.page([root]))


@pytest.fixture
def copy(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_the_rows_are_those_of_the_table(root, page):
    stored = compare_page.read(root)["arms"]
    head, *rows = page.tables["results"][0]
    assert [row[0] for row in rows] == [stored[name]["label"] for name in NAMES]
    for name, row in zip(NAMES, rows, strict=True):
        found = stored[name]
        assert row[1] == interval(found["accuracy"])
        assert row[head.index("pass@4 %")] == interval(found["pass_at_k"][4])
        assert row[head.index("InT + RL ahead by, points")] == interval(found["ahead"])
        by_seed = " ".join(f"{100 * value:.1f}" for value in found["accuracy_by_seed"].values())
        assert row[head.index("by seed %")] == by_seed
    # The same table, without what only a page can show.
    text = compare_table.steps_table(compare_page.read(root)).markdown()
    assert text[0].startswith("| arm | accuracy % | pass@4 % | InT + RL ahead by, points |")
    assert [line.split(" | ")[1] for line in text[2:]] == [row[1] for row in rows]


def test_equal_tokens_steps_and_purposes(page):
    head, *rows = page.tables["tokens"][0]
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(found) == ["RL", "SFT on references + RL", "InT + RL"]
    assert found["RL"]["RL steps"] == "20" and found["InT + RL"]["RL steps"] == "16"
    # 12 of 12 after the longer RL, 10 of 12 at equal steps.
    assert found["SFT on references + RL"]["by seed %"] == "100.0 100.0"
    head, *rows = page.tables["tokens"][1]
    spent = {row[0]: dict(zip(head, row, strict=True)) for row in rows}["RL"]
    assert spent["tokens"] == "1,525" and spent["attempts"] == "1,000"
    assert (spent["rollouts of RL"], spent["rollouts at equal steps"]) == ("205", "160")
    assert (spent["continuations"], spent["rewrites and hints"]) == ("300", "")


def test_curves_are_means_over_seeds_with_their_spread(root, page):
    about = compare_page.About(root)
    curves = {name: compare_page.curves(about, name) for name in ("rl", "int_rl")}
    # Steps 1 to 20, which both seeds have; the second seed went one further.
    assert curves["rl"]["reward"][0] == pytest.approx((1, 0.015, 0.01, 0.02, None))
    assert [point.x for point in curves["rl"]["reward"]] == list(range(1, 21))
    assert curves["int_rl"]["length"][-1] == (16, 80.5, 80, 81, None)
    said = [text for _, text in page.of("title")]
    assert any(text.startswith("step 1\nRL: 0.015 [0.01, 0.02]") for text in said)


def test_a_hinted_rollout_is_not_in_the_reward_that_is_shown(copy):
    for seed in (0, 1):
        path = copy / f"seed-{seed}/rl/metrics.jsonl"
        rows = [json.loads(line) | {"reward_bare": 0.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = compare_page.curves(compare_page.About(copy), "rl")
    assert {point.y for point in curves["reward"]} == {0}


def test_settings_folders_and_interventions(page):
    given, own, _, folders, _ = page.tables["settings"]
    assert given[1:] == [["InT", "sft.epochs=7"]]
    rows = {row[0]: row[1:] for row in own}
    labels = "SFT on references; SFT on references + RL"
    assert rows["reference_rl"] == [labels, 'sft.data="reference"']
    assert rows["int_rl"] == ["InT; InT + RL", "none"]
    assert ["seed-0/rl", "finished"] in folders and len(folders) == 9
    assert [run["name"] for run in page.block("runs")["runs"]] == ["seed 0", "seed 1"]
    assert page.block("items-1")["items"]


def test_without_our_arm_there_is_a_page_without_interventions(copy):
    stored = json.loads((copy / "compare.json").read_text())
    stored["arms"] = {name: stored["arms"][name] for name in ("base", "rl")}
    (copy / "compare.json").write_text(json.dumps(stored | {"compared_with": None}))
    page = Seen(report.page([copy]))
    assert page.block("runs")["runs"] == [] and "browse" not in page.tables
    assert not any("ahead" in cell for cell in page.tables["results"][0][0])
    assert compare_page.About(copy).standard == "collection"


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
    page = Seen(report.page([make_comparison(tmp_path / "hostile", (0,), HOSTILE)]))
    assert_harmless(page)
    assert page.tables["results"][0][1][0] == " ".join(printable(f"base{HOSTILE}").split())
    for attrs, block in page.of("script"):
        assert not attrs or not set("<>&") & set(block)
