"""What the SFT stage learns from: the Examples of each `sft.data`.

Interventions are the method; the others are its rivals, on the same problems and prompts. Their
targets are whole solutions, so they end with the end token; beginnings do not. Every prompt is the
bare problem, whatever the solution was sampled from, but for beginnings that are asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, zip_longest

import msgspec

from intfast import intake
from intfast.collect import Found
from intfast.engine.protocol import derive_seed
from intfast.intervene import REACHED_CONTINUATION, correct_counts
from intfast.methods import guided, prompts
from intfast.records import Attempt, Continuation, Example, Guided, Intervention, Problem
from intfast.run import Run
from intfast.sample import Sampler
from intfast.state.journal import Lazy
from intfast.tokens import encode

STAGES = {"intervention": "int"}
"""`sft.data` -> the name of the weights, where it is not the same."""
RARE = 0.25
"""ReGFT asks for solutions along the reference where a smaller share of the attempts is right."""


def examples(run: Run, found: Found) -> Sequence[Example]:
    """The training sequences of the SFT stage: built one by one, and kept in examples.jsonl."""
    built = BUILDERS[run.config.sft.data](run, found)
    if run.config.sft.target == "one_per_problem":
        built = _first_of_each_problem(built)
    built = intake.Fitting(built, run.config.batch)
    journal = run.folder.journal("examples", Example)
    # All are compared, so that all are counted.
    if journal and sum(ours != theirs for ours, theirs in zip_longest(journal, built)):
        raise ValueError(
            f"this run learns from {len(journal)} examples, and now there would be "
            f"{built.kept}{': ' + built.said if built.said else ''}; continue it with a "
            "batch.max_tokens that holds the longest of them, or use another run=FOLDER"
        )
    if not journal:
        journal.replace(built)
    if built.said:
        run.metrics.say(built.said)
    return journal


def _first_of_each_problem(built: Iterable[Example]) -> Iterator[Example]:
    seen: set[str] = set()
    for example in built:
        if example.problem_id not in seen:
            seen.add(example.problem_id)
            yield example


def _interventions(run: Run, found: Found) -> Iterator[Example]:
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
) -> Iterator[Example]:
    """Prompt + prefix + intervention as training sequences; no suffix and no end token.

    target     `sft.target`: the recipe, or one of the paper's ablations
    held_out   `analysis.held_out`: share of the problems that are left out
    """
    correct = correct_counts(continuations)
    gates = REACHED_CONTINUATION if target == "no_filter" else ("kept",)
    chosen: Iterable[int] = (
        place
        for place, record in enumerate(judged)
        if record.gate in gates and not is_held_out(record.problem_id, held_out)
    )
    if target == "one_per_problem":
        best: dict[str, tuple[int, int]] = {}
        for place in chosen:
            record = judged[place]
            held = best.get(record.problem_id)
            if held is None or correct[record.id] > held[0]:
                best[record.problem_id] = (correct[record.id], place)
        chosen = [place for _, place in best.values()]
    suffixes: dict[str, int] = {}
    if target == "suffix":
        for place, record in enumerate(continuations):
            if record.start == "intervention" and record.grade == "correct":
                suffixes.setdefault(record.intervention_id, place)
    on_prefix = 0.0 if target == "intervention" else 1.0
    for place in chosen:
        record = judged[place]
        prompt = sampler.prompt(problems[record.problem_id])
        # The exact control: what the same prefixes teach without their interventions.
        step = [] if target == "prefix" else record.intervention_ids
        suffix = continuations[suffixes[record.id]].token_ids if record.id in suffixes else []
        weights = [0.0] * len(prompt) + [on_prefix] * len(record.prefix_ids)
        weights += [1.0] * (len(step) + len(suffix))
        if not any(weights):
            continue
        yield Example(
            token_ids=[*prompt, *record.prefix_ids, *step, *suffix],
            weights=weights,
            problem_id=record.problem_id,
            kind="intervention",
        )


def _references(run: Run, found: Found) -> Iterator[Example]:
    """The reference solution of each selected problem that has one."""
    tokenizer, style = run.sampler.tokenizer, run.sampler.style
    for problem in found.selected:
        if problem.reference:
            ids = encode(tokenizer, style.lead + problem.reference)
            yield _example(run, problem, [*ids, style.stop_ids[0]], "reference")


def _reflections(run: Run, found: Found) -> Iterator[Example]:
    """The model's rewrites of its wrong attempts, not filtered; those cut short are left out."""
    wrong = found.wrong
    if run.config.sft.target == "one_per_problem":
        first: dict[str, int] = {}
        for place, (problem, _) in enumerate(wrong):
            first.setdefault(problem.id, place)
        wrong = Lazy(list(first.values()), wrong.__getitem__)
    problems = {problem.id: problem for problem in found.selected}
    return (
        _example(run, problems[record.problem_id], record.token_ids, "reflection")
        for record in guided.reflections(run, wrong)
        if record.finish_reason == "stop"
    )


def _right_attempts(run: Run, found: Found) -> Iterator[Example]:
    """RFT: the distinct right attempts of all training problems, the selected ones or not."""
    problems = {problem.id: problem for problem in run.problems}
    end = run.sampler.style.stop_ids[0]
    for record in _distinct(found.attempts):
        yield _example(run, problems[record.problem_id], [*record.token_ids, end], "rft")


def _rationales(run: Run, found: Found) -> Iterator[Example]:
    """STaR: right attempts, and right solutions along the reference where there is none."""
    solved = {record.problem_id for record in found.attempts if record.grade == "correct"}
    return _along(run, found, [p for p in found.selected if p.id not in solved], "star", 1.0)


def _hard_rationales(run: Run, found: Found) -> Iterator[Example]:
    """ReGFT: right attempts, and right solutions with most of the reference where they are rare."""
    right, drawn = Counter(), Counter()
    for record in found.attempts:
        drawn[record.problem_id] += 1
        right[record.problem_id] += record.grade == "correct"
    hard = [p for p in found.selected if right[p.id] < RARE * drawn[p.id]]
    return _along(run, found, hard, "regft", guided.MOST)


def _along(
    run: Run, found: Found, asked: Sequence[Problem], kind: str, share: float
) -> Iterator[Example]:
    problems = {problem.id: problem for problem in asked}
    drawn = guided.rationales(run, asked, kind, share)
    along = (
        _example(run, problems[record.problem_id], record.token_ids, kind)
        for record in _distinct(drawn)
    )
    return chain(_right_attempts(run, found), along)


def _beginnings(run: Run, found: Found) -> Iterator[Example]:
    """UPFT: the beginning of the first attempt at each selected problem, right or wrong."""
    config, style = run.config.sft, run.sampler.style
    first = {r.problem_id: place for place, r in enumerate(found.attempts) if r.sample == 0}
    due = [math.ceil(round(n * config.prefix_whole, 9)) for n in range(len(found.selected) + 1)]
    for place, problem in enumerate(found.selected):
        record = found.attempts[first[problem.id]]
        whole = [*record.token_ids, *style.stop_ids[: record.finish_reason == "stop"]]
        if due[place + 1] > due[place]:
            yield _example(run, problem, whole, "prefix")
        else:
            prompt = prompts.first_step(style, problem) if config.data == "prefix" else None
            yield _example(run, problem, whole[: config.prefix_tokens], "prefix", prompt)


def _distinct(records: Iterable[Attempt | Guided]) -> Iterator[Attempt | Guided]:
    """The right ones that ended by themselves, each sequence of tokens once per problem."""
    seen: set[tuple[str, bytes]] = set()
    for record in records:
        if record.grade == "correct" and record.finish_reason == "stop":
            # A digest takes 16 bytes where the tokens take 36 each.
            digest = blake2b(msgspec.json.encode(record.token_ids), digest_size=16).digest()
            if (record.problem_id, digest) not in seen:
                seen.add((record.problem_id, digest))
                yield record


def _example(
    run: Run,
    problem: Problem,
    target_ids: Sequence[int],
    kind: str,
    prompt_ids: Sequence[int] | None = None,
) -> Example:
    prompt = run.sampler.prompt(problem) if prompt_ids is None else prompt_ids
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
    "regft": _hard_rationales,
    "prefix": _beginnings,
    "bare_prefix": _beginnings,
}
"""`sft.data` -> (run, found) -> Examples; the call draws what they are made of."""
