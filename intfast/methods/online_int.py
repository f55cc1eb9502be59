"""Online InT, our own: interventions of the current policy, mixed into RL as supervised rows.

Every few steps, groups without a right rollout are verified as in the InT stage: the policy finds
its first wrong step beside the reference, writes another, and continues from it; prefix +
intervention of those that lead to a right answer join the updates of the step, with cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta
from msgspec.structs import replace

from intfast import config, credit, intervene
from intfast.credit import Credit
from intfast.engine.protocol import derive_seed
from intfast.methods.method import Counts, Draws, Method, needs
from intfast.methods.sft_data import build_examples
from intfast.records import Attempt, Example, Problem
from intfast.sample import Rollouts


class OnlineInt(Method):
    """RL on the outcome, and InT where it is silent."""

    class Settings(config.Settings):
        """How often, on how much, and with which weight."""

        every: Annotated[int, Meta(ge=1)] = 1
        """Steps from one proposal to the next."""
        until: Annotated[int, Meta(ge=0)] = 0
        """Last step with a proposal; 0: to the end."""
        attempts: Annotated[int, Meta(ge=1)] = 1
        """Wrong rollouts that are verified, of each group without a right one."""
        continuations: Annotated[int, Meta(ge=1)] = 4
        """From each intervention; one right one keeps it."""
        weight: Annotated[float, Meta(gt=0)] = 1.0
        """Factor of the mean cross-entropy beside the loss of RL."""

    made: Sequence[Example] = ()

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """It needs the groups that are all wrong, and problems as they are."""
        yield from needs(config, "online_int", refill=True)

    @staticmethod
    def draws(config: config.Config, own: Any, num: int) -> Iterator[Draws]:
        """Verifications, guided solutions and continuations where every group fails."""
        rl, stage = config.rl, config.intervene
        last = min(own.until or rl.steps, rl.steps)
        wrong = (last // own.every) * rl.problems_per_step * min(own.attempts, rl.group_size)
        each = stage.samples + stage.guided_solve
        words = f"{wrong:,} wrong rollouts x {each} verifications and guided solutions"
        yield Draws("verification in RL", words, wrong * each, stage.sampling.max_new_tokens)
        words = f"{wrong:,} interventions x {own.continuations} continuations"
        samples = wrong * own.continuations
        yield Draws("continuations in RL", words, samples, stage.continuation.max_new_tokens)

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """The outcome's advantages; proposes where it is time."""
        own, self.made, self.part = self.own, (), 0
        if step % own.every or (own.until and step > own.until):
            return outcome.advantages_P_G, {}
        run, pairs = self.run, []
        for p, (start, group) in enumerate(
            zip(rollouts.starts_P, rollouts.groups_P_G, strict=True)
        ):
            grades = [graded.grade.status for graded in group]
            wrong = [] if "correct" in grades else [g for g, x in enumerate(grades) if x == "wrong"]
            for g in wrong[: own.attempts] if start.problem.reference else []:
                number = p * len(group) + g
                pairs.append((start.problem, run.sampler.attempt(start.problem, number, group[g])))
        seed = derive_seed(run.config.seed, "online", self.stage, step)
        counts = self._propose(pairs, seed)
        return outcome.advantages_P_G, {"interventions_tried": len(pairs)} | counts

    def _propose(self, pairs: Sequence[tuple[Problem, Attempt]], seed: int) -> Counts:
        sampler, stage = self.run.sampler, self.run.config.intervene
        found = sampler.run(intervene.propose(sampler, pairs, stage, seed))
        by_sample = {attempt.sample: (problem, attempt) for problem, attempt in pairs}
        todo = []
        for record in found:
            if record.gate == "passed":
                # Bound now: a closure would see the last one.
                item = (*by_sample[record.attempt], record)
                passed = intervene.Passed(record.problem_id, record.id, lambda item=item: item)
                samples = list(range(self.own.continuations))
                todo.append(intervene.Todo(passed, "intervention", samples))
        drawn = sampler.run(intervene.continue_from(sampler, todo, stage, seed))
        judged = list(intervene.judge(found, drawn, replace(stage, continuations=1)))
        problems = {problem.id: problem for problem, _ in pairs}
        self.made = list(build_examples(sampler, problems, judged, drawn, "recipe"))
        tokens = sum(record.num_tokens for record in found)
        return {
            "interventions_passed": len(todo),
            "interventions_kept": len(self.made),
            "method_tokens": tokens + sum(len(record.token_ids) for record in drawn),
        }

    def rows(self, part: list[Example]) -> list[Example]:
        """The Examples of RL, and this update's share of the interventions."""
        rl = self.run.config.rl
        mine = self.made[self.part :: rl.minibatches]
        self.part += 1
        if not mine:
            return part
        divisor = credit.divisor(part, rl.credit, rl.sampling.max_new_tokens)
        # The sum over all of them becomes `weight` times their mean when it is divided.
        factor = self.own.weight * divisor / sum(sum(example.weights) for example in mine)
        scaled = [replace(x, weights=[factor * weight for weight in x.weights]) for x in mine]
        return part + scaled
