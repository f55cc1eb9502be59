"""LaSeR (arXiv 2510.14943): the log-prob of a reserved last token is the model's own reward.

Behind a rollout's end token stands one more, z. Its score r_s = beta (log-prob - c), c the measured
mean of the first policy, is fitted to the outcome beside RL, and later mixed into the advantage.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta

from intfast import config, credit
from intfast.credit import Credit, reward
from intfast.methods.method import Counts, Method
from intfast.model.decoder import Decoder
from intfast.records import Aimed, Example
from intfast.run import Run
from intfast.sample import Rollouts, Sampler

_CONTROL = re.compile(r"[<\[][^<>\[\]]+[>\]]")


class Laser(Method):
    """Rows for z with the log-prob that they should have, and the advantage of its score."""

    class Settings(config.Settings):
        """The paper's, without its second warm-up for base models (`from_step` = 200)."""

        token: str = ""
        """z; by default the first control token that neither ends an answer nor is in a prompt."""
        beta: Annotated[float, Meta(gt=0)] = 0.1
        weight: Annotated[float, Meta(gt=0)] = 0.1
        """Factor of the squared loss."""
        share: Annotated[float, Meta(ge=0, le=1)] = 0.1
        """Of the score in the advantage, from step `mix_from_step` on."""
        from_step: Annotated[int, Meta(ge=0)] = 0
        mix_from_step: Annotated[int, Meta(ge=0)] = 200
        spread: Annotated[float, Meta(ge=0)] = 0.1
        """Least deviation of a group's scores that takes part."""

    def __init__(self, run: Run, own: Any, stage: str, frozen: Decoder | None = None) -> None:
        super().__init__(run, own, stage, frozen)
        self.z = reserved(run.sampler, run.sampler.prompt(run.problems[0]), own.token)
        self.constant: float | None = None

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """A row that was not sampled enters no ratio of a sequence, and log-probs are whole."""
        policy, of = config.rl.policy, 'with rl.method = "laser"'
        text = f'not "gspo" {of}; the row of z would enter the ratio of its sequence'
        yield "rl.policy.objective", policy.objective != "gspo", text
        is_token = policy.correction == "off" or policy.correction_level == "token"
        yield "rl.policy.correction_level", is_token, f'"token" {of}, for the same reason'
        text = f"1 {of}, whose scores are log-probs of the policy itself"
        yield "rl.sampling.temperature", config.rl.sampling.temperature == 1, text

    def credit(
        self, rollouts: Rollouts, outcome: Credit, step: int
    ) -> tuple[Sequence[Any], Counts]:
        """The outcome's advantages, later mixed with the scores'; notes what z should be."""
        own, groups, self.step = self.own, rollouts.groups_P_G, step
        rewards = [[reward(graded.grade) for graded in group] for group in groups]
        # Truncated rollouts have no z.
        ended = [
            (p, g, [*self.run.sampler.start_prompt(start), *graded.completion.token_ids])
            for p, start in enumerate(rollouts.starts_P)
            for g, graded in enumerate(groups[p])
            if graded.completion.finish_reason == "stop" and rewards[p][g] is not None
        ]
        found = self.run.sampler.engine.score([[*ids, self.z] for *_, ids in ended])
        last = [logprobs[-1] for logprobs in found]
        if self.constant is None:
            self.constant = self._measured(last)
        score = [own.beta * (logprob - self.constant) for logprob in last]
        earned = [rewards[p][g] for p, g, _ in ended]
        goals = zip(ended, class_weights(earned), earned, strict=True)
        # By their tokens: what is dealt to updates has no place of its own.
        self.wanted = {
            tuple(ids): (weight / len(ended), self.constant + r / own.beta)
            for (*_, ids), weight, r in goals
        }
        agreed = [(r > 0.5) + (s > 0.5) for r, s in zip(earned, score, strict=True)]
        counts = {
            "self_constant": self.constant,
            # Of r_s > 0.5 as a verdict: 2 true / (2 true + false + missed).
            "self_f1": 2 * agreed.count(2) / max(1, sum(agreed)),
            "scored_tokens": sum(len(ids) + 1 for *_, ids in ended),
        }
        if step <= own.mix_from_step or not own.share:
            return outcome.advantages_P_G, counts
        scores = [[None if r is None else 0.0 for r in group] for group in rewards]
        for (p, g, _), value in zip(ended, score, strict=True):
            scores[p][g] = min(1.0, max(0.0, value))
        return mixed(outcome.advantages_P_G, scores, own, self.run.config.rl.credit), counts

    def rows(self, part: list[Example]) -> list[Example]:
        """The Examples with a row for z behind those that ended; it counts in no divisor."""
        rl = self.run.config.rl
        if self.step <= self.own.from_step or not self.wanted:
            return part
        # Divided by the divisor it is alpha x mean of w (r_s - r)^2; a step's mean is dealt to its
        # updates, so each of them weighs as many times more.
        factor = self.own.weight * self.own.beta**2 * rl.minibatches
        factor *= credit.divisor(part, rl.credit, rl.sampling.max_new_tokens)
        return [
            Aimed(
                token_ids=[*example.token_ids, self.z],
                weights=[*example.weights, factor * found[0]],
                advantages=[*example.advantages, 0.0],
                sampler_logprobs=[*example.sampler_logprobs, 0.0],
                goal=found[1],
            )
            if (found := self.wanted.get(tuple(example.token_ids)))
            else example
            for example in part
        ]

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
    """The id of z: the named token, else the first control token; ValueError where none is free."""
    tokenizer = sampler.tokenizer
    taken = {*sampler.style.stop_ids, tokenizer.pad_token_id, *prompt_ids}
    words = tokenizer.get_vocab()
    # Those that the tokenizer flags first; else words that look like one.
    marked = (id for word, id in words.items() if _CONTROL.fullmatch(word))
    order = [*sorted(tokenizer.added_tokens_decoder), *sorted(marked)]
    if named:
        order = [words[named]] if named in words else []
    for id in order:
        if id not in taken:
            return id
    raise ValueError(
        "rl.method_args.token: expected one token of the tokenizer that neither ends an answer "
        f"nor is in a prompt, got {named!r}"
    )


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
