import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from intfast.evaluate import (
    Evaluation,
    bootstrap,
    count_samples,
    coverage,
    pass_at_k,
    wilson,
)
from intfast.study.paired import bootstrap_difference, compare


def enumerated(n: int, c: int, k: int) -> Fraction:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    return Fraction(sum(map(any, draws)), len(draws))


def test_pass_at_k_equals_enumeration():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            assert pass_at_k(n, c, k) == pytest.approx(float(enumerated(n, c, k)), abs=1e-12)


def test_pass_at_k_is_stable_for_large_counts():
    for n, c, k in ((10_000, 1, 5_000), (10_000, 3, 1), (4096, 5, 1024), (128, 127, 2)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-9)
    assert pass_at_k(10_000, 0, 10_000) == 0.0
    assert pass_at_k(10_000, 1, 10_000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_bootstrap_is_deterministic_and_scales_as_it_should():
    rng = np.random.default_rng(5)
    values = rng.normal(3.0, 2.0, size=400).tolist()
    low, high = bootstrap(values, seed=1)
    assert (low, high) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    # The normal interval has half width 1.96 * sd / sqrt(n).
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(np.mean(values), abs=half / 4)
    narrow = bootstrap(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(120):
        low, high = bootstrap(rng.random(40), seed, num=200, level=0.8)
        hits += low <= 0.5 <= high
    assert 0.68 <= hits / 120 <= 0.9


def test_drawing_many_at_once_gives_the_interval_of_one_after_the_other():
    values = np.random.default_rng(0).random(500)
    rng = np.random.default_rng(1)
    means = [values[rng.integers(500, size=500)].mean() for _ in range(2000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap(values.tolist(), seed=1) == tuple(expected)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap([0.25] * 7, seed=3) == (0.25, 0.25)
    assert bootstrap([1.0], seed=3) == (1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0], [2.0]]])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite values"):
        bootstrap(values, seed=0)


@pytest.mark.parametrize("settings", [{"num": 0}, {"level": 1.0}, {"level": 0.0}])
def test_bootstrap_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match="num >= 1 and 0 < level < 1"):
        bootstrap([0.0, 1.0], seed=0, **settings)


def test_pairing_removes_the_spread_between_problems():
    rng = np.random.default_rng(2)
    base = rng.random(50)
    better = base + 0.05 + 0.01 * rng.standard_normal(50)
    paired = bootstrap_difference(better.tolist(), base.tolist(), seed=4)
    assert paired.value == pytest.approx(float(np.mean(better - base)))
    assert 0 < paired.low < paired.value < paired.high < 0.1
    low, high = bootstrap(better, seed=4)
    assert paired.high - paired.low < (high - low) / 5
    with pytest.raises(ValueError, match="same problems"):
        bootstrap_difference([1.0], [1.0, 2.0], seed=0)


def test_wilson_matches_a_published_value_and_stays_inside():
    # Newcombe 1998, 81 of 263: 0.2553 to 0.3662.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = wilson(0, 48)
    assert low == 0.0 and 0.05 < high < 0.1
    assert wilson(48, 48) == pytest.approx((1 - high, 1.0))
    for successes, num in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= successes"):
            wilson(successes, num)


def test_coverage_counts_problems_with_a_right_sample():
    estimate = coverage([(4, 0), (8, 1), (2, 2)])
    assert (estimate.value, estimate.num_problems) == (pytest.approx(2 / 3), 3)
    assert estimate.low < 2 / 3 < estimate.high


def counts(problem_id: str, grades: str, cut: int = 0, tokens: int = 10):
    names = {"c": "correct", "w": "wrong", "u": "unscored"}
    listed = [names[letter] for letter in grades]
    reasons = ["timeout" if grade == "unscored" else grade for grade in listed]
    finish = ["length" if i < cut else "stop" for i in range(len(grades))]
    return count_samples(
        problem_id, listed, reasons, finish, [tokens + i for i in range(len(grades))]
    )


def test_count_samples():
    record = counts("p", "cwwu", cut=2)
    assert (record.correct, record.wrong, record.unscored, record.truncated) == (1, 2, 1, 2)
    assert (record.scored, record.samples, record.mean_tokens) == (3, 4, 11.5)
    assert record.reasons == {"correct": 1, "wrong": 2, "timeout": 1}
    with pytest.raises(ValueError, match=r"'p'.*got 1, 1, 0 and 1"):
        count_samples("p", ["wrong"], ["wrong"], [], [1])
    with pytest.raises(ValueError, match="at least one sample"):
        count_samples("p", [], [], [], [])
    with pytest.raises(ValueError, match=r"unknown grades \['right'\]"):
        count_samples("p", ["right"], ["right"], ["stop"], [1])


def test_summary_by_hand():
    evaluation = Evaluation(
        name="test",
        seed=0,
        problems=[counts("a", "ccww", cut=1), counts("b", "wwww"), counts("c", "cu", tokens=40)],
    )
    summary = evaluation.summary([1, 2, 4])
    # Unscored samples leave the denominator: problem c is 1 of 1.
    assert summary.accuracy.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert summary.pass_at_k[1].value == pytest.approx(0.5)
    assert summary.pass_at_k[1].num_problems == 3
    assert summary.pass_at_k[2].value == pytest.approx((5 / 6 + 0) / 2)
    assert summary.pass_at_k[2].num_problems == 2
    assert summary.pass_at_k[4].value == pytest.approx(0.5)
    assert summary.coverage.value == pytest.approx(2 / 3)
    assert (summary.num_problems, summary.num_samples) == (3, 10)
    assert (summary.truncated, summary.unscored) == (0.1, 0.1)
    assert summary.mean_tokens == pytest.approx((4 * 11.5 + 4 * 11.5 + 2 * 40.5) / 10)
    assert summary.reasons == {"correct": 3, "wrong": 6, "timeout": 1}
    assert summary.accuracy.low <= summary.accuracy.value <= summary.accuracy.high
    assert summary == evaluation.summary([1, 2, 4])
    with pytest.raises(
        ValueError, match="pass@5 needs 5 scored samples of a problem, the most is 4"
    ):
        evaluation.summary([5])


def test_problem_without_a_scored_sample_is_left_out_but_counted():
    evaluation = Evaluation(name="t", seed=0, problems=[counts("a", "cw"), counts("b", "uu")])
    summary = evaluation.summary([1])
    assert evaluation.accuracies() == {"a": 0.5}
    assert summary.accuracy.num_problems == summary.coverage.num_problems == 1
    assert (summary.num_problems, summary.unscored) == (2, 0.5)


def test_summary_needs_a_scored_sample():
    with pytest.raises(ValueError, match="no scored sample"):
        Evaluation(name="x", seed=0, problems=[counts("a", "uu")]).summary([1])
    with pytest.raises(ValueError, match="no scored sample"):
        Evaluation(name="x", seed=0, problems=[]).summary([1])


def test_compare_pairs_by_problem_id_not_by_position():
    run = Evaluation(
        name="run", seed=0, problems=[counts("a", "cc"), counts("b", "cw"), counts("only", "cc")]
    )
    base = Evaluation(
        name="base", seed=0, problems=[counts("u", "cc"), counts("b", "ww"), counts("a", "cw")]
    )
    estimate = compare(run, base)
    assert (estimate.value, estimate.num_problems) == (0.5, 2)
    assert (estimate.low, estimate.high) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no scored problem in common"):
        compare(run, Evaluation(name="other", seed=0, problems=[counts("z", "c")]))
