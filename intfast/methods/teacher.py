"""Self-distillation on policy: the model that has seen more scores what the bare one sampled.

OPSD (arXiv 2601.18734): the teacher is the first policy with the reference in view. SDPO (arXiv
2601.20802): it is the current policy with a right sibling of the rollout in view. Both in the form
of sampled tokens: advantage of a token = teacher's log-prob - student's. The forms over the whole
vocabulary, and moving averages of weights, are not built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from msgspec.structs import replace

from intfast import config
from intfast.credit import Credit
from intfast.engine import scoring
from intfast.methods import prompts
from intfast.methods.method import Counts, Method, needs
from intfast.model.decoder import Decoder
from intfast.records import Problem
from intfast.sample import Graded, Rollouts, Sampler


class Opsd(Method):
    """The frozen first policy, with the reference in view, as the teacher of every rollout."""

    class Settings(config.Settings):
        """Whose reference the teacher sees: the problem's, or, as a control, another's."""

        teacher: Literal["reference", "other"] = "reference"

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """Log-probs of student and teacher must be of the whole distribution."""
        name, sampling = config.rl.method, config.rl.sampling
        yield from needs(config, name, tokens=True)
        text = f'1 with rl.method = "{name}", which compares log-probs of the whole distribution'
        yield "rl.sampling.top_p", sampling.top_p == 1, text
        yield "rl.sampling.top_k", sampling.top_k == 0, text.replace("1 with", "0 with", 1)
        yield "rl.sampling.temperature", sampling.temperature > 0, text.replace("1", "> 0", 1)

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """Teacher's less student's log-prob of every token; 0 where there is no teacher."""
        shown = [
            [self.shown(rollouts, p, g) for g in range(len(group))]
            for p, group in enumerate(rollouts.groups_P_G)
        ]
        decoder = self.frozen or self.run.decoder
        temperature = self.run.config.rl.sampling.temperature
        return advantages(self.run.sampler, decoder, rollouts, shown, temperature)

    def shown(self, rollouts: Rollouts, p: int, g: int) -> str | None:
        """The solution that the teacher of a rollout has in view."""
        others = rollouts.starts_P[p:] + rollouts.starts_P[:p]
        if self.own.teacher == "reference":
            return others[0].problem.reference
        id = others[0].problem.id
        found = (s.problem.reference for s in others if s.problem.id != id and s.problem.reference)
        return next(found, None)


class Sdpo(Opsd):
    """The current policy, with another right rollout of the group in view."""

    class Settings(config.Settings):
        """None of its own."""

    def shown(self, rollouts: Rollouts, p: int, g: int) -> str | None:
        """The first right sibling."""
        group: list[Graded] = rollouts.groups_P_G[p]
        right = (x.text for n, x in enumerate(group) if n != g and x.grade.status == "correct")
        return next(right, None)


def advantages(
    sampler: Sampler,
    decoder: Decoder,
    rollouts: Rollouts,
    shown_P_G: Sequence[Sequence[str | None]],
    temperature: float,
) -> tuple[list[list[list[float]]], Counts]:
    """One advantage a token, by one scoring of each rollout behind its teacher's prompt."""
    asked, sequences = [], []
    made = [[[0.0] * len(x.completion.token_ids) for x in group] for group in rollouts.groups_P_G]
    for p, (start, group) in enumerate(zip(rollouts.starts_P, rollouts.groups_P_G, strict=True)):
        for g, graded in enumerate(group):
            text, ids = shown_P_G[p][g], graded.completion.token_ids
            if text is None or not ids:
                continue
            problem: Problem = replace(start.problem, reference=text)
            prompt_ids = prompts.rationalise(sampler.style, problem)
            whole = [*prompt_ids, *start.answer_ids, *ids]
            if len(whole) <= sampler.context:
                asked.append((p, g, len(ids), graded.completion.logprobs))
                sequences.append(whole)
    total, size = 0.0, 0
    scored = scoring.score(decoder, sequences, temperature)
    for (p, g, num, student), teacher in zip(asked, scored, strict=True):
        made[p][g] = [t - s for t, s in zip(teacher[-num:], student, strict=True)]
        total, size = total + sum(made[p][g]), size + num
    return made, {
        "taught": len(asked),
        "teacher_gap": total / max(1, size),
        "scored_tokens": sum(map(len, sequences)),
    }
