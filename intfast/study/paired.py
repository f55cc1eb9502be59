"""Evaluations beside each other: differences paired by problem, means over seeds and problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from intfast.evaluate import Estimate, Evaluation, estimate


def bootstrap_difference(
    values_P: Sequence[float], baseline_P: Sequence[float], seed: int
) -> Estimate:
    """Mean of value - baseline over the same problems in the same order, with its interval.

    Pairing removes the spread between problems, which is larger than that between methods.
    """
    if len(values_P) != len(baseline_P):
        raise ValueError(
            f"paired values are of the same problems, got {len(values_P)} and {len(baseline_P)}"
        )
    difference_P = [a - b for a, b in zip(values_P, baseline_P, strict=True)]
    return estimate(difference_P, seed)


def bootstrap_seeds(
    values_S_P: Sequence[Sequence[float]], seed: int, num: int = 2000, level: float = 0.95
) -> Estimate:
    """Mean over seeds and problems; in the interval both are drawn again with replacement.

    Rows are repetitions with other seeds on the same problems, in the same order. Of few seeds the
    interval tells little more than their spread; of one seed it is over problems alone.
    """
    values = np.asarray(values_S_P, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite values of seeds x problems, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    seeds, problems = (
        rng.multinomial(count, np.full(count, 1 / count), num) / count for count in values.shape
    )
    means = np.einsum("ns,sp,np->n", seeds, values, problems)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean, num_problems = float(values.mean()), values.shape[1]
    return Estimate(value=mean, low=float(low), high=float(high), num_problems=num_problems)


def compare(run: Evaluation, baseline: Evaluation) -> Estimate:
    """Accuracy of `run` minus that of `baseline` over the problems scored in both, paired."""
    ours, theirs = run.accuracies(), baseline.accuracies()
    shared = [problem_id for problem_id in ours if problem_id in theirs]
    if not shared:
        raise ValueError(f"{run.name!r} and {baseline.name!r} have no scored problem in common")
    return bootstrap_difference([ours[i] for i in shared], [theirs[i] for i in shared], run.seed)
