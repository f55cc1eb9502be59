"""What the SFT stage learns from: the Examples of each `sft.data`.

Interventions are the method; the others are its rivals, on the same problems and prompts. Their
targets are whole solutions, so they end with the end token; beginnings do not. Every prompt is the
bare problem, whatever the solution was sampled from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from intfast import intervene, limits
from intfast.collect import Found
from intfast.methods import guided
from intfast.prompts import encode
from intfast.records import Attempt, Example, Guided, Problem
from intfast.run import Run

STAGES = {"intervention": "int"}
"""`sft.data` -> the name of the weights, where it is not the same."""
FULL_EVERY = 10
"""One in so many beginnings stays a whole attempt, as UPFT does to keep the structure."""


def examples(run: Run, found: Found) -> list[Example]:
    """The training sequences of the SFT stage, also written to examples.jsonl."""
    built = BUILDERS[run.config.sft.data](run, found)
    if run.config.sft.target == "one_per_problem":
        built = list({example.problem_id: example for example in reversed(built)}.values())[::-1]
    built, said = limits.fitting_examples(built, run.config.batch)
    if said:
        run.metrics.say(said)
    run.folder.journal("examples", Example).replace(built)
    return built


def _interventions(run: Run, found: Found) -> list[Example]:
    problems = {problem.id: problem for problem in run.problems}
    target, held_out = run.config.sft.target, run.config.analysis.held_out
    return intervene.build_examples(
        run.sampler, problems, found.interventions, found.continuations, target, held_out
    )


def _references(run: Run, found: Found) -> list[Example]:
    """The reference solution of each selected problem that has one."""
    tokenizer, end = run.sampler.tokenizer, run.sampler.style.stop_ids[0]
    return [
        _example(run, problem, [*encode(tokenizer, problem.reference), end], "reference")
        for problem in found.selected
        if problem.reference
    ]


def _reflections(run: Run, found: Found) -> list[Example]:
    """The model's rewrites of its wrong attempts, not filtered; those cut short are left out."""
    wrong = found.wrong
    if run.config.sft.target == "one_per_problem":
        wrong = list({problem.id: (problem, a) for problem, a in reversed(wrong)}.values())[::-1]
    problems = {problem.id: problem for problem, _ in wrong}
    return [
        _example(run, problems[record.problem_id], record.token_ids, "reflection")
        for record in guided.reflections(run, wrong)
        if record.finish_reason == "stop"
    ]


def _right_attempts(run: Run, found: Found) -> list[Example]:
    """RFT: the distinct right attempts of all training problems, the selected ones or not."""
    problems = {problem.id: problem for problem in run.problems}
    end = run.sampler.style.stop_ids[0]
    return [
        _example(run, problems[record.problem_id], [*record.token_ids, end], "rft")
        for record in _distinct(found.attempts)
    ]


def _rationales(run: Run, found: Found) -> list[Example]:
    """STaR: right attempts, and right solutions along the reference where there is none."""
    solved = {record.problem_id for record in found.attempts if record.grade == "correct"}
    failed = {problem.id: problem for problem in found.selected if problem.id not in solved}
    return _right_attempts(run, found) + [
        _example(run, failed[record.problem_id], record.token_ids, "star")
        for record in _distinct(guided.rationales(run, list(failed.values())))
    ]


def _beginnings(run: Run, found: Found) -> list[Example]:
    """UPFT: the beginning of the first attempt at each selected problem, right or wrong."""
    first = {record.problem_id: record for record in found.attempts if record.sample == 0}
    end = run.sampler.style.stop_ids[0]
    built = []
    for place, problem in enumerate(found.selected):
        record = first[problem.id]
        whole = [*record.token_ids, *[end][: record.finish_reason == "stop"]]
        length = len(whole) if place % FULL_EVERY == 0 else run.config.sft.prefix_tokens
        built.append(_example(run, problem, whole[:length], "prefix"))
    return built


def _distinct(records: Iterable[Attempt | Guided]) -> list[Attempt | Guided]:
    """The right ones that ended by themselves, each sequence of tokens once per problem."""
    return list(
        {
            (record.problem_id, tuple(record.token_ids)): record
            for record in records
            if record.grade == "correct" and record.finish_reason == "stop"
        }.values()
    )


def _example(run: Run, problem: Problem, target_ids: Sequence[int], kind: str) -> Example:
    prompt = run.sampler.prompt(problem)
    return Example(
        token_ids=[*prompt, *target_ids],
        weights=[0.0] * len(prompt) + [1.0] * len(target_ids),
        problem_id=problem.id,
        kind=kind,
    )


BUILDERS = {
    "intervention": _interventions,
    "reference": _references,
    "reflection": _reflections,
    "rft": _right_attempts,
    "star": _rationales,
    "prefix": _beginnings,
}
"""`sft.data` -> (run, found) -> Examples."""
