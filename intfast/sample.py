"""Problems, or partial answers, in; graded completions out.

Attempts, continuations, rollouts and evaluations are all this: prompt ids, perhaps the beginning
of an answer, seeds; then the engine completes and the grader reads the whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from intfast import ranks
from intfast.config import SamplingConfig
from intfast.engine.protocol import Completion, Engine, OnFinished, Request, Sampling, check_output
from intfast.grading.grader import Grade, Grader, Submission
from intfast.prompts import Style
from intfast.records import Attempt, Problem
from intfast.tokens import decode

Item = TypeVar("Item")
MIN_ROOM = 1024
"""Tokens that must be left for a completion, where the limit is not lower."""


class Start(NamedTuple):
    """What to complete: a problem, the ids of its answer so far, one seed per sample.

    `prompt_ids` stand in for the solve prompt of the problem where they are given.
    """

    problem: Problem
    seeds: Sequence[int]
    answer_ids: Sequence[int] = ()
    prompt_ids: Sequence[int] | None = None


class Graded(NamedTuple):
    """One completion with its text (without the stop token) and its grade.

    `text` is that of the completion alone; the grade is that of the whole answer.
    """

    completion: Completion
    text: str
    grade: Grade


class Rollouts(NamedTuple):
    """The groups that a step learns from, all that it drew, and where the stream of tasks stands.

    Without dynamic sampling the first and the second are the same.
    """

    starts_P: list[Start]
    groups_P_G: list[list[Graded]]
    drawn: list[tuple[Start, list[Graded]]]
    cursor: int


def fits(context: int, num_tokens: int, sampling: SamplingConfig) -> bool:
    """Whether a prompt of so many tokens leaves room to answer in a context of so many."""
    # A prompt is never cut, and an answer is not asked for where it could not be finished.
    return context - num_tokens >= min(sampling.max_new_tokens, MIN_ROOM)


class Sampler:
    """An engine, a prompt style and a grader, put together."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        style: Style,
        grader: Grader,
        context: int,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        watch: Callable[[Sequence[Grade]], None] = lambda grades: None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.style = style
        self.grader = grader
        self.context = context
        """Longest sequence of the model, in tokens."""
        self.phase = phase
        """Counts the seconds inside under a name; metrics.Metrics.phase."""
        # See GradeWatch: too many ungraded answers are a broken setup, not a weak model.
        self.watch = watch
        """Is told of every grade, and may stop the run; grading.watch.GradeWatch.add."""
        # Rendering a chat template takes longer than a decode step; a problem is asked many times.
        self._prompts: dict[Problem, list[int]] = {}

    def prompt(self, problem: Problem) -> list[int]:
        """The solve prompt of a problem, rendered once; the trainer uses the same ids."""
        if problem not in self._prompts:
            self._prompts[problem] = self.style.solve(problem)
        return self._prompts[problem]

    def start_prompt(self, start: Start) -> Sequence[int]:
        """What a completion stands behind: a problem's or its own prompt, and the answer so far."""
        own = self.prompt(start.problem) if start.prompt_ids is None else start.prompt_ids
        return [*own, *start.answer_ids]

    def fits(self, num_tokens: int, sampling: SamplingConfig) -> bool:
        """Whether a prompt of so many tokens leaves room to answer: it is never cut."""
        return fits(self.context, num_tokens, sampling)

    def request(
        self, prompt_ids: Sequence[int], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Request:
        """An engine request that ends where an answer of this prompt style ends.

        A completion is bounded by `max_new_tokens` and by the context; both give "length".
        """
        return Request(
            prompt_ids=prompt_ids,
            seeds=seeds,
            sampling=Sampling(
                max_new_tokens=min(sampling.max_new_tokens, self.context - len(prompt_ids)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_ids=self.style.stop_ids,
            ),
        )

    def text(self, completion: Completion, answer_ids: Sequence[int] = ()) -> str:
        """The text of an answer's beginning and its completion, without the stop token."""
        return decode(self.tokenizer, [*answer_ids, *self.without_stop(completion)])

    def without_stop(self, completion: Completion) -> list[int]:
        """The token ids of a completion, without the token that stopped it."""
        ids = completion.token_ids
        # The stop token is part of what the policy chose, so it stays in the completion that is
        # trained on; it is not part of the answer.
        return ids[:-1] if ids and ids[-1] in self.style.stop_ids else ids

    def attempt(self, problem: Problem, sample: int, graded: Graded) -> Attempt:
        """The record of a graded completion of the bare problem."""
        return Attempt(
            problem_id=problem.id,
            sample=sample,
            prompt_ids=self.prompt(problem),
            token_ids=self.without_stop(graded.completion),
            text=graded.text,
            finish_reason=graded.completion.finish_reason,
            grade=graded.grade.status,
            reason=graded.grade.reason,
            policy_version=graded.completion.policy_version,
        )

    def complete_together(
        self,
        requests_P: Sequence[Request],
        advance: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """As `complete`; of several ranks each draws some of the samples, and all get all."""
        mine_P, seeds_P = ranks.now().share([request.seeds for request in requests_P])
        own_P = [replace(r, seeds=seeds) for r, seeds in zip(requests_P, seeds_P, strict=True)]
        return ranks.now().together(mine_P, self.complete(own_P, advance))

    def complete(
        self,
        requests_P: Sequence[Request],
        advance: Callable[[int, int], None] | None = None,
        ended: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """Completions_P_G of the requests, ungraded.

        advance  gets (samples, tokens) to add to a progress bar
        ended    gets every completion while others are still generated
        """
        if not requests_P:
            return []
        num = ranks.now().world

        def report(request: int, sample: int, completion: Completion) -> None:
            if ended is not None:
                ended(request, sample, completion)
            if advance is not None:
                # The others are as far, to a few samples.
                advance(num, num * len(completion.token_ids))

        with self.phase("generate"):
            completions_P_G = self.engine.generate(requests_P, report)
        # An engine that returns something else than was asked would look like a bad model.
        check_output(requests_P, completions_P_G)
        return completions_P_G

    def sample(
        self,
        starts_P: Sequence[Start],
        sampling: SamplingConfig,
        advance: Callable[[int, int], None] | None = None,
    ) -> list[list[Graded]]:
        """Graded completions_P_G of each start, one per seed, in order.

        Answers that need a grading worker are with it while other samples are still generated.
        """
        # Single samples, graded where they are drawn: a verdict may depend on a clock.
        mine_P, seeds_P = ranks.now().share([start.seeds for start in starts_P])
        starts_P = [s._replace(seeds=seeds) for s, seeds in zip(starts_P, seeds_P, strict=True)]
        # A partial answer is prompt to the engine: only what is sampled now carries log-probs.
        requests = [self.request(self.start_prompt(s), s.seeds, sampling) for s in starts_P]
        answers: dict[tuple[int, int], Submission] = {}

        def grade_ahead(p: int, g: int, completion: Completion) -> None:
            start = starts_P[p]
            # The grader reads the whole answer, the beginning that was given included.
            text = self.text(completion, start.answer_ids)
            answers[p, g] = Submission(start.problem.answer, text, completion.finish_reason)
            # Workers compare while the engine still decodes: grading costs no time of its own.
            self.grader.start(answers[p, g])

        completions_P_G = self.complete(requests, advance, grade_ahead)
        # What is left of grading when the last sample has ended: waiting for workers.
        with self.phase("grade"):
            # In the order of the samples and not in that of their ends, so that a run does not
            # depend on which sample ended first.
            grades = iter(self.grader.grade_many(answers[place] for place in sorted(answers)))
        own = [[Graded(c, self.text(c), next(grades)) for c in group] for group in completions_P_G]
        graded_P_G = ranks.now().together(mine_P, own)
        self.watch([graded.grade for group in graded_P_G for graded in group])
        return graded_P_G


def chunks(items: Sequence[Item], limit: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, in lists whose sizes add up to at most `limit` (or of one item)."""
    chunk: list[Item] = []
    total = 0
    for item in items:
        if chunk and total + size(item) > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += size(item)
    if chunk:
        yield chunk
