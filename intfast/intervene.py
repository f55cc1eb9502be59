"""Wrong attempts -> verified -> intervention -> continuations -> kept or not.

Every candidate is recorded with the gate that it reached; GATES has them in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from intfast.config import InterveneConfig
from intfast.engine.protocol import derive_seed
from intfast.leak import leaks
from intfast.records import Attempt, Continuation, Intervention, Problem
from intfast.sample import Draw, Graded, Groups, Sampler, Start
from intfast.tokens import cut, write
from intfast.waves import Tried, next_wave

GATES = {
    "too_long": "the verification prompt does not fit the context",
    "unparsed": "the reply is not in the asked form",
    "conflict": "the reply gives several verdicts, and they differ",
    "no_error": "the reply finds nothing wrong",
    "bad_location": "the location is not a step of the attempt",
    "unsafe_text": "the replacement holds hidden characters or control tokens",
    "inexact": "the tokenizer has no ids that are exactly the replacement behind the prefix",
    "overlong": "the replacement is longer than intervene.max_step_tokens",
    "no_room": "prompt, prefix and replacement leave no room to continue in the context",
    "leak": "the replacement gives the answer away",
    "duplicate": "an earlier candidate of the same attempt has passed",
    "passed": "all of the above passed; its continuations are not yet counted",
    "unsolved": "too few right continuations",
    "kept": "all gates passed",
}
REACHED_CONTINUATION = ("passed", "unsolved", "kept")
STARTS = ("intervention", "error", "prefix")
"""What is continued: see records.Continuation. The last two with `intervene.baselines`."""


# --- verify and intervene ----------------------------------------------------------------------


def propose(
    sampler: Sampler,
    wrong: Sequence[tuple[Problem, Attempt]],
    config: InterveneConfig,
    seed: int,
) -> Generator[Draw, Groups, list[Intervention]]:
    """`config.samples` candidates for every wrong attempt, each with the gate it reached.

    Two turns of the same model: a guided solution along the reference (where the prompt style has
    that turn), then the verification, which names the first wrong step and writes its replacement.
    """

    def replies(
        turn: str, prompts: Sequence[Sequence[int] | None], names: Sequence[tuple[int, ...]]
    ) -> Generator[Draw, Groups, list[list[Graded]]]:
        """Of each prompt that is there and fits, one for each name; none of the others."""
        asked = {}
        for row, ((problem, attempt), prompt) in enumerate(zip(wrong, prompts, strict=True)):
            if prompt is not None and sampler.fits(len(prompt), config.sampling):
                # One prefill for all of an attempt: they differ by their seed.
                seeds = [derive_seed(seed, turn, problem.id, attempt.sample, *n) for n in names]
                asked[row] = Start(problem, seeds, prompt_ids=prompt)
        groups = yield Draw(list(asked.values()), config.sampling, is_graded=False)
        found = dict(zip(asked, groups, strict=True))
        return [found.get(row, []) for row in range(len(wrong))]

    style = sampler.style
    # The reference of a hard problem leaves steps out; the model first writes them for itself.
    guides = [style.guided(problem) if config.guided_solve else None for problem, _ in wrong]
    guided = yield from replies("guided", guides, [()])
    # Cut by the text alone, before anything is asked: the numbers in the prompt are ours.
    steps = [style.split(attempt.text) for _, attempt in wrong]
    rows = zip(wrong, steps, guided, strict=True)
    prompts = [style.verify(p, cut, first[0].text if first else "") for (p, _), cut, first in rows]
    verified = yield from replies("verify", prompts, [(n,) for n in range(config.samples)])
    return [
        candidate
        for row, (problem, attempt) in enumerate(wrong)
        for candidate in _gated(
            sampler, problem, attempt, steps[row], guided[row], verified[row], config
        )
    ]


def _gated(
    sampler: Sampler,
    problem: Problem,
    attempt: Attempt,
    steps: Sequence[str],
    guided: Sequence[Graded],
    replies: Sequence[Graded],
    config: InterveneConfig,
) -> Iterator[Intervention]:
    """The candidates of one attempt; without replies the prompt was too long."""
    has_passed = False
    for sample in range(config.samples):
        found: dict[str, Any] = {"gate": "too_long", "reply": ""}
        # The guided solution is paid for once, with the first candidate.
        drawn = [*replies[sample : sample + 1], *guided[: sample == 0]]
        if replies:
            completion, reply, _ = replies[sample]
            # Gates in the order of GATES: the first that fails names the candidate.
            found = {"reply": reply, "finish_reason": completion.finish_reason}
            found |= _read_reply(sampler, reply, steps, attempt)
            if found["gate"] == "passed":
                found["gate"] = _gate(sampler, problem, attempt, found, config)
            # The first that passes is used; the others are only counted.
            if found["gate"] == "passed" and has_passed:
                found["gate"] = "duplicate"
            has_passed = has_passed or found["gate"] == "passed"
        yield Intervention(
            id=f"{problem.id}/{attempt.sample}/{sample}",
            problem_id=problem.id,
            attempt=attempt.sample,
            sample=sample,
            guided="".join(graded.text for graded in guided[: sample == 0]),
            num_tokens=sum(len(graded.completion.token_ids) for graded in drawn),
            **found,
        )


def _read_reply(
    sampler: Sampler, reply: str, steps: Sequence[str], attempt: Attempt
) -> dict[str, Any]:
    """The fields that a reply gives an Intervention: gate, location, content, the two id lists.

    The prefix is the attempt's own sampled ids; only the replacement is tokenised, once.
    """
    verdict = sampler.style.read(reply, steps)
    found = {"gate": verdict.reason, "location": verdict.location, "content": verdict.content}
    if verdict.reason:
        return found
    # Steps join to the text, so the lengths before the located one add up to its place.
    end = sum(len(step) for step in steps[: verdict.location - 1])
    # The place may lie inside a token: what is left of it goes in front of the replacement.
    num_kept, between = cut(sampler.tokenizer, attempt.token_ids, attempt.text, end)
    text = between + verdict.content
    ids = write(sampler.tokenizer, attempt.prompt_ids, attempt.token_ids, num_kept, text)
    if ids is None:
        return found | {"gate": "inexact"}
    # Never re-tokenised: the prefix is what the model sampled, with its own token borders.
    prefix_ids = attempt.token_ids[:num_kept]
    return found | {"gate": "passed", "prefix_ids": prefix_ids, "intervention_ids": ids}


def _gate(
    sampler: Sampler,
    problem: Problem,
    attempt: Attempt,
    found: Mapping[str, Any],
    config: InterveneConfig,
) -> str:
    """The gate at which a well-formed replacement is dropped, or "passed"."""
    # Dropped and not cut: half a step would be trained as if the model meant it.
    if len(found["intervention_ids"]) > config.max_step_tokens:
        return "overlong"
    num_prompt = len(sampler.prompt(problem))
    num_tokens = num_prompt + len(found["prefix_ids"]) + len(found["intervention_ids"])
    # The baselines continue from within the attempt, which may fill the context.
    # What is measured beside must fit as well, or the three starts were of different attempts.
    is_full = config.baselines and num_prompt + len(attempt.token_ids) >= sampler.context
    if is_full or not sampler.fits(num_tokens, config.continuation):
        return "no_room"
    content, grader = found["content"], sampler.grader
    told = config.leak_gate and (
        leaks(content, problem.answer) or grader.gives_away(problem, content)
    )
    return "leak" if told else "passed"


# --- continue ----------------------------------------------------------------------------------


class Passed(NamedTuple):
    """An intervention to continue from; `read` brings what it is made of when it is its turn."""

    problem_id: str
    id: str
    read: Callable[[], tuple[Problem, Attempt, Intervention]]


class Todo(NamedTuple):
    """Continuations to draw: which samples, from which start of which intervention."""

    passed: Passed
    start: str
    samples: list[int]


Outcomes = dict[tuple[str, str], dict[int, bool]]
"""(intervention id, start) -> sample number -> was it right."""


def outcomes(records: Iterable[Continuation]) -> Outcomes:
    """What became of continuations."""
    done: Outcomes = {}
    for record in records:
        found = done.setdefault((record.intervention_id, record.start), {})
        found[record.sample] = record.grade == "correct"
    return done


def missing(passed: Sequence[Passed], done: Outcomes, config: InterveneConfig) -> list[Todo]:
    """The next wave of continuations, given those drawn; empty when the stop rule is met for all.

    With `config.baselines` the prefix + wrong step and the prefix alone are continued as well,
    as often as the rule allows at most.
    """
    todo = []
    for start in STARTS if config.baselines else STARTS[:1]:
        # The rule to stop early is for interventions: of baselines the rates are wanted.
        rule = config
        if start != "intervention":
            rule = msgspec.structs.replace(config, stop="never", one_per_problem=False)
        # Where nothing is decided between waves, they need not wait for each other.
        if rule.stop == "never":
            rule = msgspec.structs.replace(rule, wave=max(1, config.continuations))
        # Outcomes so far, by sample number: what a wave decides must not depend on when it ran.
        tried = [Tried(item.problem_id, done.get((item.id, start), {})) for item in passed]
        samples_I = next_wave(tried, rule)
        found = zip(passed, samples_I, strict=True)
        todo += [Todo(item, start, samples) for item, samples in found if samples]
    return todo


def continue_from(
    sampler: Sampler, todo: Sequence[Todo], config: InterveneConfig, seed: int
) -> Generator[Draw, Groups, list[Continuation]]:
    """Draw and grade these continuations."""
    starts = []
    for (_, key, read), start, samples in todo:
        problem, attempt, record = read()
        seeds = [derive_seed(seed, "continue", key, start, n) for n in samples]
        starts.append(Start(problem, seeds, answer_so_far(sampler, attempt, record, start)))
    graded_P_G = yield Draw(starts, config.continuation)
    return [
        Continuation(
            intervention_id=item.passed.id,
            problem_id=item.passed.problem_id,
            start=item.start,
            sample=sample,
            token_ids=graded.completion.token_ids,
            text=graded.text,
            finish_reason=graded.completion.finish_reason,
            **graded.grade.recorded,
        )
        for item, group in zip(todo, graded_P_G, strict=True)
        for sample, graded in zip(item.samples, group, strict=True)
    ]


def answer_so_far(
    sampler: Sampler, attempt: Attempt, intervention: Intervention, start: str
) -> list[int]:
    """The ids from which a continuation starts: see records.Continuation for the three starts."""
    if start == "intervention":
        return [*intervention.prefix_ids, *intervention.intervention_ids]
    # Prefix alone: does the model find the way by itself when it may try again from here?
    if start == "prefix":
        return list(intervention.prefix_ids)
    # Prefix and wrong step: what the model would have gone on with.
    steps = sampler.style.split(attempt.text)
    end = sum(len(step) for step in steps[: intervention.location])
    num_kept, _ = cut(sampler.tokenizer, attempt.token_ids, attempt.text, end)
    return attempt.token_ids[:num_kept]


# --- keep --------------------------------------------------------------------------------------


def judge(
    candidates: Iterable[Intervention],
    continuations: Iterable[Continuation],
    config: InterveneConfig,
) -> Iterator[Intervention]:
    """The candidates with their final gate: "kept" or "unsolved" for those that were continued."""
    # Right continuations are the evidence that a step opens a way to the answer.
    correct = correct_counts(continuations)
    for candidate in candidates:
        if config.continuations and candidate.gate in REACHED_CONTINUATION:
            gate = "kept" if correct[candidate.id] >= config.min_correct else "unsolved"
            candidate = msgspec.structs.replace(candidate, gate=gate)
        yield candidate


def correct_counts(continuations: Iterable[Continuation]) -> dict[str, int]:
    """Intervention id -> number of right continuations from it."""
    counts: dict[str, int] = defaultdict(int)
    for record in continuations:
        right = record.start == "intervention" and record.grade == "correct"
        counts[record.intervention_id] += right
    return counts
