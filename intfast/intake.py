"""The problems of a run: loaded, gradable, and with room to answer. Nothing is ever cut.

What is dropped is counted and printed before anything is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console

from intfast import data
from intfast.config import BatchConfig, Config, SamplingConfig
from intfast.grading.grader import Grader
from intfast.records import Example, Problem
from intfast.sample import fits
from intfast.state.metrics import say as say_on

PromptOf = Callable[[Problem], list[int]]
Say = Callable[[str], None]


def load(config: Config, console: Console) -> tuple[list[Problem], list[Problem]]:
    """(training problems, test problems), with the report of each on the console."""
    settings = config.data
    assert settings.train is not None
    problems, report = data.load_problems(
        settings.train, purpose="train", columns=settings.columns, limit=settings.train_limit
    )
    say_on(console, report)
    tests: list[Problem] = []
    if settings.test is not None:
        tests, report = data.load_problems(
            settings.test, purpose="test", columns=settings.columns, limit=settings.test_limit
        )
        say_on(console, report)
        if shared := data.overlap(problems, tests):
            raise ValueError(
                f"{shared} test problems are also training problems; remove them from one file"
            )
    if config.needs_references and not any(problem.reference for problem in problems):
        raise ValueError(
            f"{settings.train}: no problem has a reference solution, which interventions, "
            "rewrites, hints and process credit need; add a column reference_solution, or for "
            'plain RL set sft.epochs = 0 and rl.problems = "selected"'
        )
    return problems, tests


def gradable(problems: list[Problem], grader: Grader, say: Say) -> list[Problem]:
    """The problems whose gold answer can be compared; the others are dropped and named.

    Otherwise every sample of such a problem would come back unscored.
    """
    usable = grader.check_golds([problem.answer for problem in problems])
    dropped = [p for p, ok in zip(problems, usable, strict=True) if not ok]
    for problem in dropped[:5]:
        say(f"dropped {problem.source or problem.id}: answer {problem.answer!r} is no answer")
    if dropped:
        say(f"dropped {len(dropped)} of {len(problems)} problems: ungradable answers")
    if problems and len(dropped) == len(problems):
        raise ValueError("no answer can be graded; look at the answer column, or at grade.mode")
    return [problem for problem, ok in zip(problems, usable, strict=True) if ok]


def fitting(
    problems: list[Problem],
    tests: list[Problem],
    prompt_of: PromptOf,
    context: int,
    config: Config,
    say: Say,
) -> tuple[list[Problem], list[Problem]]:
    """The problems and tests whose prompts leave room to answer in the context."""
    problems, said = fitting_train(problems, prompt_of, context, config)
    tests, more = fitting_problems(tests, prompt_of, context, [config.evaluate.sampling])
    for sentence in filter(None, (said, more)):
        say(sentence)
    return problems, tests


def fitting_problems(
    problems: Sequence[Problem],
    prompt_of: PromptOf,
    context: int,
    samplings: Sequence[SamplingConfig],
    budget: int | None = None,
) -> tuple[list[Problem], str]:
    """The problems whose prompt leaves room to answer, and a sentence on the others ("" for none).

    context    longest sequence of the model, in tokens
    samplings  how answers are drawn: each must have its room
    budget     longest training sequence, where a rollout must fit too
    Raises ValueError when nothing is left.
    """
    kept, dropped, longest = [], [], 0
    for problem in problems:
        num_tokens = len(prompt_of(problem))
        has_room = all(fits(context, num_tokens, sampling) for sampling in samplings)
        if budget is not None:
            room = min(max(s.max_new_tokens for s in samplings), context - num_tokens)
            has_room = has_room and num_tokens + room <= budget
        if has_room:
            kept.append(problem)
        else:
            dropped.append(problem)
            longest = max(longest, num_tokens)
    if not dropped:
        return kept, ""
    limit = f"the model's context of {context:,} tokens"
    if budget is not None:
        limit += f" and batch.max_tokens = {budget:,}"
    named = ", ".join(problem.source or problem.id for problem in dropped[:5])
    sentence = (
        f"dropped {len(dropped)} of {len(problems)} problems whose prompts (up to {longest:,} "
        f"tokens) leave no room to answer within {limit}: {named}"
        + (", ..." if len(dropped) > 5 else "")
    )
    if not kept:
        raise ValueError(f"{sentence}; lower max_new_tokens, or bring shorter problems")
    return kept, sentence


def fitting_train(
    problems: Sequence[Problem], prompt_of: PromptOf, context: int, config: Config
) -> tuple[list[Problem], str]:
    """`fitting_problems` for what the training stages of a config draw."""
    samplings = [config.attempts.sampling] if config.sft.epochs else []
    problems, said = list(problems), ""
    if samplings:
        problems, said = fitting_problems(problems, prompt_of, context, samplings)
    if config.rl.steps:
        budget = config.batch.max_tokens if config.batch.too_long == "error" else None
        rl = [config.rl.sampling]
        problems, more = fitting_problems(problems, prompt_of, context, rl, budget)
        said = "\n".join(filter(None, [said, more]))
    return problems, said


class Fitting(Iterable[Example]):
    """The training sequences within the token budget; `said` is of those that came before."""

    def __init__(self, examples: Iterable[Example], batch: BatchConfig) -> None:
        self.examples, self.batch = examples, batch
        self.kept = self.dropped = 0

    def __iter__(self) -> Iterator[Example]:
        for example in self.examples:
            fits = len(example.token_ids) <= self.batch.max_tokens
            if fits or self.batch.too_long != "error":
                self.kept += 1
                yield example
            else:
                self.dropped += 1

    @property
    def said(self) -> str:
        """A sentence on those that were dropped; empty where none was."""
        if not self.dropped:
            return ""
        return (
            f"dropped {self.dropped} of {self.kept + self.dropped} training sequences: longer than "
            f"batch.max_tokens = {self.batch.max_tokens:,}; raise it, or set "
            'batch.too_long = "alone"'
        )
