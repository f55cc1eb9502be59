"""What a method may change of RL on the outcome: where it starts, what is drawn, who is credited.

A method is a subclass of `Method` in a file of its own, with its settings, and a line in
`table.METHODS`; what it does not override is RL on the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from intfast import config
from intfast.credit import Credit
from intfast.model.decoder import Decoder
from intfast.records import Example
from intfast.run import Run
from intfast.sample import Rollouts, Start

Counts = dict[str, Any]
"""For a step's row. `method_tokens` are generated beside the rollouts, `scored_tokens` read."""


class Draws(NamedTuple):
    """The most samples that a stage draws: in words, how many, and the most tokens of each."""

    stage: str
    words: str
    samples: int
    tokens: int


class Method:
    """RL on the outcome, and the hooks of one RL stage; all change nothing here."""

    class Settings(config.Settings):
        """What `rl.method_args` may hold."""

    def __init__(self, run: Run, own: Any, stage: str, frozen: Decoder | None = None) -> None:
        """own: the Settings; stage: its name; frozen: its first policy, where it is kept."""
        self.run, self.own, self.stage, self.frozen = run, own, stage, frozen

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """(setting, whether it is right, what is expected and why) of what the method needs."""
        yield from ()

    @staticmethod
    def draws(config: config.Config, own: Any, num: int) -> Iterator[Draws]:
        """What it generates at most beside rollouts, on `num` problems."""
        yield from ()

    def tasks(self, tasks: list[Start], step: int) -> list[Start]:
        """The stream of starts of a step, without seeds; may draw what the journals lack."""
        return tasks

    def after_draw(self, rollouts: Rollouts, step: int) -> tuple[Rollouts, Counts]:
        """The rollouts that the step learns from."""
        return rollouts, {}

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """advantages_P_G for `credit.examples`: a number a rollout, or one per sampled token."""
        return outcome.advantages_P_G, {}

    def rows(self, part: list[Example]) -> list[Example]:
        """The Examples of one update, with what the method adds to them."""
        return part


def rollout_draws(config: config.Config, stage: str, words: str, share: int = 1) -> Draws:
    """`share` requests for every rollout of the stage, as long as a verification."""
    rl = config.rl
    samples = rl.steps * rl.problems_per_step * rl.group_size * share
    return Draws(stage, words, samples, config.intervene.sampling.max_new_tokens)


def needs(
    config: config.Config, name: str, *, tokens: bool = False, refill: bool = False
) -> Iterator[tuple[str, bool, str]]:
    """Rules of several methods. tokens: one advantage a token; refill: reads all-wrong groups."""
    of = f'rl.method = "{name}"'
    if tokens:
        text = f'not "gspo" with {of}, which has an advantage a token; "gspo" has one a sequence'
        yield "rl.policy.objective", config.rl.policy.objective != "gspo", text
        text = f'"mean" with {of}, which has a baseline of its own'
        yield "rl.credit.baseline", config.rl.credit.baseline == "mean", text
    if refill:
        text = f"0 with {of}, which needs the groups that are all wrong"
        yield "rl.refill", not config.rl.refill, text
    text = f'"off" with {of}, which reads whole solutions or sets the beginning itself'
    yield "rl.hint", config.rl.hint == "off", text
