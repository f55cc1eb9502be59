"""LaSeR (arXiv 2510.14943): the log-prob of a reserved last token is the model's own reward.

Behind the end token of a rollout stands one more token z. Its score r_s = beta (log-prob - c), with
c the first policy's mean, is fitted to the outcome by a squared loss beside that of RL, and after a
warm-up takes part in the advantage. c is measured in the first step and not configured.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta

from intfast import config, credit
from intfast.credit import REWARDS, Credit
from intfast.methods.method import Counts, Method
from intfast.model.decoder import Decoder
from intfast.records import Aimed, Example
from intfast.run import Run
from intfast.sample import Graded, Rollouts, Sampler

_CONTROL = re.compile(r"[<\[][^<>\[\]]+[>\]]")
Positive = Annotated[float, Meta(gt=0)]
Step = Annotated[int, Meta(ge=0)]


class Laser(Method):
    """Rows for z with the log-prob that they should have, and the advantage of its score."""

    class Settings(config.Settings):
        """The paper's, without its second warm-up for base models (`from_step` = 200)."""

        token: str = ""
        """z; by default the first control token that neither ends an answer nor is in a prompt."""
        beta: Positive = 0.1
        weight: Positive = 0.1
        """Factor of the squared loss."""
        share: Annotated[float, Meta(ge=0, le=1)] = 0.1
        """Of the score in the advantage, from step `mix_from_step` on."""
        from_step: Step = 0
        mix_from_step: Step = 200
        spread: Annotated[float, Meta(ge=0)] = 0.1
        """Least deviation of a group's scores that takes part."""

    def __init__(self, run: Run, own: Any, stage: str, frozen: Decoder | None = None) -> None:
        super().__init__(run, own, stage, frozen)
        self.z = reserved(run.sampler, run.sampler.prompt(run.problems[0]), own.token)
        self.constant: float | None = None

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """A row that was not sampled enters no ratio of a sequence, and log-probs are whole."""
        policy, sampling = config.rl.policy, config.rl.sampling
        of = 'with rl.method = "laser"'
        text = f'not "gspo" {of}; the row of z would enter the ratio of its sequence'
        yield "rl.policy.objective", policy.objective != "gspo", text
        is_token = policy.correction == "off" or policy.correction_level == "token"
        yield "rl.policy.correction_level", is_token, f'"token" {of}, for the same reason'
        text = f"1 {of}, whose scores are log-probs of the policy itself"
        yield "rl.sampling.temperature", sampling.temperature == 1, text

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """The outcome's advantages, later mixed with the scores'; notes what z should be."""
        run, own, groups = self.run, self.own, rollouts.groups_P_G
        scores, flat = {}, []
        for p, (start, group) in enumerate(zip(rollouts.starts_P, groups, strict=True)):
            prompt_ids = run.sampler.start_prompt(start)
            flat += [
                (p, g, [*prompt_ids, *x.completion.token_ids])
                for g, x in enumerate(group)
                if _ended(x)
            ]
        last = [
            found[-1] for found in run.sampler.engine.score([[*ids, self.z] for _, _, ids in flat])
        ]
        if self.constant is None:
            self.constant = self._measured(last)
        for (p, g, _), logprob in zip(flat, last, strict=True):
            scores[p, g] = own.beta * (logprob - self.constant)
        graded = [
            (ids, REWARDS[groups[p][g].grade.status], scores[p, g])
            for p, g, ids in flat
            if REWARDS[groups[p][g].grade.status] is not None
        ]
        weights = class_weights([reward for _, reward, _ in graded])
        # By their tokens: what is dealt to updates has no place of its own.
        self.wanted = {
            tuple(ids): (weight / len(graded), self.constant + reward / own.beta)
            for (ids, reward, _), weight in zip(graded, weights, strict=True)
        }
        self.step = step
        counts = {
            "self_constant": self.constant,
            "self_f1": f1([(reward > 0.5, score > 0.5) for _, reward, score in graded]),
            "scored_tokens": sum(len(ids) + 1 for *_, ids in flat),
        }
        if step <= own.mix_from_step or not own.share:
            return outcome.advantages_P_G, counts
        clipped = [
            [
                None
                if REWARDS[x.grade.status] is None
                else min(1.0, max(0.0, scores.get((p, g), 0.0)))
                for g, x in enumerate(group)
            ]
            for p, group in enumerate(groups)
        ]
        return mixed(outcome.advantages_P_G, clipped, own, run.config.rl.credit), counts

    def rows(self, part: list[Example]) -> list[Example]:
        """The Examples with a row for z behind those that ended; it counts in no divisor."""
        if self.step <= self.own.from_step or not self.wanted:
            return part
        rl = self.run.config.rl
        factor = self.own.weight * self.own.beta**2
        factor *= credit.divisor(part, rl.credit, rl.sampling.max_new_tokens)
        # Of the step, dealt to its updates: a mean over each would weigh small ones more.
        factor *= rl.minibatches
        made = []
        for example in part:
            weight, goal = self.wanted.get(tuple(example.token_ids), (0.0, 0.0))
            if weight:
                example = Aimed(
                    token_ids=[*example.token_ids, self.z],
                    weights=[*example.weights, factor * weight],
                    advantages=[*example.advantages, 0.0],
                    sampler_logprobs=[*example.sampler_logprobs, 0.0],
                    problem_id=example.problem_id,
                    kind=example.kind,
                    goal=goal,
                )
            made.append(example)
        return made

    def _measured(self, last: Sequence[float]) -> float:
        """c: of the first step, also in a run that continues."""
        rows = [row for row in self.run.metrics.rows(self.stage) if "self_constant" in row]
        if rows:
            return rows[0]["self_constant"]
        if not last:
            raise ValueError('rl.method = "laser": no rollout of the first step ended by itself')
        found, most = statistics.fmean(last), -1 / self.own.beta - 2
        if found > most:
            raise ValueError(
                'rl.method = "laser": expected a mean log-prob of the token below -1/beta - 2 = '
                f"{most:g}, got {found:.2f}; set rl.method_args.token to a rarer token, or a "
                "larger rl.method_args.beta"
            )
        return found


def reserved(sampler: Sampler, prompt_ids: Sequence[int], named: str) -> int:
    """The id of z: the named token, else the first control token that is free.

    Raises ValueError where it ends answers or is in a prompt, or where there is none.
    """
    tokenizer = sampler.tokenizer
    taken = {*sampler.style.stop_ids, tokenizer.pad_token_id, *prompt_ids}
    words = tokenizer.get_vocab()
    # Those that the tokenizer flags first; else words that look like one.
    marked = (id for word, id in words.items() if _CONTROL.fullmatch(word))
    order = [*sorted(tokenizer.added_tokens_decoder), *sorted(marked)]
    if named:
        order = [words[named]] if named in words else []
    free = [id for id in order if id not in taken]
    if not free:
        raise ValueError(
            "rl.method_args.token: expected one token of the tokenizer that neither ends an answer "
            f"nor is in a prompt, got {named!r}"
        )
    return free[0]


def class_weights(rewards: Sequence[float]) -> list[float]:
    """(right + wrong) / (2 x number of the own class), so that both classes weigh the same."""
    num, right = len(rewards), sum(reward > 0.5 for reward in rewards)
    return [num / (2 * (right if reward > 0.5 else num - right)) for reward in rewards]


def mixed(
    advantages_P_G: Sequence[Sequence[float | None]],
    scores_P_G: Sequence[Sequence[float | None]],
    own: Laser.Settings,
    config: config.CreditConfig,
) -> list[list[float | None]]:
    """(1 - share) of the outcome's advantage and `share` of the score's, by the same rules.

    A group whose scores deviate less than `spread` keeps the outcome's.
    """
    by_score, made = credit.group_advantages(scores_P_G, config).advantages_P_G, []
    for outcome, scored, scores in zip(advantages_P_G, by_score, scores_P_G, strict=True):
        known = [score for score in scores if score is not None]
        share = own.share if len(known) > 1 and statistics.stdev(known) >= own.spread else 0.0
        pairs = zip(outcome, scored, strict=True)
        made.append([None if a is None else (1 - share) * a + share * b for a, b in pairs])
    return made


def f1(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Of (is right, is scored right): harmonic mean of precision and recall; 0 without either."""
    both, either = sum(a and b for a, b in pairs), sum(a + b for a, b in pairs)
    return 2 * both / either if either else 0.0


def _ended(graded: Graded) -> bool:
    return graded.completion.finish_reason == "stop"
