"""The scored rule by hand: what it draws, when it stops, and that its prior finds a score."""

import random

import pytest

from benchmarks import scored
from benchmarks.collection import ALL


def made(rows, left=None):
    """rows: (problem, outcomes as + and .); tokens of a continuation: 10."""
    right = [[c == "+" for c in text.ljust(ALL, ".")] for _, text in rows]
    return scored.Scored(
        problems=[problem for problem, _ in rows],
        scores={"left": left or [10.0] * len(rows)},
        scored_tokens=dict.fromkeys(scored.SCORES, 0),
        right=right,
        lengths=[[10] * ALL for _ in rows],
    )


def test_turns_end_at_a_success_or_below_the_price():
    # Means 1/10; after one failed turn of four 1/14, after two 1/18, ...
    found = made([("p", "....+"), ("q", "")])
    beta = [(1.0, 9.0)] * 2
    drawn = scored.draw(found, beta, 1 / 16, thompson=False)
    assert drawn == scored.Drawn(tokens=(8 + 8) * 10, unlocked=1)
    assert scored.draw(found, beta, 1 / 12, False) == scored.Drawn(tokens=8 * 10, unlocked=0)
    # Without a price: all of q.
    assert scored.draw(found, beta, 0.0, False) == scored.Drawn((8 + ALL) * 10, 1)


def test_a_problem_goes_to_its_most_promising_intervention_and_the_cheaper_one():
    found = made([("p", "+"), ("p", "+")])
    found.lengths[1][:] = [1] * ALL
    assert scored.draw(found, [(1.0, 9.0), (2.0, 8.0)], 0.0, False).tokens == 4
    assert scored.draw(found, [(2.0, 8.0), (1.0, 9.0)], 0.0, False).tokens == 40
    # Equal rates: what leaves less to write.
    cheap = made([("p", "+"), ("p", "+")], left=[10.0, 40.0])
    assert scored.draw(cheap, [(1.0, 9.0)] * 2, 0.0, False).tokens == 40
    failed = made([("p", ""), ("p", "+")])
    # 1.1 / 10 falls to 1.1 / 14, below 1 / (10 + half of four failures).
    assert scored.draw(failed, [(1.1, 8.9), (1.0, 9.0)], 0.0, False).tokens == 8 * 10


@pytest.mark.parametrize("thompson", [False, True])
def test_the_price_keeps_what_it_must_and_a_score_pays(thompson):
    numbers = random.Random(1)
    rows, scores = [], []
    for problem in range(60):
        good = problem % 3 == 0
        rate = 0.3 if good else 0.004
        text = "".join("+" if numbers.random() < rate else "." for _ in range(ALL))
        rows.append((f"p{problem}", text))
        scores.append(float(good) + numbers.random())
    found = made(rows)
    found.scores["answer"] = scores
    weights = scored.fit([found], ("answer",))
    assert weights[1] > 0.5
    total = sum(map(any, found.right))
    costs = {}
    for names in ((), ("answer",)):
        prior = scored.fit([found], names)
        floor = scored.price([found], prior, names, thompson)
        drawn = scored.draw(found, scored.posterior(found, prior, names), floor, thompson)
        assert drawn.unlocked >= 0.95 * total
        costs[names] = drawn.tokens
    assert costs[("answer",)] <= costs[()]
