"""Rewards of a group of completions -> advantages -> Examples with per-token weights.

The loss of one update is `sum(weight * token loss) / divisor`, so a normalisation is a choice of
weights (`examples`) and of one number per update (`divisor`). The order of calls is
`group_advantages`, `examples`, `batch.split`, and for each part `divisor`, `with_gradient`,
`batch.pack`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from msgspec import UNSET

from intfast.config import CreditConfig, PolicyConfig
from intfast.engine.protocol import Completion
from intfast.grading.grader import Grade
from intfast.kernels import group_advantages as kernel
from intfast.records import Aimed, Example, Record

EPS = 1e-4
"""Added to a standard deviation before it divides."""
# Ungraded is not wrong: a reward of 0 would teach against an answer nobody could read.
REWARDS = {"correct": 1.0, "wrong": 0.0, "unscored": None}
"""Reward of each grade; None takes no part in baseline and loss."""


def reward(grade: Grade) -> float | None:
    """The reward of a grade: that of its grading function, where it has one of its own."""
    return REWARDS[grade.status] if grade.reward is UNSET else grade.reward


class Credit(Record):
    """Advantages of one step, in the order of the rewards, and what the groups looked like.

    Every group is one of: active, all wrong, all right, unscored.
    """

    advantages_P_G: list[list[float | None]]
    """None where the reward was None."""
    num_active: int
    """Groups with two different rewards."""
    num_all_wrong: int
    """Groups whose scored rewards are equal and <= 0."""
    num_all_right: int
    """Groups whose scored rewards are equal and > 0."""
    num_unscored_groups: int
    """Groups without a scored completion."""
    num_unscored: int
    """Completions without a reward."""

    @property
    def zero_advantage_share(self) -> float:
        """Share of the scored groups that teach nothing; 0 without scored groups."""
        idle = self.num_all_wrong + self.num_all_right
        return idle / max(1, self.num_active + idle)


def group_advantages(
    rewards_P_G: Sequence[Sequence[float | None]],
    config: CreditConfig,
    device: torch.device | str = "cpu",
) -> Credit:
    """Advantages of each group's completions; exactly 0 in a group without variance.

    A reward None (unscored) is left out of baseline and deviation.
    device: where the op of kernels/ runs, in Triton on CUDA; rewards and advantages are fp32
    Raises ValueError on a reward that is not finite.
    """
    # Flat, with offsets: groups may differ in size, and one launch serves them all.
    # Above the lowest of the group, in fp64: what rewards near each other differ by would be lost.
    kept_P = [{reward for reward in group if reward is not None} for group in rewards_P_G]
    is_own = config.scale != "batch"
    low_P = [min(kept) if is_own and len(kept) > 1 else 0.0 for kept in kept_P]
    flat_N = [_finite(p, r) - low_P[p] for p, group in enumerate(rewards_P_G) for r in group]
    sizes_P = [len(group) for group in rewards_P_G]
    found = kernel.group_advantages(
        torch.tensor(flat_N, dtype=torch.float32, device=device),
        torch.tensor([0, *sizes_P], device=device).cumsum(0),
        baseline=config.baseline,
        scale=config.scale,
        eps=EPS,
        # A group of equal rewards is "all right" as soon as these are positive.
        right_above=0.0,
    )
    # One transfer for all five counts.
    num_right, num_wrong, num_active, num_scored, _ = torch.stack(found.counts).tolist()
    groups = zip(rewards_P_G, found.advantage_N.cpu().split(sizes_P), strict=True)
    return Credit(
        advantages_P_G=[
            [None if r is None else a for r, a in zip(group, advantage_G.tolist(), strict=True)]
            for group, advantage_G in groups
        ],
        num_active=num_active,
        num_all_wrong=num_wrong,
        num_all_right=num_right,
        num_unscored_groups=len(rewards_P_G) - num_active - num_wrong - num_right,
        num_unscored=len(flat_N) - num_scored,
    )


def _finite(group: int, reward: float | None) -> float:
    """The reward, NaN for None: what the op takes for unscored."""
    if reward is None:
        return math.nan
    if not math.isfinite(reward):
        raise ValueError(
            f"reward of group {group}: expected a finite number or None, got {reward}; "
            "give None for a completion that could not be graded"
        )
    return reward


def examples(
    prompts_P: Sequence[Sequence[int]],
    completions_P_G: Sequence[Sequence[Completion]],
    advantages_P_G: Sequence[Sequence[float | Sequence[float] | None]],
    config: CreditConfig,
    problem_ids_P: Sequence[str] | None = None,
) -> list[Example]:
    """One Example per completion that takes part in the loss, in order.

    An advantage is a number, or one per sampled token (methods/).
    Left out: advantage None, and with `mask_truncated` finish reason "length". Weight of a sampled
    token: 1, or 1 / number of sampled tokens for "sequence-mean"; of a prompt token: 0. A
    completion without tokens gives an Example without weight: it counts in `divisor`.
    Raises ValueError when the arguments do not belong together.
    """
    ids_P = [""] * len(prompts_P) if problem_ids_P is None else problem_ids_P
    groups = zip(prompts_P, completions_P_G, advantages_P_G, ids_P, strict=True)
    made = []
    for prompt_ids, completions, advantages, problem_id in groups:
        if len(completions) != len(advantages):
            raise ValueError(
                f"group {problem_id!r}: expected one advantage per completion, got "
                f"{len(advantages)} for {len(completions)}; keep both in the engine's order"
            )
        for completion, advantage in zip(completions, advantages, strict=True):
            truncated = completion.finish_reason == "length"
            # Cut at the limit: no outcome of its own, though its reward was in the baseline.
            if advantage is None or (config.mask_truncated and truncated):
                continue
            made.append(_example(prompt_ids, completion, advantage, config, problem_id))
    return made


def _example(
    prompt_ids: Sequence[int],
    completion: Completion,
    advantage: float | Sequence[float],
    config: CreditConfig,
    problem_id: str,
) -> Example:
    length = len(completion.token_ids)
    # GRPO averages within a sequence, DAPO over all tokens, Dr. GRPO divides by a constant: here
    # these weights and the divisor alone tell them apart.
    weight = 1.0 / length if config.normalisation == "sequence-mean" and length else 1.0
    # Prompt tokens were not sampled: no weight, no advantage, no ratio.
    before = [0.0] * len(prompt_ids)
    scalar = isinstance(advantage, (int, float))
    return Example(
        token_ids=[*prompt_ids, *completion.token_ids],
        weights=before + [weight] * length,
        advantages=before + ([advantage] * length if scalar else list(advantage)),
        sampler_logprobs=before + completion.logprobs,
        problem_id=problem_id,
        kind="rollout",
    )


def divisor(examples_N: Sequence[Example], config: CreditConfig, max_new_tokens: int) -> float:
    """The number that the summed loss of one update is divided by.

    Give every Example of the update, those of advantage 0 included.
    "token": sampled tokens; "sequence-mean" and "sequence-sum": sequences (the weights differ);
    "constant": sequences x max_new_tokens (Dr. GRPO).
    Raises ValueError when nothing is left to divide by.
    """
    # Counted over the whole update, by whoever splits it: a mean of means would favour the
    # tokens of small micro-batches.
    if config.normalisation == "token":
        count = sum(weight != 0 for example in examples_N for weight in example.weights)
    elif config.normalisation == "constant":
        # Dr. GRPO: a constant, so that a long wrong answer is not punished less per token.
        count = len(examples_N) * max_new_tokens
    else:
        count = len(examples_N)
    if count == 0:
        raise ValueError(
            f"divisor of {len(examples_N)} examples: expected a sampled token, got none; "
            "every completion was unscored, truncated or empty: look at the grades"
        )
    return float(count)


def with_gradient(examples_N: Sequence[Example], policy: PolicyConfig) -> list[Example]:
    """The Examples that can move the weights; take `divisor` before, it counts all of them.

    Sequences whose advantages are all 0 are dropped, but only where that is exact: with a KL or
    entropy term they have a gradient too, and all are returned; supervised ones and those with a
    goal always teach. May be empty: skip the update.
    """
    if policy.kl != 0 or policy.entropy != 0:
        return list(examples_N)
    return [
        e for e in examples_N if e.advantages is None or isinstance(e, Aimed) or any(e.advantages)
    ]
