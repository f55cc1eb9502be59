"""Accuracy against the NLL of the training data: ranks, the points of a comparison, the figure."""

import itertools
from argparse import Namespace

import pytest
from report_compare import make_comparison

from benchmarks import figures, likelihood
from intfast.study.read import TokenLogprobs, read_rows


def test_rank_correlation_by_hand():
    assert likelihood.ranks([3, 1, 3]) == [1.5, 0, 1.5]
    assert likelihood.spearman([1, 2, 3], [30, 20, 10]) == -1
    assert likelihood.spearman([1, 2, 3], [5, 5, 5]) is None
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
    xs = [0.1, 0.2, 0.3, 0.4, 0.5]
    for ys in itertools.permutations(range(5)):
        by_hand = 1 - 6 * sum((x - y) ** 2 for x, y in enumerate(ys)) / (5 * 24)
        assert likelihood.spearman(xs, ys) == pytest.approx(by_hand)


def test_the_points_of_a_comparison(tmp_path):
    make_comparison(tmp_path / "cells" / "one")
    args = Namespace(runs=tmp_path)
    (row,) = likelihood.run(args)
    points = row["figures"]["points"]
    assert [(p["arm"], p["seed"]) for p in points] == [
        ("int", 0), ("int", 1), ("reference", 0), ("reference", 1),
    ]  # fmt: skip
    folder = tmp_path / "cells" / "one" / "seed-0" / "int_rl"
    (stored,) = read_rows(folder / "example_logprobs.jsonl", TokenLogprobs)
    losses = [-x for x in stored.base if x is not None]
    assert points[0]["nll"] == pytest.approx(sum(losses) / len(losses))
    # Of "reference" on the three problems of four samples: 3, 1 and 2 right.
    assert points[2]["accuracy"] == pytest.approx((3 + 1 + 2) / 12)
    assert points[0]["comparison"] == "cells/one"


def test_what_breaks_the_order_is_named_and_drawn():
    points = [
        {"comparison": "c", "arm": arm, "seed": 0, "sft": sft, "nll": nll, "accuracy": accuracy}
        for arm, sft, nll, accuracy in (
            ("int", "lr 0.001 x 8", 0.1, 0.4),
            ("reflection", "lr 0.001 x 8", 0.6, 0.1),
            ("reference", "lr 0.001 x 8", 1.4, 0.0),
            ("reference", "lr 0.002 x 16", 1.5, 0.9),
        )
    ]
    found = likelihood.correlations(points)
    assert found["lr 0.001 x 8"]["spearman"] == -1 and found["all"]["spearman"] == 0.2
    worst = likelihood.breaks(points)[0]
    assert worst["sft"] == "lr 0.002 x 16" and worst["ranks_above"] == 3
    row = {"benchmark": "likelihood", "time": "2026-01-02T03:04", "commit": "abcdef0123"}
    row["figures"] = {"points": points, "correlations": found}
    axes = figures.draw({"likelihood": row})["likelihood.svg"].axes[0]
    drawn = [(x, y) for line in axes.lines for x, y in line.get_xydata()]
    assert sorted(drawn) == [(p["nll"], 100 * p["accuracy"]) for p in points]
