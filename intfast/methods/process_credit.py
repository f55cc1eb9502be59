"""Credit inside a wrong rollout: the model's own verification locates the first wrong step.

Both rules give one advantage per sampled token, for the same streams as the outcome:

    vppo  tokens up to the located error are rewarded (after arXiv 2601.18984, whose locator is a
          process reward model)
    capo  tokens of the located step are penalised, on top of the outcome (after arXiv 2508.02298,
          whose critic is a larger model)

The locator is the policy in training, so it improves, or drifts, with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from intfast import credit, intervene
from intfast.config import CreditConfig, InterveneConfig
from intfast.credit import Credit
from intfast.engine.protocol import derive_seed
from intfast.records import Attempt, Problem
from intfast.run import Run
from intfast.sample import Graded, Rollouts, Sampler

ROLLOUTS = 2
"""Wrong rollouts of a group that are verified, at most."""
MARGIN = 1.0
"""Tokens right before the wrong step that vppo does not reward, in prompt lengths."""


class Located(NamedTuple):
    """A wrong step: the sampled tokens start .. stop - 1 of a rollout."""

    start: int
    stop: int


TokenAdvantages = list[list[float] | None]
"""Of the completions of a group: one number per sampled token, or None without a reward."""


def vppo(
    rewards_G: Sequence[float | None],
    lengths_G: Sequence[int],
    located_G: Sequence[Located | None],
    margin: int,
    config: CreditConfig,
) -> TokenAdvantages:
    """Token reward minus the group's mean of mean token rewards.

    A token of a wrong rollout that ends at least `margin` tokens before the located step is
    rewarded with `process_weight`, never with less than nothing after the baseline; every other
    token with the outcome of its rollout.
    """
    counts_G = [max(0, found.start - margin) if found else 0 for found in located_G]
    streams = [
        None if reward is None else [config.process_weight] * num + [reward] * (length - num)
        for reward, length, num in zip(rewards_G, lengths_G, counts_G, strict=True)
    ]
    means = [
        math.fsum(stream) / len(stream) if stream else reward
        for reward, stream in zip(rewards_G, streams, strict=True)
        if stream is not None
    ]
    baseline = math.fsum(means) / max(1, len(means))
    centred = [None if s is None else [value - baseline for value in s] for s in streams]
    for stream, num in zip(centred, counts_G, strict=True):
        if stream is not None:
            stream[:num] = [max(0.0, value) for value in stream[:num]]
    return centred


def capo(
    advantages_G: Sequence[float | None],
    lengths_G: Sequence[int],
    located_G: Sequence[Located | None],
    config: CreditConfig,
) -> TokenAdvantages:
    """The outcome's advantage, minus `process_weight` on the tokens of the located step."""
    streams: TokenAdvantages = []
    for advantage, length, found in zip(advantages_G, lengths_G, located_G, strict=True):
        stream = None if advantage is None else [advantage] * length
        if stream is not None and found is not None:
            for token in range(found.start, min(found.stop, length)):
                stream[token] -= config.process_weight
        streams.append(stream)
    return streams


def inside(
    run: Run, rollouts: Rollouts, outcome: Credit, step: int
) -> tuple[Sequence[Any], dict[str, float]]:
    """(advantages_P_G for `credit.examples`, counts for the step's row).

    The advantages of the outcome, one number per rollout, or with `credit.process` one per token.
    """
    config, starts_P, groups_P_G = run.config.rl.credit, rollouts.starts_P, rollouts.groups_P_G
    if config.process == "none":
        return outcome.advantages_P_G, {}
    seed = derive_seed(run.config.seed, "process", step)
    problems_P = [start.problem for start in starts_P]
    located_P_G, counts = locate(run.sampler, problems_P, groups_P_G, run.config.intervene, seed)
    made: list[TokenAdvantages] = []
    rows = zip(starts_P, groups_P_G, outcome.advantages_P_G, located_P_G, strict=True)
    for start, group, advantages_G, located_G in rows:
        lengths_G = [len(graded.completion.token_ids) for graded in group]
        if config.process == "vppo":
            rewards_G = [credit.reward(graded.grade) for graded in group]
            margin = round(MARGIN * len(run.sampler.start_prompt(start)))
            made.append(vppo(rewards_G, lengths_G, located_G, margin, config))
        else:
            made.append(capo(advantages_G, lengths_G, located_G, config))
    return made, counts


def locate(
    sampler: Sampler,
    problems_P: Sequence[Problem],
    groups_P_G: Sequence[Sequence[Graded]],
    verification: InterveneConfig,
    seed: int,
) -> tuple[list[list[Located | None]], dict[str, float]]:
    """The located step of the first ROLLOUTS wrong rollouts of each group, and counts.

    One verification each, read by the same gates as an intervention's: no location, no credit; so
    in a step whose problems have no reference solution.
    """
    wrong: dict[int, tuple[int, int, Problem, Attempt]] = {}
    for p, (problem, group) in enumerate(zip(problems_P, groups_P_G, strict=True)):
        places = [g for g, graded in enumerate(group) if graded.grade.status == "wrong"]
        for g in places[:ROLLOUTS] if problem.reference else []:
            number = p * len(group) + g
            wrong[number] = (p, g, problem, sampler.attempt(problem, number, group[g]))
    pairs = [(problem, attempt) for _, _, problem, attempt in wrong.values()]
    once = msgspec.structs.replace(verification, samples=1, leak_gate=False)
    replies = sampler.run(intervene.propose(sampler, pairs, once, seed)) if pairs else []
    located_P_G: list[list[Located | None]] = [[None] * len(group) for group in groups_P_G]
    for reply in replies:
        if reply.gate == "passed":
            p, g, _, attempt = wrong[reply.attempt]
            stop = len(intervene.answer_so_far(sampler, attempt, reply, "error"))
            located_P_G[p][g] = Located(len(reply.prefix_ids), stop)
    counts = {
        "verified": len(replies),
        "located": sum(reply.gate == "passed" for reply in replies),
        "verify_tokens": sum(reply.num_tokens for reply in replies),
    }
    return located_P_G, counts
