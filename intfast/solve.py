"""Problems, or partial answers, in; graded completions out.

Attempts, continuations, rollouts and evaluations are all this: prompt ids, perhaps the beginning
of an answer, seeds; then the engine completes and the grader reads the whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from intfast.config import SamplingConfig
from intfast.grade import Grade, Grader
from intfast.prompts import Style, decode
from intfast.records import Problem
from intfast.rollout import Completion, Engine, Request, Sampling

Item = TypeVar("Item")


class Start(NamedTuple):
    """What to complete: a problem, the ids of its answer so far, one seed per sample."""

    problem: Problem
    seeds: Sequence[int]
    answer_ids: Sequence[int] = ()


class Graded(NamedTuple):
    """One completion with its text (without the stop token) and its grade.

    `text` is that of the completion alone; the grade is that of the whole answer.
    """

    completion: Completion
    text: str
    grade: Grade


class Solver:
    """An engine, a prompt style and a grader, put together."""

    def __init__(
        self, engine: Engine, tokenizer: Any, style: Style, grader: Grader, context: int
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.style = style
        self.grader = grader
        self.context = context
        """Longest sequence of the model, in tokens."""
        self._prompts: dict[str, list[int]] = {}

    def prompt(self, problem: Problem) -> list[int]:
        """The solve prompt of a problem, rendered once; the trainer uses the same ids."""
        if problem.id not in self._prompts:
            self._prompts[problem.id] = self.style.solve(problem)
        return self._prompts[problem.id]

    def fits(self, num_tokens: int, sampling: SamplingConfig) -> bool:
        """Whether a prompt of so many tokens leaves room for the longest completion."""
        return num_tokens + sampling.max_new_tokens <= self.context

    def request(
        self, prompt_ids: Sequence[int], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Request:
        """An engine request that ends where an answer of this prompt style ends."""
        return Request(
            prompt_ids=prompt_ids,
            seeds=seeds,
            sampling=Sampling(
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_ids=self.style.stop_ids,
            ),
        )

    def text(self, completion: Completion, answer_ids: Sequence[int] = ()) -> str:
        """The text of an answer's beginning and its completion, without the stop token."""
        ids = completion.token_ids
        if ids and ids[-1] in self.style.stop_ids:
            ids = ids[:-1]
        return decode(self.tokenizer, [*answer_ids, *ids])

    def solve(
        self,
        starts_P: Sequence[Start],
        sampling: SamplingConfig,
        on_finished: Callable[[int, int], None] | None = None,
    ) -> list[list[Graded]]:
        """Graded completions_P_G of each start, one per seed, in order."""
        requests = [
            self.request([*self.prompt(s.problem), *s.answer_ids], s.seeds, sampling)
            for s in starts_P
        ]
        completions_P_G = self.engine.generate(requests, on_finished)
        answers = [
            (
                start.problem.answer,
                self.text(completion, start.answer_ids),
                completion.finish_reason,
            )
            for start, group in zip(starts_P, completions_P_G, strict=True)
            for completion in group
        ]
        grades = iter(self.grader.grade_many(answers))
        return [[Graded(c, self.text(c), next(grades)) for c in group] for group in completions_P_G]


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
