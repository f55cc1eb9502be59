"""VPPO (arXiv 2601.18984): in a wrong rollout, the tokens before the first wrong step are rewarded.

Its locator is a process reward model; here it is the policy in training, so it improves, or
drifts, with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta

from intfast import config
from intfast.credit import Credit, reward
from intfast.engine.protocol import derive_seed
from intfast.methods import critique
from intfast.methods.method import Counts, Draws, Method, needs, rollout_draws
from intfast.sample import Rollouts


class Vppo(Method):
    """Value 1 on a right rollout, alpha on the rewarded prefix of a wrong one, 0 elsewhere."""

    class Settings(config.Settings):
        """The paper's: margin of a prompt, clamp for instruct models and not for base models."""

        alpha: Annotated[float, Meta(gt=0, lt=1)] = 0.5
        margin: Annotated[float, Meta(ge=0)] = 1.0
        """Tokens right before the wrong step that are not rewarded, in prompt lengths."""
        clamp: bool = True
        """A rewarded token never has an advantage below 0."""

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """Which settings a stream of token advantages cannot work with."""
        yield from needs(config, "vppo", tokens=True, refill=True)
        text = '"none" with rl.method = "vppo", which divides by no deviation'
        yield "rl.credit.scale", config.rl.credit.scale == "none", text

    @staticmethod
    def draws(config: config.Config, own: Any, num: int) -> Iterator[Draws]:
        """One critique of every rollout, at most: all may be wrong."""
        yield rollout_draws(config, "critiques", "one critique of every wrong rollout")

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """One advantage a token; a wrong rollout whose critique cannot be read has no prefix."""
        run, own = self.run, self.own
        seed = derive_seed(run.config.seed, "process", step)
        sampling = run.config.intervene.sampling
        found, counts = critique.locate(run.sampler, rollouts, ["wrong"], 1, sampling, seed)
        made = []
        for p, (start, group) in enumerate(
            zip(rollouts.starts_P, rollouts.groups_P_G, strict=True)
        ):
            margin = round(own.margin * len(run.sampler.start_prompt(start)))
            firsts = [[s[0].start for s in found.get((p, g), []) if s] for g in range(len(group))]
            prefixes = [max(0, first[0] - margin) if first else 0 for first in firsts]
            rewards = [reward(graded.grade) for graded in group]
            lengths = [len(graded.completion.token_ids) for graded in group]
            made.append(advantages(rewards, lengths, prefixes, own))
        located = sum(bool(spans and spans[0]) for spans in found.values())
        return made, counts | {"located": located}


def advantages(
    rewards_G: Sequence[float | None],
    lengths_G: Sequence[int],
    prefixes_G: Sequence[int],
    own: Vppo.Settings,
) -> list[list[float] | None]:
    """Token values minus the group's mean of mean values, clamped on rewarded prefixes.

    prefixes_G  tokens of each rollout that are rewarded with alpha
    """
    rows = zip(rewards_G, lengths_G, prefixes_G, strict=True)
    values = [
        None if reward is None else [own.alpha] * num + [reward] * (length - num)
        for reward, length, num in rows
    ]
    made = critique.centred(values)
    for stream, num in zip(made, prefixes_G, strict=True):
        if stream is not None and own.clamp:
            stream[:num] = [max(0.0, value) for value in stream[:num]]
    return made
