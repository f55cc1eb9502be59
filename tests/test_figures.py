"""The README's figures: what they show is what the rows hold, and no text becomes markup."""

import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks import figures
from benchmarks.harness import RESULTS

HOSTILE = '</text><script>1</script>&"<b'


def estimate(value, spread=0.05):
    return {"value": value, "low": value - spread, "high": value + spread, "num_problems": 9}


def compare_row(**arms):
    found = {"seeds": [0, 1], "arms": {n: arm | {"label": n} for n, arm in arms.items()}}
    return stamp("compare", found)


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


def texts(svg):
    return [node.text for node in ET.fromstring(svg).iter() if node.tag.endswith("text")]


def test_arms_show_their_values_and_intervals():
    one = {"accuracy": estimate(0.25), "accuracy_tokens": estimate(0.5)}
    none = {"accuracy": None, "accuracy_tokens": None}
    svg = figures.draw({"compare": compare_row(first=one, skipped=none)})["arms.svg"]
    shown = texts(svg)
    assert "first" in shown and "skipped" not in shown and {"25.0", "50.0"} <= set(shown)
    bars = [node.attrib for node in ET.fromstring(svg).iter() if node.get("class") == "range"]
    ends = [(float(bar["x1"]), float(bar["x2"])) for bar in bars]
    # 20 to 30 % and 45 to 55 % on one scale.
    assert ends[0][1] - ends[0][0] == pytest.approx(ends[1][1] - ends[1][0], abs=0.2)
    assert ends[1][0] - ends[0][0] == pytest.approx(2.5 * (ends[0][1] - ends[0][0]), abs=0.3)
    assert any("9 held-out problems, mean over seeds 0, 1" in text for text in shown)
    assert "commit abcdef0" in " ".join(shown)


def test_arms_at_their_own_best_have_a_figure_of_their_own():
    table = compare_row(first={"accuracy": estimate(0.25), "accuracy_tokens": None})["figures"]
    row = stamp("tuned_compare", {"tried": {}, "table": table})
    (name,) = found = figures.draw({"tuned_compare": row})
    assert name == "tuned_arms.svg" and "each arm at its own best" in texts(found[name])[0]


def test_curves_end_in_names_that_do_not_overlap():
    row = quickstart_row(base=0.1, int=0.5, int_rl=0.5, base_rl=0.1)
    found = figures.draw({"quickstart": row})
    nodes = ET.fromstring(found["pass_at_k.svg"]).iter()
    ends = {
        n.text: float(n.get("y")) for n in nodes if re.search("(T|L|base) [0-9]+ %$", n.text or "")
    }
    assert {"base 10 %", "RL 10 %", "InT 50 %", "InT + RL 50 %"} == set(ends)
    heights = sorted(ends.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 18
    assert "nats, mean over sampled tokens" in texts(found["rl_curves.svg"])


def test_a_label_stays_text():
    row = compare_row(**{HOSTILE: {"accuracy": estimate(0.1), "accuracy_tokens": None}})
    svg = figures.draw({"compare": row})["arms.svg"]
    assert HOSTILE in texts(svg) and "<script" not in svg


def test_the_last_row_of_the_default_run_is_drawn(tmp_path):
    rows = [stamp("compare", {"n": n}, run) for n, run in ((1, None), (2, None), (3, "runs/x"))]
    file = tmp_path / "cpu.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures.last_rows(file)["compare"]["figures"] == {"n": 2}
    with pytest.raises(ValueError, match="does not exist"):
        figures.last_rows(tmp_path / "none.jsonl")


def test_the_stored_figures_are_those_of_the_stored_rows():
    drawn = figures.draw(figures.last_rows(RESULTS / "cpu.jsonl"))
    stored = {path.name: path.read_text() for path in (RESULTS / "figures").glob("*.svg")}
    assert stored == drawn, "python -m benchmarks.figures draws them again"
