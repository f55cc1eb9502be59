"""Which continuations to draw next: waves, and the rules that end them early.

A decision looks only at the outcomes of earlier waves. So an interrupted run decides as an
uninterrupted one does, and stored outcomes replay any rule exactly: what a rule draws is a prefix
of the same seeded samples.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from intfast.config import InterveneConfig

MEANS = [10 ** (-4 + 4 * i / 40) for i in range(40)]
CONCENTRATIONS = [10 ** (-1 + 4 * i / 24) for i in range(25)]
"""The grid of Beta priors: mean rate, and a + b."""


class Tried(NamedTuple):
    """One intervention and what became of its continuations: sample number -> was it right."""

    problem_id: str
    done: Mapping[int, bool]


def waves(tried_I: Sequence[Tried], config: InterveneConfig) -> Iterator[list[range]]:
    """The samples of each wave, one range per intervention (empty: stopped for good).

    Lazy: the outcomes of a wave must be in `done` when the next one is asked for.
    """
    # How many samples of each the rule has asked for, and which it still goes on with.
    drawn_I = [0] * len(tried_I)
    active_I = [True] * len(tried_I)
    # Which samples make a wave depends on their numbers alone, so a replay cuts the same waves.
    for begin in range(0, config.continuations, config.wave):
        if begin and config.stop != "never":
            active_I = _worth_it(tried_I, drawn_I, active_I, config)
        if not any(active_I):
            return
        end = min(begin + config.wave, config.continuations)
        yield [range(begin, end if on else begin) for on in active_I]
        drawn_I = [end if on else drawn for on, drawn in zip(active_I, drawn_I, strict=True)]


def next_wave(tried_I: Sequence[Tried], config: InterveneConfig) -> list[list[int]]:
    """The samples of each intervention to draw next; all empty when the rule is met."""
    for wave_I in waves(tried_I, config):
        undrawn_I = [
            [sample for sample in wave if sample not in tried.done]
            for wave, tried in zip(wave_I, tried_I, strict=True)
        ]
        if any(undrawn_I):
            return undrawn_I
    return [[] for _ in tried_I]


def _worth_it(
    tried_I: Sequence[Tried], drawn_I: list[int], active_I: list[bool], config: InterveneConfig
) -> list[bool]:
    """Which of the active interventions get another wave."""
    # Outcomes of finished waves only: a wave that is half drawn decides nothing.
    right_I = [sum(t.done[n] for n in range(d)) for t, d in zip(tried_I, drawn_I, strict=True)]
    kept_I = [right >= config.min_correct for right in right_I]
    unlocked = {t.problem_id for t, kept in zip(tried_I, kept_I, strict=True) if kept}
    active_I = [
        on and not kept and not (config.one_per_problem and tried.problem_id in unlocked)
        for on, kept, tried in zip(active_I, kept_I, tried_I, strict=True)
    ]
    # "first_success" knows nothing but what it has seen.
    if config.stop != "futility":
        return active_I
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    left: Counter[str] = Counter()
    for tried, drawn, right, on in zip(tried_I, drawn_I, right_I, active_I, strict=True):
        # Attempts at one problem share its difficulty: their outcomes are pooled.
        before = counts[tried.problem_id]
        counts[tried.problem_id] = (before[0] + right, before[1] + drawn - right)
        left[tried.problem_id] += on * (config.continuations - drawn)
    # One problem more, with one success in a full budget: an early run of failures alone must not
    # talk the prior into a rate of zero.
    prior = fit_beta([*counts.values(), (1, config.continuations - 1)])

    def chance(tried: Tried, drawn: int) -> float:
        # With one success enough for the problem, all draws that are left to it count.
        num = left[tried.problem_id] if config.one_per_problem else config.continuations - drawn
        return chance_of_success(prior, *counts[tried.problem_id], num)

    return [
        on and chance(tried, drawn) >= config.futility
        for tried, drawn, on in zip(tried_I, drawn_I, active_I, strict=True)
    ]


def fit_beta(counts_P: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(a, b) of the Beta prior, from a grid, under which (right, wrong) counts are most likely.

    Stopping at a success does not move it: it leaves the likelihood of what was drawn unchanged.
    """
    return _fit_beta(tuple(sorted(Counter(counts_P).items())))


@lru_cache(maxsize=64)
def _fit_beta(counts: tuple[tuple[tuple[int, int], int], ...]) -> tuple[float, float]:
    def log_likelihood(prior: tuple[float, float]) -> float:
        a, b = prior
        return math.fsum(
            times * (_log_beta(a + right, b + wrong) - _log_beta(a, b))
            for (right, wrong), times in counts
        )

    # A grid and not an optimiser: the same answer on every machine.
    grid = [(mean * k, (1 - mean) * k) for mean in MEANS for k in CONCENTRATIONS]
    return max(grid, key=log_likelihood)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def chance_of_success(prior: tuple[float, float], right: int, wrong: int, num: int) -> float:
    """Probability of a success among `num` more draws, after so many right and wrong ones."""
    a, b = prior[0] + right, prior[1] + wrong
    return 1.0 - math.exp(_log_beta(a, b + num) - _log_beta(a, b))
