"""The page of a folder of comparisons: who wins in each cell, and what its config says."""

import json
import shutil
from pathlib import Path

import pytest
from report_compare import make_comparison
from report_run import HOSTILE
from test_report import Seen
from test_report_page import assert_harmless

from intfast.evaluate import Estimate
from intfast.study import phase, report
from intfast.study.charts import whisker
from intfast.study.tables import interval


def change(cell, about, **ahead):
    """Rewrite a cell: InT + RL minus each named arm, an interval of 10 points."""
    found = json.loads((cell / "compare.json").read_text())
    found["about"] = about
    for name, value in ahead.items():
        e = {"value": value, "low": value - 0.05, "high": value + 0.05, "num_problems": 3}
        found["arms"][name]["ahead"] = e
        # The arm with the smallest difference is the best rival.
        found["arms"][name]["accuracy"] |= {"value": 0.8 - value}
    (cell / "compare.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("phase") / "cells"
    make_comparison(root / "far")
    others = ("base", "rl", "reference", "int")
    apart = dict.fromkeys(others, 0.75)
    for name in ("level", "lost"):
        shutil.copytree(root / "far", root / name)
    for name, value in (("far", 0.6), ("level", 0.02), ("lost", -0.3)):
        change(root / name, "Assumed: terse <b>references</b>.", **apart, reference_rl=value)
    path = root / "lost" / "seed-0" / "collection" / "config.toml"
    path.write_text(path.read_text().replace("epochs = 4", "epochs = 9"))
    return root


def test_every_cell_with_its_rival_in_order_of_the_difference(root):
    page = Seen(report.page([root]))
    head, *rows = page.tables["cells"][0]
    assert [row[0] for row in rows] == ["far", "level", "lost"]
    assert {row[head.index("best rival")] for row in rows} == {"SFT on references + RL"}
    assert [row[head.index("InT + RL is")] for row in rows] == ["ahead", "not told apart", "behind"]
    expected = interval(Estimate(value=-0.3, low=-0.35, high=-0.25, num_problems=3))
    assert rows[2][2] == expected
    text = report.page([root])
    for said in ("<b>ahead</b>: far.", "<b>not told apart</b>: level.", "<b>behind</b>: lost."):
        assert said in text
    assert text.count("Assumed: terse &lt;b&gt;references&lt;/b&gt;.") == 1
    assert 'href="lost/report.html"' in text
    head, *rows = page.tables["cells"][1]
    assert head == ["cell", "sft.epochs"] and rows[2] == ["lost", "9"]


def test_the_scale_of_differences_has_its_zero_where_both_are_equal():
    e = Estimate(value=0.0, low=-0.1, high=0.1, num_problems=3)
    drawn = str(whisker(e, 0.5, 3, low=-0.5).__html__())
    assert 'cx="80.0"' in drawn and 'x1="80.0"' in drawn


def test_the_page_of_one_comparison_says_what_is_assumed(root):
    assert "Assumed: terse &lt;b&gt;references&lt;/b&gt;." in report.page([root / "far"])


def test_others_texts_are_data_and_a_folder_without_a_rival_is_refused(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    change(copy / "far", HOSTILE)
    assert_harmless(Seen(report.page([copy])))
    for path in copy.glob("*/compare.json"):
        found = json.loads(path.read_text())
        found["arms"] = {"base": found["arms"]["base"] | {"ahead": None}}
        path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="int_rl and another arm"):
        phase.gather(copy)
