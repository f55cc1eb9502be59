"""Statistics of graded samples: accuracy, pass@k, coverage, each with an interval over problems.

Only counts come in; sampling and grading happen elsewhere. Unscored samples (see answers.py) count
in neither numerator nor denominator, and their share is reported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from msgspec import UNSET, UnsetType

from intfast.records import Record, Reward


class Estimate(Record):
    """A mean over problems and its interval. Example: Estimate(value=0.5, low=0.4, high=0.6,
    num_problems=30)."""

    value: float
    low: float
    high: float
    num_problems: int


class ProblemCounts(Record):
    """What became of the samples of one problem.

    Example: ProblemCounts(problem_id="aime-1", correct=1, wrong=2, unscored=1, truncated=0,
    reasons={"correct": 1, "wrong": 2, "timeout": 1}, mean_tokens=512.0)
    """

    problem_id: str
    correct: int
    wrong: int
    unscored: int
    truncated: int
    """Samples cut at the token limit, whatever their grade."""
    reasons: dict[str, int]
    mean_tokens: float
    reward: Reward = UNSET
    """Mean over scored samples, where it is not the share of right ones."""

    @property
    def scored(self) -> int:
        return self.correct + self.wrong

    @property
    def samples(self) -> int:
        return self.scored + self.unscored


class Summary(Record):
    """The figures of one evaluation; shares are of all samples, scored or not."""

    num_problems: int
    num_samples: int
    accuracy: Estimate
    pass_at_k: dict[int, Estimate]
    coverage: Estimate
    truncated: float
    unscored: float
    mean_tokens: float
    reasons: dict[str, int]
    reward: Estimate | UnsetType = UNSET
    """Mean reward, where a function gives others than 0 and 1."""


def count_samples(
    problem_id: str,
    grades: Sequence[str],
    reasons: Sequence[str],
    finish_reasons: Sequence[str],
    num_tokens: Sequence[int],
    rewards: Sequence[float | None] = (),
) -> ProblemCounts:
    """The counts of one problem; all sequences have one entry per sample, but that `rewards` may
    be left out where they are 1 and 0."""
    if not len(grades) == len(reasons) == len(finish_reasons) == len(num_tokens) > 0:
        raise ValueError(
            f"problem {problem_id!r}: expected one grade, reason, finish reason and length per "
            f"sample and at least one sample, got {len(grades)}, {len(reasons)}, "
            f"{len(finish_reasons)} and {len(num_tokens)}"
        )
    # A sample that could not be graded is neither right nor wrong, and counts as neither.
    by_grade = Counter(map(str, grades))
    unknown = by_grade.keys() - {"correct", "wrong", "unscored"}
    if unknown:
        raise ValueError(f"problem {problem_id!r}: unknown grades {sorted(unknown)}")
    scored = [reward for reward in rewards if reward is not None]
    mean = math.fsum(scored) / max(1, len(scored))
    return ProblemCounts(
        problem_id=problem_id,
        correct=by_grade["correct"],
        wrong=by_grade["wrong"],
        unscored=by_grade["unscored"],
        truncated=sum(reason == "length" for reason in finish_reasons),
        reasons=dict(Counter(map(str, reasons))),
        mean_tokens=sum(num_tokens) / len(num_tokens),
        reward=UNSET if math.fsum(scored) == by_grade["correct"] or not scored else mean,
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is right, from c right ones of n.

    1 - C(n - c, k) / C(n, k), as a product of ratios; arXiv:2107.03374.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    # Fewer wrong samples than draws: one of any k is right.
    if n - c < k:
        return 1.0
    # A product of ratios: the binomials themselves overflow for a few hundred samples.
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def bootstrap(
    values_P: Sequence[float], seed: int, num: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean when problems are drawn again with replacement.

    It has no width when all values are equal: it then says nothing about unseen problems.
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"bootstrap needs finite values of at least one problem, got {values_P}")
    if num < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs num >= 1 and 0 < level < 1, got {num} and {level}")
    # The seed is the run's: the same records give the same interval again.
    rng = np.random.default_rng(seed)
    # Many draws at once, but never more than a few megabytes of them.
    rows = max(1, (1 << 18) // len(values))
    parts = [
        values[rng.integers(len(values), size=(min(rows, num - done), len(values)))].mean(axis=1)
        for done in range(0, num, rows)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(successes: int, num: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share of `num` problems; it keeps its width at 0 and 1."""
    if not 0 <= successes <= num or num < 1:
        raise ValueError(f"expected 0 <= successes <= num and num >= 1, got {successes} of {num}")
    # A share of 0 of 20 is not certain to be 0; the bootstrap would give it no width.
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, z2_n = successes / num, z * z / num
    centre = share + z2_n / 2
    half = z * math.sqrt(share * (1 - share) / num + z2_n / (4 * num))
    return max(0.0, (centre - half) / (1 + z2_n)), min(1.0, (centre + half) / (1 + z2_n))


def coverage(counts_P: Sequence[tuple[int, int]]) -> Estimate:
    """Share of problems, given as (n, c), with at least one right sample."""
    # Any right sample of a problem, however many were drawn.
    solved = sum(c > 0 for _, c in counts_P)
    low, high = wilson(solved, len(counts_P))
    return Estimate(value=solved / len(counts_P), low=low, high=high, num_problems=len(counts_P))


class Evaluation(Record):
    """The counts of one evaluation, by problem. `name` says of which model on which problems."""

    name: str
    seed: int
    """Seed of the intervals."""
    problems: list[ProblemCounts]

    def accuracies(self) -> dict[str, float]:
        """Share of right samples of each problem that has scored ones: avg@n by problem id."""
        return {p.problem_id: p.correct / p.scored for p in self.problems if p.scored}

    def mean_rewards(self) -> list[float]:
        """Of each problem that has scored samples; [] where they are the accuracies."""
        scored = [p for p in self.problems if p.scored]
        if all(p.reward is UNSET for p in scored):
            return []
        return [p.correct / p.scored if p.reward is UNSET else p.reward for p in scored]

    def summary(self, ks: Sequence[int]) -> Summary:
        """All figures. A problem with fewer than k scored samples is left out of pass@k, which
        says how many problems it stands for.

        Raises ValueError without problems, without scored samples, or when k is above the
        samples of every problem.
        """
        # A problem whose samples all went ungraded says nothing about the model.
        counts_P = [(p.scored, p.correct) for p in self.problems if p.scored]
        if not counts_P:
            raise ValueError(f"evaluation {self.name!r} has no scored sample")
        # Shares below are of samples; accuracy and pass@k are means over problems.
        samples = sum(p.samples for p in self.problems)
        # Why answers were wrong or ungraded, over all problems.
        reasons: Counter[str] = Counter()
        for problem in self.problems:
            reasons.update(problem.reasons)
        return Summary(
            num_problems=len(self.problems),
            num_samples=samples,
            accuracy=estimate(list(self.accuracies().values()), self.seed),
            pass_at_k={k: self._pass_at_k(counts_P, k) for k in ks},
            coverage=coverage(counts_P),
            truncated=sum(p.truncated for p in self.problems) / samples,
            unscored=sum(p.unscored for p in self.problems) / samples,
            mean_tokens=sum(p.mean_tokens * p.samples for p in self.problems) / samples,
            reasons=dict(reasons),
            reward=estimate(rewards, self.seed) if (rewards := self.mean_rewards()) else UNSET,
        )

    def _pass_at_k(self, counts_P: Sequence[tuple[int, int]], k: int) -> Estimate:
        # With fewer scored samples than k there is no unbiased estimate for the problem.
        values_P = [pass_at_k(n, c, k) for n, c in counts_P if n >= k]
        if not values_P:
            most = max(n for n, _ in counts_P)
            raise ValueError(f"pass@{k} needs {k} scored samples of a problem, the most is {most}")
        return estimate(values_P, self.seed)


def estimate(values_P: Sequence[float], seed: int) -> Estimate:
    """Mean over problems with its bootstrap interval."""
    # Over problems, not over samples: those of one problem are alike.
    low, high = bootstrap(values_P, seed)
    return Estimate(
        value=math.fsum(values_P) / len(values_P), low=low, high=high, num_problems=len(values_P)
    )
