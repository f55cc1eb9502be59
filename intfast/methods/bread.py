"""BREAD (arXiv 2506.17211): where a whole group fails, it is drawn again from behind a prefix.

The beginning of the reference stands in the answer, so it is prompt to the loss, and every update
holds a right rollout where any beginning leads to one. How the paper adapts its length is not
known to us: here it is the shortest of guided.SHARES from which one rollout of the group is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intfast import config
from intfast.engine.protocol import derive_seed
from intfast.leak import leaks
from intfast.methods.guided import SHARES, beginning
from intfast.methods.method import Counts, Draws, Method, needs
from intfast.sample import Graded, Rollouts, Start
from intfast.tokens import encode


class Bread(Method):
    """A group without a right rollout is replaced by one that goes on from the reference."""

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """It takes the groups that dynamic sampling drops."""
        yield from needs(config, "bread", refill=True)

    @staticmethod
    def draws(config: config.Config, own: Any, num: int) -> Iterator[Draws]:
        """Every group again from every share, at most."""
        rl = config.rl
        samples = rl.steps * rl.problems_per_step * rl.group_size * len(SHARES)
        words = f"{len(SHARES)} beginnings of the reference for every group that fails"
        yield Draws("branches", words, samples, rl.sampling.max_new_tokens)

    def after_draw(self, rollouts: Rollouts, step: int) -> tuple[Rollouts, Counts]:
        """The groups, those that failed replaced where a beginning helps."""
        run, num_tokens = self.run, 0
        starts_P, groups_P_G = list(rollouts.starts_P), list(rollouts.groups_P_G)
        pending = [p for p, group in enumerate(groups_P_G) if _failed(group)]
        failed = len(pending)
        for share in SHARES:
            branches = {p: b for p in pending if (b := self._branch(starts_P[p], share, step, p))}
            drawn = run.sampler.sample(list(branches.values()), run.config.rl.sampling)
            num_tokens += sum(len(g.completion.token_ids) for group in drawn for g in group)
            for (p, branch), group in zip(branches.items(), drawn, strict=True):
                if any(graded.grade.status == "correct" for graded in group):
                    starts_P[p], groups_P_G[p] = branch, group
                    pending.remove(p)
        found = rollouts._replace(starts_P=starts_P, groups_P_G=groups_P_G)
        counts = {"groups_failed": failed, "groups_branched": failed - len(pending)}
        return found, counts | {"method_tokens": num_tokens}

    def _branch(self, start: Start, share: float, step: int, p: int) -> Start | None:
        """The start behind so much of the reference; None where that leaks or leaves no room."""
        sampler, problem = self.run.sampler, start.problem
        text = beginning(problem.reference or "", share)
        if not text or leaks(text, problem.answer):
            return None
        seed, num = self.run.config.seed, len(start.seeds)
        branch = start._replace(
            seeds=[derive_seed(seed, "bread", step, p, share, g) for g in range(num)],
            answer_ids=encode(sampler.tokenizer, sampler.style.lead + text),
        )
        length = len(sampler.start_prompt(branch))
        return branch if sampler.fits(length, self.run.config.rl.sampling) else None


def _failed(group: list[Graded]) -> bool:
    grades = {graded.grade.status for graded in group}
    return "wrong" in grades and "correct" not in grades
