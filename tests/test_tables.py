"""One table in three forms, the one reader of rows, and run folders derived from others."""

import io

import pytest
from rich.console import Console

from intfast import cli
from intfast.evaluate import Estimate
from intfast.records import Problem
from intfast.study import derive, page_data
from intfast.study.read import read_figures, read_rows
from intfast.study.tables import Column, Table, element, heads, interval, reading, share, short

HALF = Estimate(value=0.5, low=0.25, high=0.75, num_problems=8)
WIDE = Estimate(value=0.889, low=0.111, high=1.0, num_problems=8)


def test_a_table_has_the_same_cells_in_all_forms():
    columns = [*heads("*name", ">figure"), Column("seen", only="page"), Column("said", only="text")]
    table = Table("title", columns, [["<b>[red]\x1b[2J", interval(HALF), "p", "t"]], "caption")
    assert table.markdown() == [
        "| name | figure | said |",
        "| --- | --- | --- |",
        "| <b>[red]\x1b[2J | 50.0 [25.0, 75.0] | t |",
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(table.rich())
    said = console.file.getvalue()
    assert "title" in said and "caption" in said and "seen" not in said
    assert r"<b>[red]\x1b[2J" in said and "50.0 [25.0, 75.0]" in said
    page = table.__html__()
    assert r"&lt;b&gt;[red]\x1b[2J" in page and "said" not in page and ">p</td>" in page
    assert '50.0 <span class="ci">[25.0, 75.0]</span>' in page


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_no_console_is_too_narrow_for_a_number(width):
    names = ["*weights", ">accuracy %", *(f">pass@{k} %" for k in (8, 32, 128)), ">tokens", "last"]
    rows = [
        [name, *(interval(e) for e in (HALF, None, HALF, WIDE)), f"{1234567 + n:,}", "0.98 -> 0.9"]
        for n, name in enumerate(["base", "a long name of weights"])
    ]
    table = Table("a title of several words", heads(*names), rows, "and a caption below it")
    console = Console(file=io.StringIO(), width=width)
    console.print(table.rich())
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= width and "…" not in said
    for piece in ("50.0", "[25.0, 75.0]", "88.9", "[11.1, 100.0]", "1,234,567", "1,234,568"):
        assert piece in said
    for word in [word for name in names for word in name.lstrip(">*").split()]:
        assert word in said
    assert said.count("title") == said.count("caption") == 1
    # What is below others stands behind the first column again.
    tops = [line for line in said.splitlines() if line.startswith("┏")]
    assert said.count("weights ") >= len(tops) and len(tops) == {200: 1, 120: 1}.get(
        width, len(tops)
    )


def test_a_table_without_rows_or_of_one_column_is_one():
    console = Console(file=io.StringIO(), width=60)
    console.print(Table("", heads("gate", ">n"), []).rich())
    console.print(Table("", heads("gate"), [["x"]]).rich())
    said = console.file.getvalue()
    assert said.count("gate") == 2 and "│ x    │" in said


def test_cells_say_an_estimate():
    assert interval(HALF, 3, scale=1) == "0.500 [0.250, 0.750]" and interval(None) == ""
    assert share(HALF) == "4 of 8"
    assert reading(HALF, "above", "below") == "above"
    assert [short(x) for x in (0.0, 12345.6, 1e-4, 2e6, None)] == [
        "0",
        "12300",
        "1.0e-04",
        "2.0e+06",
        "",
    ]


def test_nothing_in_an_element_is_markup_unless_it_was_made_here():
    made = element(
        "p", "<i>", element("b", "x"), None, [1, "\u202e"], title='"', open=True, id=None
    )
    assert str(made) == '<p title="&#34;" open>&lt;i&gt;<b>x</b>1\\u202e</p>'


def test_a_torn_last_line_is_left_out_unless_nobody_writes(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_bytes(b'{"id": "a", "problem": "?", "answer": "1"}\n{"id": "b", "pro')
    assert [problem.id for problem in read_rows(path, Problem)] == ["a"]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: no Problem record"):
        read_rows(path, Problem, finished=True)
    with pytest.raises(ValueError, match="cannot read"):
        read_rows(tmp_path / "absent.jsonl", finished=True)


def test_stored_estimates_come_back(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 8}, "b": 1}')
    assert read_figures(path) == {"a": HALF, "b": 1}
    assert read_figures(tmp_path / "absent.json") is None


SHOWN = ("evaluations", "manifest", "summary", "analysis", "ablations")


@pytest.mark.parametrize("name", SHOWN)
def test_a_damaged_file_of_a_run_is_named_with_the_remedy(tmp_path, name):
    (tmp_path / "config.toml").write_text(cli.to_toml(cli.load(None, ["data.train=p.jsonl"])))
    page_data.load_all([tmp_path])
    path = tmp_path / f"{name}.json"
    whole = b'{"base": {"name": "base", "seed": 0, "problems": []}}'
    for content in (whole[:-20], b"", b"[]", whole.replace(b"seed", b"se\xff\xfe"), b"[" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            page_data.load_all([tmp_path])
        said = str(caught.value)
        assert said.startswith(f"{path} is damaged, or of another version (")
        assert said.endswith("restore it, or delete it and repeat the command that writes it")
    path.write_bytes(whole)
    page_data.load_all([tmp_path])


def test_records_are_given_once_and_other_settings_are_refused(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "attempts.jsonl").write_text("first")
    derive.give(source, target, ["attempts.jsonl", "absent.jsonl"])
    (source / "attempts.jsonl").write_text("second")
    derive.give(source, target, ["attempts.jsonl"])
    assert (target / "attempts.jsonl").read_text() == "first"
    config = cli.load(None, ["data.train=p.jsonl", f"run={target}"])
    derive.check(config, "an arm", "use another folder")
    (target / "config.toml").write_text(cli.to_toml(config))
    moved = cli.load(None, ["data.train=p.jsonl", f"run={target}", "grade.workers=9"])
    derive.check(moved, "an arm", "use another folder")
    other = cli.load(None, ["data.train=p.jsonl", f"run={target}", "seed=9"])
    with pytest.raises(ValueError, match=r"an arm with other settings:\n  seed: was 0, is 9\nuse"):
        derive.check(other, "an arm", "use another folder")
    derive.check(other, "an arm", "use another folder", free=["seed"])
    with pytest.raises(ValueError, match="it went on"):
        derive.check(config, "an arm", "use another folder", also=["it went on"])
