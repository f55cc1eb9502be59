"""What does not fit is counted and dropped before training; nothing is ever cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from intfast.config import BatchConfig, Config, SamplingConfig
from intfast.records import Example, Problem
from intfast.sample import fits

PromptOf = Callable[[Problem], list[int]]


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


def fitting_examples(examples: Sequence[Example], batch: BatchConfig) -> tuple[list[Example], str]:
    """The training sequences within the token budget, and a sentence on the others."""
    if batch.too_long != "error":
        return list(examples), ""
    kept = [example for example in examples if len(example.token_ids) <= batch.max_tokens]
    if len(kept) == len(examples):
        return kept, ""
    return kept, (
        f"dropped {len(examples) - len(kept)} of {len(examples)} training sequences: longer than "
        f'batch.max_tokens = {batch.max_tokens:,}; raise it, or set batch.too_long = "alone"'
    )
