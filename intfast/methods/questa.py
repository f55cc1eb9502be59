"""QuestA (arXiv 2507.13266): RL on problems that all show the beginning of their solution.

First half of it, then a quarter; bare problems are never trained on, and a beginning that gives
the answer away stays, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from msgspec import Meta

from intfast import config
from intfast.credit import reward
from intfast.methods import prompts
from intfast.methods.method import Counts, Method, needs
from intfast.sample import Rollouts, Start

SHORTEST = 10
"""Characters below which a beginning is left out."""
Share = Annotated[float, Meta(ge=0, le=1)]


class Questa(Method):
    """Starts behind the problem with so much of its reference, in two halves of the steps."""

    class Settings(config.Settings):
        """The authors'; they train two runs, one after the other, where this switches half-way."""

        first: Share = 0.5
        second: Share = 0.25
        """Share of the reference's characters before and after half of `rl.steps`."""
        low: Share = 0.05
        high: Share = 0.95
        """Groups with a smaller or a larger share of right rollouts are left out."""

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """It sets the hints itself."""
        yield from needs(config, "questa")

    def tasks(self, tasks: list[Start], step: int) -> list[Start]:
        """Every problem with its hint; one without a reference, or without room, stays bare."""
        share = self.own.first if 2 * step <= self.run.config.rl.steps else self.own.second
        sampler, made = self.run.sampler, []
        for task in tasks:
            reference = task.problem.reference or ""
            text = reference[: int(share * len(reference))]
            prompt_ids = prompts.append_hint(sampler.style, task.problem, text)
            shown = len(text) >= SHORTEST
            fits = sampler.fits(len(prompt_ids), self.run.config.rl.sampling)
            made.append(task._replace(prompt_ids=prompt_ids) if shown and fits else task)
        return made

    def after_draw(self, rollouts: Rollouts, step: int) -> tuple[Rollouts, Counts]:
        """Without the groups that are too easy or too hard."""
        kept = []
        for start, group in zip(rollouts.starts_P, rollouts.groups_P_G, strict=True):
            rewards = [reward(graded.grade) for graded in group]
            scored = [reward for reward in rewards if reward is not None]
            share = sum(scored) / max(1, len(scored))
            if scored and self.own.low <= share <= self.own.high:
                kept.append((start, group))
        chosen = rollouts._replace(
            starts_P=[start for start, _ in kept], groups_P_G=[group for _, group in kept]
        )
        return chosen, {"groups_left_out": len(rollouts.starts_P) - len(kept)}
