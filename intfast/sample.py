"""Problems, or partial answers, in; graded completions out.

Attempts, continuations, rollouts and evaluations are all this: prompt ids, perhaps the beginning
of an answer, seeds; then the engine completes and the grader reads the whole answer. Where a
draw depends on those before it, flows share the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from intfast import ranks
from intfast.config import SamplingConfig
from intfast.engine.protocol import Completion, Engine, Request, Sampling, check_output
from intfast.engine.queue import Queue, in_rounds
from intfast.grading.grader import Grade, Grader, Job, Submission
from intfast.prompts import Style
from intfast.records import Attempt, Problem
from intfast.tokens import decode

Advance = Callable[[int, int], None]
"""Adds (samples, tokens) to a progress bar."""
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
    grade: Grade | None
    """None where none was asked for."""


class Draw(NamedTuple):
    """Samples that a flow waits for: one for each seed of each start."""

    starts_P: Sequence[Start]
    sampling: SamplingConfig
    is_graded: bool = True
    ends: Sequence[int] = ()
    """Token ids that end a sample, besides those of the style."""

    @property
    def num_samples(self) -> int:
        """Of all starts."""
        return sum(len(start.seeds) for start in self.starts_P)


Groups = list[list[Graded]]
Flow = Generator[Draw, Groups, Any]
"""Work whose draws depend on those before: it yields each, and is sent the groups of its starts.

Nothing of it may depend on where other flows are: they run in any order.
"""


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
        self,
        prompt_ids: Sequence[int],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        ends: Sequence[int] = (),
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
                stop_ids=(*self.style.stop_ids, *ends),
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
            **graded.grade.recorded,
            policy_version=graded.completion.policy_version,
        )

    def sample(
        self, starts_P: Sequence[Start], sampling: SamplingConfig, advance: Advance | None = None
    ) -> Groups:
        """Graded completions_P_G of each start, one per seed, in order."""
        return self.together([Draw(starts_P, sampling)], advance)[0]

    def together(self, draws: Sequence[Draw], advance: Advance | None = None) -> list[Groups]:
        """What comes of these draws; each of several ranks draws a part, and all get all."""
        # Single samples, graded where they are drawn: a verdict may depend on a clock.
        mine_P, seeds_P = ranks.now().share([s.seeds for draw in draws for s in draw.starts_P])
        seeds = iter(seeds_P)
        own = [
            _Drawn(self, draw, advance, [s._replace(seeds=next(seeds)) for s in draw.starts_P])
            for draw in draws
        ]
        at = [(drawn, p) for drawn in own for p in range(len(drawn.requests_P))]
        if requests := [drawn.requests_P[p] for drawn, p in at]:
            with self.phase("generate"):
                self.engine.generate(requests, lambda i, g, c: at[i][0].end(at[i][1], g, c))
        # What is left of grading when the last sample has ended: waiting for workers.
        with self.phase("grade"):
            own_P = [group for drawn in own for group in drawn.groups()]
        whole_P = iter(ranks.now().together(mine_P, own_P))
        found = [[next(whole_P) for _ in draw.starts_P] for draw in draws]
        self.watch([c.grade for groups in found for group in groups for c in group if c.grade])
        return found

    def run(self, flow: Flow) -> Any:
        """Run one flow to its end: what it returns."""
        found: list[Any] = []

        def kept() -> Flow:
            found.append((yield from flow))

        self.flow([kept()])
        return found[0]

    def flow(self, flows: Iterable[Flow | None], advance: Advance | None = None) -> None:
        """Run flows to their ends: see engine.queue.Queue."""
        if getattr(self.engine, "is_apart", False):
            # vLLM's CPU build fails where requests with other settings join those that run.
            in_rounds(flows, lambda draws: [self.together([d], advance)[0] for d in draws])
            return
        if ranks.now().world > 1:
            in_rounds(flows, lambda draws: self.together(draws, advance))
            return
        queue = Queue(flows, lambda draw: _Drawn(self, draw, advance, draw.starts_P))
        with self.phase("generate"):
            self.engine.generate([], queue.ended, queue.more)
        queue.finish()


class _Drawn:
    """engine.queue.Pending of a Draw: answers are with the grader while others are generated."""

    def __init__(
        self, sampler: Sampler, draw: Draw, advance: Advance | None, starts_P: Sequence[Start]
    ) -> None:
        """starts_P: with the seeds that this rank draws."""
        self.sampler, self.starts_P, self.advance = sampler, starts_P, advance
        self.is_graded = draw.is_graded
        # A partial answer is prompt to the engine: only what is sampled now carries log-probs.
        self.requests_P = [
            sampler.request(sampler.start_prompt(s), s.seeds, draw.sampling, draw.ends)
            for s in starts_P
        ]
        self.left = sum(len(start.seeds) for start in starts_P)
        self.completions: dict[tuple[int, int], Completion] = {}
        self.answers: dict[tuple[int, int], Submission] = {}
        self.jobs: list[Job] = []

    def end(self, p: int, g: int, completion: Completion) -> None:
        """Take a completion, and begin to grade it."""
        start, self.left = self.starts_P[p], self.left - 1
        self.completions[p, g] = completion
        if self.is_graded:
            # The grader reads the whole answer, the beginning that was given included.
            text = self.sampler.text(completion, start.answer_ids)
            problem = start.problem
            answer = Submission(problem.answer, text, completion.finish_reason, problem.row)
            # Workers compare while the engine still decodes: grading costs no time of its own.
            self.jobs += self.sampler.grader.start(answer)
            self.answers[p, g] = answer
        if self.advance is not None:
            # The other ranks are as far, to a few samples.
            num = ranks.now().dp
            self.advance(num, num * len(completion.token_ids))

    def is_done(self) -> bool:
        """Whether all verdicts are there."""
        return self.sampler.grader.has(self.jobs)

    def groups(self) -> Groups:
        """Of the starts. In the order of the samples and not in that of their ends."""
        found_P_G: list[list[Completion]] = [[] for _ in self.requests_P]
        for p, g in sorted(self.completions):
            found_P_G[p].append(self.completions[p, g])
        # An engine that returns something else than was asked would look like a bad model.
        check_output(self.requests_P, found_P_G)
        grades = self.sampler.grader.grade_many(self.answers[at] for at in sorted(self.answers))
        grade, text = iter(grades), self.sampler.text
        return [[Graded(c, text(c), next(grade, None)) for c in group] for group in found_P_G]

    def result(self) -> Groups:
        """What the flow is sent; one process alone has all samples, and tells `watch`."""
        groups = self.groups()
        self.sampler.watch([c.grade for group in groups for c in group if c.grade])
        return groups
