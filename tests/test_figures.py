"""The README's figures: what they show is what the rows hold, and no text becomes markup."""

import itertools
import json
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from benchmarks import figures
from benchmarks.harness import RESULTS

HOSTILE = '</text><script>1</script>&"<b $x$'


def estimate(value, spread=0.05):
    return {"value": value, "low": value - spread, "high": value + spread, "num_problems": 9}


def table_row(q=1, **arms):
    found = {"seeds": [0, 1], "arms": {n: arm | {"label": n} for n, arm in arms.items()}}
    return stamp("evidence", {"table": found}) | {"setting": {"base": "base", "q": q}}


def stamp(name, found, run=None):
    run = {"run": run or figures.RUNS[name]}
    row = {"benchmark": name, "time": "2026-01-02T03:04", "commit": "abcdef0123"}
    return row | {"arguments": run, "figures": found}


def quickstart_row(**last):
    curve = {key: [0.0, 0.5, None, 1.0] for key in figures.CURVES} | {"step": [1, 2, 3, 4]}
    powers = (1, 2, 4)
    curves = {n: {str(k): estimate(v * k / 4) for k in powers} for n, v in last.items()}
    analysis = {"pass_at_k": curves, "rl_curves": {"base_rl": curve, "int_rl": curve}}
    return stamp("quickstart", {"analysis": analysis})


def drawn(rows):
    """File name -> the axes of the figure."""
    return {name: figure.axes for name, figure in figures.draw(rows).items()}


def texts(axes):
    return [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())]


def test_arms_show_their_values_and_intervals():
    none = {"accuracy": None}
    row = table_row(first={"accuracy": estimate(0.25)}, skipped=none)
    other = table_row(q=0, first={"accuracy": estimate(0.5)})
    rows = {"evidence q=1": row, "evidence q=0": other}
    (axes,) = drawn(rows)["arms.svg"]
    assert texts(axes) == ["25.0", "50.0", "first"]
    bars = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars == [pytest.approx([20, 30]), pytest.approx([45, 55])]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["terse references", "complete references"]
    svg = figures.files(rows)["arms.svg"]
    assert "9 held-out problems, mean over seeds 0, 1" in svg and "commit abcdef0" in svg


def test_cells_show_each_arm_that_they_have():
    whole = {"reference_rl": {"accuracy": estimate(0.5)}, "int_rl": {"accuracy": estimate(0.75)}}
    cells = [
        {"q": 1, "strength": "hard", "problems": 96, "rewrite": None}
        | {"found": {"seeds": [3], "arms": whole}},
        {"q": 1, "strength": "middle", "problems": 96, "rewrite": 0.1}
        | {"found": {"seeds": [3], "arms": {"reference_rl": {"accuracy": estimate(0.25)}}}},
    ]
    (axes,) = drawn({"evidence cells": stamp("evidence", {"cells": cells})})["phase.svg"]
    labels = ["q = 1, SFT hard, 96 problems"]
    labels += ["q = 1, SFT middle, 96 problems, own dialect, r = 0.1"]
    assert texts(axes) == ["50.0", "25.0", "75.0", *labels]


def test_curves_end_in_names_that_do_not_overlap():
    row = quickstart_row(base=0.1, int=0.5, int_rl=0.5, base_rl=0.1)
    found = drawn({"quickstart": row})
    (axes,) = found["pass_at_k.svg"]
    ends = {text.get_text(): text.xy[1] for text in axes.texts}
    assert {"base 10 %", "RL 10 %", "InT 50 %", "InT + RL 50 %"} == set(ends)
    heights = sorted(ends.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.06 * axes.get_ylim()[1]
    assert [axes.get_title("right") for axes in found["rl_curves.svg"]] == [
        unit for _, unit in figures.CURVES.values()
    ]
    line = found["rl_curves.svg"][0].lines[0]
    # A step without a value is left out.
    assert list(line.get_xdata()) == [1, 2, 4] and list(line.get_ydata()) == [0, 0.5, 1]


def test_a_label_stays_text():
    row = table_row(**{HOSTILE: {"accuracy": estimate(0.1)}})
    svg = figures.files({"evidence q=1": row})["arms.svg"]
    nodes = [node.text for node in ET.fromstring(svg).iter() if node.tag.endswith("text")]
    assert HOSTILE in nodes and "<script" not in svg


def test_the_last_row_of_the_default_run_and_base_is_drawn(tmp_path):
    runs = ((1, None), (2, None), (3, "runs/x"))
    rows = [stamp("quickstart", {"n": n}, run) for n, run in runs]
    for n, base, what in ((4, "base", {"q": 1}), (5, "base_1", {"q": 1}), (6, "base", {})):
        rows.append(stamp("evidence", {"n": n}) | {"setting": {"base": base} | what})
    file = tmp_path / "cpu.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {name: row["figures"]["n"] for name, row in figures.last_rows(file).items()}
    assert found == {"quickstart": 2, "evidence q=1": 4, "evidence cells": 6}
    with pytest.raises(ValueError, match="cannot read"):
        figures.last_rows(tmp_path / "none.jsonl")


def test_the_stored_figures_are_those_of_the_stored_rows():
    found = figures.files(figures.last_rows(RESULTS / "cpu.jsonl"))
    texts = {path.name: path.read_text() for path in (RESULTS / "figures").glob("*.svg")}
    # The others are drawn by hand.
    stored = {name: text for name, text in texts.items() if "Matplotlib v" in text}
    if any(f"Matplotlib v{matplotlib.__version__}," not in text for text in stored.values()):
        pytest.skip("drawn by another Matplotlib, which need not give the same bytes")
    assert stored == found, "python -m benchmarks.figures draws them again"
