"""Solutions sampled with the reference in view: for the rivals of interventions.

Reflections (a wrong attempt is rewritten), rationales (STaR: solve along the reference) and hints
(continue the beginning of the reference). Each is recorded in guided.jsonl and drawn once.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from intfast.collect import run_flows
from intfast.config import SamplingConfig
from intfast.engine.protocol import derive_seed
from intfast.leak import leaks
from intfast.methods import prompts
from intfast.records import Attempt, Guided, Problem
from intfast.run import Run
from intfast.sample import Draw, Flow, Start
from intfast.state.journal import Lazy

SHARES = (0.25, 0.5, 0.75)
"""Shares of a reference's characters that the search for the shortest hint tries."""
SAMPLES = 8
"""Samples from each share, until one is right."""
ASKS = 512
"""Prompts that are asked together, at most."""
MOST = 0.8
"""Share of a reference's characters that ReGFT shows."""


class Ask(NamedTuple):
    """Samples to draw from one guided prompt; the fields are those of records.Guided."""

    kind: str
    problem: Problem
    prompt_ids: Sequence[int]
    samples: list[int]
    attempt: int = -1
    share: float = 0.0


def reflections(run: Run, wrong: Sequence[tuple[Problem, Attempt]]) -> Sequence[Guided]:
    """One rewrite of each wrong attempt, right or not, in the order of the attempts."""
    asks = []
    for problem, attempt in wrong:
        prompt_ids = array("I", prompts.reflect(run.sampler.style, problem, attempt.text))
        asks.append(Ask("reflection", problem, prompt_ids, [0], attempt.sample))
    return _draw(run, "reflections", asks, run.config.intervene.sampling)


def rationales(run: Run, problems: Sequence[Problem], kind: str, share: float) -> Sequence[Guided]:
    """`sft.samples` solutions along so much of the reference of each problem that has one."""
    samples, style, asks = list(range(run.config.sft.samples)), run.sampler.style, []
    for problem in problems:
        if problem.reference:
            # The whole of it to the last blank, as it stands in the data.
            part = problem.reference if share == 1 else beginning(problem.reference, share)
            seen = replace(problem, reference=part)
            asks.append(Ask(kind, problem, prompts.rationalise(style, seen), samples))
    return _draw(run, "rationales", asks, run.config.intervene.sampling)


def hints(run: Run, problems: Sequence[Problem]) -> dict[str, Sequence[int]]:
    """Problem id -> prompt ids of the problem with the beginning of its reference.

    "shortest": the shares are tried in rising order until one of SAMPLES is right;
    a problem that none unlocks keeps the shortest. Left out: problems without a reference, and
    those for which every beginning gives the answer away or leaves no room.
    """
    config = run.config.rl
    pending = [problem for problem in problems if problem.reference]
    if config.hint == "off":
        return {}
    if config.hint != "shortest":
        return {a.problem.id: a.prompt_ids for a in _hinted(run, pending, config.hint)}
    chosen: dict[str, Sequence[int]] = {}
    for share in SHARES:
        asks = _hinted(run, pending, share)
        drawn = _draw(run, f"hints of {share:.0%}", asks, config.sampling)
        solved = {record.problem_id for record in drawn if record.grade == "correct"}
        for ask in asks:
            if ask.problem.id in solved or ask.problem.id not in chosen:
                chosen[ask.problem.id] = ask.prompt_ids
        pending = [problem for problem in pending if problem.id not in solved]
    return chosen


def _hinted(run: Run, problems: Sequence[Problem], share: float) -> list[Ask]:
    """The problems with so much of their reference, where that is a hint and fits."""
    config = run.config.rl
    asks = []
    for problem in problems:
        text = beginning(problem.reference or "", share)
        prompt = prompts.hint(run.sampler.style, problem, text)
        if not leaks(text, problem.answer) and run.sampler.fits(len(prompt), config.sampling):
            asks.append(Ask("hint", problem, prompt, list(range(SAMPLES)), share=share))
    return asks


def beginning(text: str, share: float) -> str:
    """The first whole words of a text, as many as fit into this share of its characters."""
    end = 0
    for word in re.finditer(r"\S+", text):
        if word.end() > share * len(text):
            break
        end = word.end()
    return text[:end]


def _draw(run: Run, title: str, asks: Sequence[Ask], sampling: SamplingConfig) -> Sequence[Guided]:
    """The records of these asks, in their order; what the journal lacks is drawn."""
    journal = run.folder.journal("guided", Guided)
    done = {_key(record): place for place, record in enumerate(journal)}
    fitting = [ask for ask in asks if run.sampler.fits(len(ask.prompt_ids), sampling)]
    todo = [
        ask._replace(samples=missing)
        for ask in fitting
        if (missing := [n for n in ask.samples if (*_name(ask), n) not in done])
    ]

    def flow() -> Flow:
        seed = run.config.seed
        # One draw after the other, so that an interrupted run keeps the order of its records.
        for first in range(0, len(todo), ASKS):
            chunk = todo[first : first + ASKS]
            seeds = [[derive_seed(seed, *_name(a), n) for n in a.samples] for a in chunk]
            rows = zip(chunk, seeds, strict=True)
            graded_P_G = yield Draw(
                [Start(a.problem, s, (), a.prompt_ids) for a, s in rows], sampling
            )
            journal.append(
                Guided(
                    kind=ask.kind,
                    problem_id=ask.problem.id,
                    sample=sample,
                    attempt=ask.attempt,
                    share=ask.share,
                    token_ids=graded.completion.token_ids,
                    text=graded.text,
                    finish_reason=graded.completion.finish_reason,
                    **graded.grade.recorded,
                )
                for ask, group in zip(chunk, graded_P_G, strict=True)
                for sample, graded in zip(ask.samples, group, strict=True)
            )

    if todo:
        run.hold("base")
        run_flows(run, title, [flow()], sum(len(ask.samples) for ask in todo))
        done = {_key(record): place for place, record in enumerate(journal)}
    places = [done[key] for a in asks for n in a.samples if (key := (*_name(a), n)) in done]
    found = Lazy(places, journal.__getitem__)
    if todo:
        right = sum(record.grade == "correct" for record in found)
        too_long = len(asks) - len(fitting)
        values = {"right": right, "drawn": len(found), "too_long": too_long}
        line = f"{title}: {right} of {len(found)} right; {too_long} prompts leave no room"
        run.metrics.row("guided", 1, values, line)
    return found


def _name(ask: Ask) -> tuple[str, str, int, float]:
    return ask.kind, ask.problem.id, ask.attempt, ask.share


def _key(record: Guided) -> tuple[str, str, int, float, int]:
    return record.kind, record.problem_id, record.attempt, record.share, record.sample
