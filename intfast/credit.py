"""Rewards of a group of completions -> advantages -> Examples with per-token weights.

The loss of one update is `sum(weight * token loss) / divisor`, so a normalisation is a choice of
weights (`examples`) and of one number per update (`divisor`). The order of calls is
`group_advantages`, `examples`, `batch.split`, and for each part `divisor`, `with_gradient`,
`batch.pack`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from intfast.engine.protocol import Completion
from intfast.records import Example, Record
from intfast.settings.numerics import CreditConfig, PolicyConfig

REWARDS = {"correct": 1.0, "wrong": 0.0, "unscored": None}
"""Reward of each grade; None takes no part in baseline and loss."""


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


def group_advantages(rewards_P_G: Sequence[Sequence[float | None]], config: CreditConfig) -> Credit:
    """Advantages of each group's completions; exactly 0 in a group without variance.

    A reward None (unscored) is left out of baseline and deviation.
    Raises ValueError on a reward that is not finite.
    """
    scored_P = [_scored(index, group) for index, group in enumerate(rewards_P_G)]
    batch_std = _std([reward for scored in scored_P for reward in scored], ddof=1)
    flat_P = [scored[0] for scored in scored_P if scored and max(scored) == min(scored)]
    num_right = sum(reward > 0 for reward in flat_P)
    num_groups = sum(bool(scored) for scored in scored_P)
    return Credit(
        advantages_P_G=[
            _advantages(group, scored, batch_std, config)
            for group, scored in zip(rewards_P_G, scored_P, strict=True)
        ],
        num_active=num_groups - len(flat_P),
        num_all_wrong=len(flat_P) - num_right,
        num_all_right=num_right,
        num_unscored_groups=len(scored_P) - num_groups,
        num_unscored=sum(map(len, rewards_P_G)) - sum(map(len, scored_P)),
    )


def _scored(index: int, group: Sequence[float | None]) -> list[float]:
    scored = [reward for reward in group if reward is not None]
    for reward in scored:
        if not math.isfinite(reward):
            raise ValueError(
                f"reward of group {index}: expected a finite number or None, got {reward}; "
                "give None for a completion that could not be graded"
            )
    return scored


def _std(values: list[float], ddof: int) -> float:
    """Standard deviation by centred sums; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - ddof))


def _advantages(
    group: Sequence[float | None], scored: list[float], batch_std: float, config: CreditConfig
) -> list[float | None]:
    # Equality decides, not a small deviation: rounding of the mean divided by eps is not credit.
    if not scored or max(scored) == min(scored):
        return [None if reward is None else 0.0 for reward in group]
    mean = math.fsum(scored) / len(scored)
    # reward - mean of the others = (reward - mean of all) * n / (n - 1)
    factor = len(scored) / (len(scored) - 1) if config.baseline == "leave-one-out" else 1.0
    if config.scale == "group":
        factor /= _std(scored, ddof=1) + config.eps
    elif config.scale == "group-population":
        factor /= _std(scored, ddof=0) + config.eps
    elif config.scale == "batch":
        factor /= batch_std + config.eps
    return [None if reward is None else (reward - mean) * factor for reward in group]


def examples(
    prompts_P: Sequence[Sequence[int]],
    completions_P_G: Sequence[Sequence[Completion]],
    advantages_P_G: Sequence[Sequence[float | Sequence[float] | None]],
    config: CreditConfig,
    problem_ids_P: Sequence[str] | None = None,
) -> list[Example]:
    """One Example per completion that takes part in the loss, in order.

    An advantage is a number, or one per sampled token (process_credit).
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
    if not prompt_ids:
        raise ValueError(
            f"group {problem_id!r}: expected a prompt of at least one token, got none; "
            "the first sampled token would have nothing to be predicted from"
        )
    if len(completion.logprobs) != length:
        raise ValueError(
            f"group {problem_id!r}: expected one log-prob per sampled token, got "
            f"{len(completion.logprobs)} for {length}; let the engine return them"
        )
    weight = 1.0 / length if config.normalisation == "sequence-mean" and length else 1.0
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
    if config.normalisation == "token":
        count = sum(weight != 0 for example in examples_N for weight in example.weights)
    elif config.normalisation == "constant":
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
    entropy term they have a gradient too, and all are returned. May be empty: skip the update.
    """
    if not policy.zero_advantage_is_zero_gradient:
        return list(examples_N)
    return [example for example in examples_N if example.advantages and any(example.advantages)]
