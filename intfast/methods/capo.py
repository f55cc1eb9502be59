"""CAPO (arXiv 2508.02298): token rewards, the outcome's less a penalty on every wrong step.

Its critic is a larger model that votes; here it is the policy in training. Whether the paper's
statistic runs over all tokens of a group or per position is not known: here it is the group's mean
of the rollouts' means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from intfast import config
from intfast.credit import Credit, reward
from intfast.engine.protocol import derive_seed
from intfast.methods import critique
from intfast.methods.critique import Span
from intfast.methods.method import Counts, Draws, Method, needs, rollout_draws
from intfast.sample import Rollouts


class Capo(Method):
    """Token reward `whole` x outcome - `process` x [the token is in a wrong step]."""

    class Settings(config.Settings):
        """The paper's, but for one vote where it has four."""

        whole: Annotated[float, Meta(gt=0)] = 2.0
        process: Annotated[float, Meta(gt=0)] = 1.0
        votes: Annotated[int, Meta(ge=1)] = 1
        """Critiques of a rollout."""
        vote: Literal["intersection", "majority", "union"] = "intersection"
        """Steps that count as wrong: named by all, by more than half, by any."""
        on: Literal["all", "wrong"] = "all"
        """Rollouts that are criticised: right ones too, or wrong ones alone."""

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """Which settings a stream of token advantages cannot work with."""
        yield from needs(config, "capo", tokens=True, refill=True)
        text = '"none" or "group" with rl.method = "capo", which scales by the rollouts\' means'
        yield "rl.credit.scale", config.rl.credit.scale in ("none", "group"), text
        sampling = config.intervene.sampling
        are_different = own.votes == 1 or (sampling.temperature > 0 and sampling.top_k != 1)
        text = "a temperature > 0 with several votes, which would be equal"
        yield "intervene.sampling.temperature", are_different, text

    @staticmethod
    def draws(config: config.Config, own: Any, num: int) -> Iterator[Draws]:
        """`votes` critiques of every rollout."""
        words = f"{own.votes} critiques of every rollout"
        yield rollout_draws(config, "critiques", words, own.votes)

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """One advantage a token, in right rollouts too."""
        run, own = self.run, self.own
        seed = derive_seed(run.config.seed, "process", step)
        grades = ["correct", "wrong"] if own.on == "all" else ["wrong"]
        sampling = run.config.intervene.sampling
        found, counts = critique.locate(run.sampler, rollouts, grades, own.votes, sampling, seed)
        chosen = {place: voted(spans, own.vote) for place, spans in found.items()}
        made = []
        for p, group in enumerate(rollouts.groups_P_G):
            rewards = [
                token_rewards(
                    reward(graded.grade),
                    len(graded.completion.token_ids),
                    chosen.get((p, g), []),
                    own,
                )
                for g, graded in enumerate(group)
            ]
            made.append(critique.centred(rewards, run.config.rl.credit.scale))
        return made, counts | {"located": sum(map(bool, chosen.values()))}


def voted(critiques: Sequence[Sequence[Span]], rule: str) -> list[Span]:
    """The steps on which the critiques of one rollout agree, in order."""
    counted = Counter(span for spans in critiques for span in set(spans))
    least = {"intersection": len(critiques), "majority": len(critiques) // 2 + 1, "union": 1}[rule]
    return sorted(span for span, count in counted.items() if count >= least)


def token_rewards(
    reward: float | None, length: int, wrong: Sequence[Span], own: Capo.Settings
) -> list[float] | None:
    """The reward of each sampled token; None for a rollout that could not be graded."""
    if reward is None:
        return None
    made = [own.whole * reward] * length
    for span in wrong:
        for token in range(span.start, min(span.stop, length)):
            made[token] -= own.process
    return made
