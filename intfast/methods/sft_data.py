"""What the SFT stage learns from: the Examples of each `sft.data`.

Interventions are the method; the others are its rivals, on the same problems and prompts. Their
targets are whole solutions, so they end with the end token; beginnings do not. Every prompt is the
bare problem, whatever the solution was sampled from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from intfast import intake
from intfast.collect import Found
from intfast.engine.protocol import derive_seed
from intfast.intervene import REACHED_CONTINUATION, correct_counts
from intfast.methods import guided
from intfast.records import Attempt, Continuation, Example, Guided, Intervention, Problem
from intfast.run import Run
from intfast.sample import Sampler
from intfast.tokens import encode

STAGES = {"intervention": "int"}
"""`sft.data` -> the name of the weights, where it is not the same."""
FULL_EVERY = 10
"""One in so many beginnings stays a whole attempt, as UPFT does to keep the structure."""


def examples(run: Run, found: Found) -> list[Example]:
    """The training sequences of the SFT stage, also written to examples.jsonl."""
    built = BUILDERS[run.config.sft.data](run, found)
    if run.config.sft.target == "one_per_problem":
        built = list({example.problem_id: example for example in reversed(built)}.values())[::-1]
    built, said = intake.fitting_examples(built, run.config.batch)
    if said:
        run.metrics.say(said)
    journal = run.folder.journal("examples", Example)
    if journal.records and journal.records != built:
        raise ValueError(
            f"this run learns from {len(journal.records)} examples, and now there would be "
            f"{len(built)}{': ' + said if said else ''}; continue it with a batch.max_tokens that "
            "holds the longest of them, or use another run=FOLDER"
        )
    journal.replace(built)
    return built


def _interventions(run: Run, found: Found) -> list[Example]:
    problems = {problem.id: problem for problem in run.problems}
    target, held_out = run.config.sft.target, run.config.analysis.held_out
    return build_examples(
        run.sampler, problems, found.interventions, found.continuations, target, held_out
    )


def is_held_out(problem_id: str, share: float) -> bool:
    """Whether the interventions of a problem stay out of SFT; the same share in every run."""
    return derive_seed(0, "held out", problem_id) < share * 2**63


def build_examples(
    sampler: Sampler,
    problems: Mapping[str, Problem],
    judged: Sequence[Intervention],
    continuations: Sequence[Continuation],
    target: str,
    held_out: float = 0.0,
) -> list[Example]:
    """Prompt + prefix + intervention as training sequences; no suffix and no end token.

    target     `sft.target`: the recipe, or one of the paper's ablations
    held_out   `analysis.held_out`: share of the problems that are left out
    """
    correct = correct_counts(continuations)
    gates = REACHED_CONTINUATION if target == "no_filter" else ("kept",)
    chosen = [
        record
        for record in judged
        if record.gate in gates and not is_held_out(record.problem_id, held_out)
    ]
    if target == "one_per_problem":
        best: dict[str, Intervention] = {}
        for record in chosen:
            held = best.get(record.problem_id)
            if held is None or correct[record.id] > correct[held.id]:
                best[record.problem_id] = record
        chosen = list(best.values())
    suffixes: dict[str, list[int]] = {}
    if target == "suffix":
        for record in continuations:
            if record.start == "intervention" and record.grade == "correct":
                suffixes.setdefault(record.intervention_id, record.token_ids)
    examples = []
    for record in chosen:
        prompt = sampler.prompt(problems[record.problem_id])
        suffix = suffixes.get(record.id, [])
        on_prefix = 0.0 if target == "intervention" else 1.0
        weights = [0.0] * len(prompt) + [on_prefix] * len(record.prefix_ids)
        weights += [1.0] * (len(record.intervention_ids) + len(suffix))
        examples.append(
            Example(
                token_ids=[*prompt, *record.prefix_ids, *record.intervention_ids, *suffix],
                weights=weights,
                problem_id=record.problem_id,
                kind="intervention",
            )
        )
    return examples


def _references(run: Run, found: Found) -> list[Example]:
    """The reference solution of each selected problem that has one."""
    tokenizer, style = run.sampler.tokenizer, run.sampler.style
    end = style.stop_ids[0]
    return [
        _example(
            run, problem, [*encode(tokenizer, style.lead + problem.reference), end], "reference"
        )
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
