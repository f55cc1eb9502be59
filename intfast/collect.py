"""The stages that only generate: attempts, interventions with continuations, evaluation.

Attempts and interventions ask their journal what is already there and draw what is missing, chunk
by chunk. An evaluation is written once, at its end: one that was interrupted is drawn again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from intfast import intervene, parity
from intfast.config import Config
from intfast.credit import reward
from intfast.engine.protocol import CHUNK_SAMPLES, derive_seed
from intfast.evaluate import Evaluation, ProblemCounts, count_samples
from intfast.grading.watch import at_gates
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.run import Run
from intfast.sample import Graded, Item, Start, chunks
from intfast.state import interrupt
from intfast.state.journal import Journal, Lazy


@dataclass
class Found:
    """What the stages before training brought to light."""

    selected: list[Problem]
    # Read from the disk as they are asked for: together they do not fit into memory.
    attempts: Sequence[Attempt] = ()
    wrong: Sequence[tuple[Problem, Attempt]] = ()
    interventions: Sequence[Intervention] = ()
    continuations: Sequence[Continuation] = ()
    examples: Sequence[Example] = ()
    supervised: str = "base"
    """The weights after SFT, where RL starts."""

    def rl_problems(self, which: str) -> list[Problem]:
        """The problems of RL: all selected ones, or those with a kept intervention."""
        if which == "selected":
            return self.selected
        unlocked = {r.problem_id for r in self.interventions if r.gate == "kept"}
        return [problem for problem in self.selected if problem.id in unlocked]


def gather(run: Run, configs: Sequence[Config]) -> Found:
    """What the training data and the choice of problems of these configs need."""
    found = Found(selected=run.problems[: run.config.attempts.max_problems])
    if any(config.needs_attempts for config in configs):
        found.attempts = attempts(run)
        found.selected = select(run, found.attempts)
        found.wrong = wrong_attempts(run, found.selected, found.attempts)
    if any(config.needs_interventions for config in configs):
        found.interventions, found.continuations = interventions(run, found.wrong)
    return found


def draw_missing(
    run: Run,
    title: str,
    todo: Sequence[Item],
    size: Callable[[Item], int],
    work: Callable[[list[Item], intervene.Advance], None],
) -> None:
    """Do the missing work of a stage in chunks of CHUNK_SAMPLES, under one bar."""
    if not todo:
        return
    # Nothing may be generated with weights that were not compared on both sides.
    parity.before_generating(run)
    with interrupt.phase(title), run.metrics.progress(title, sum(map(size, todo))) as advance:
        # A chunk is what an interruption can cost: its records are on the disk before the next.
        for chunk in chunks(todo, CHUNK_SAMPLES, size):
            interrupt.check(meets=True)
            work(chunk, advance)


# --- attempts ----------------------------------------------------------------------------------


def attempts(run: Run) -> Sequence[Attempt]:
    """`attempts.samples` graded attempts of every training problem, from the base model."""
    num = run.config.attempts.samples
    journal = run.folder.journal("attempts", Attempt)
    # What is there is known by its name, not by its place: records may be missing anywhere.
    done = {(record.problem_id, record.sample) for record in journal}
    todo = [
        (problem, missing)
        for problem in run.problems
        if (missing := [n for n in range(num) if (problem.id, n) not in done])
    ]
    if not todo:
        return journal

    def work(chunk: Any, advance: intervene.Advance) -> None:
        journal.append(_attempt(run, chunk, advance))

    # Held only where something is drawn: a finished stage loads no weights.
    run.hold("base")
    draw_missing(run, "attempts", todo, lambda item: len(item[1]), work)
    grades = Counter(record.grade for record in journal)
    line = "attempts: " + ", ".join(f"{count} {grade}" for grade, count in grades.most_common())
    if cut := sum(record.finish_reason == "length" for record in journal):
        line += f"; {cut} cut at the length limit"
    run.metrics.row("attempts", 1, dict(grades) | {"cut": cut}, line)
    return journal


def _attempt(
    run: Run, todo: Sequence[tuple[Problem, list[int]]], advance: intervene.Advance
) -> list[Attempt]:
    # Each sample has a seed of its own name: what is missing is drawn as if nothing had failed.
    seed, sampler = run.config.seed, run.sampler
    starts = [
        Start(problem, [derive_seed(seed, "attempts", problem.id, n) for n in samples])
        for problem, samples in todo
    ]
    graded_P_G = sampler.sample(starts, run.config.attempts.sampling, advance)
    return [
        sampler.attempt(problem, sample, graded)
        for (problem, samples), group in zip(todo, graded_P_G, strict=True)
        for sample, graded in zip(samples, group, strict=True)
    ]


def select(run: Run, records: Sequence[Attempt]) -> list[Problem]:
    """The problems that go on: all, or those that no attempt solved; at most `max_problems`."""
    config = run.config.attempts
    # Attempts at all problems, selected or not, tell which are solved.
    solved = {record.problem_id for record in records if record.grade == "correct"}
    unsolved = [problem for problem in run.problems if problem.id not in solved]
    if config.unsolved_only and not unsolved:
        raise ValueError(
            f"attempts.unsolved_only = true leaves none of {len(run.problems)} problems: the "
            "model solves all of them; bring harder problems, or set it to false"
        )
    return (unsolved if config.unsolved_only else run.problems)[: config.max_problems]


def wrong_attempts(
    run: Run, selected: Sequence[Problem], records: Sequence[Attempt]
) -> Sequence[tuple[Problem, Attempt]]:
    """The first `wrong_per_problem` wrong attempts of each selected problem with a reference."""
    # Ungraded attempts are not wrong ones: nothing is learned from correcting them.
    by_problem: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        if record.grade == "wrong":
            by_problem[record.problem_id].append(place)
    chosen = [
        (problem, place)
        for problem in selected
        if problem.reference
        for place in by_problem[problem.id][: run.config.attempts.wrong_per_problem]
    ]
    return Lazy(chosen, lambda pair: (pair[0], records[pair[1]]))


# --- interventions -----------------------------------------------------------------------------


def interventions(
    run: Run, wrong: Sequence[tuple[Problem, Attempt]]
) -> tuple[Sequence[Intervention], Sequence[Continuation]]:
    """Candidates with their final gate, and all continuations, for these wrong attempts."""
    config, seed = run.config.intervene, run.config.seed
    journal = run.folder.journal("interventions", Intervention)
    drawn = Counter((record.problem_id, record.attempt) for record in journal)
    # An attempt whose candidates were cut off in the middle is verified again.
    done = {key for key, count in drawn.items() if count == config.samples}
    if len(done) < len(drawn):
        journal.replace(r for r in journal if (r.problem_id, r.attempt) in done)
    # Records name their attempt; the problem and its text are looked up by it.
    places = {(problem.id, attempt.sample): n for n, (problem, attempt) in enumerate(wrong)}
    todo = [place for key, place in places.items() if key not in done]

    def propose(chunk: Sequence[int], advance: intervene.Advance) -> None:
        pairs = [wrong[place] for place in chunk]
        journal.append(intervene.propose(run.sampler, pairs, config, seed, advance))

    if todo:
        run.hold("base")
        # Guided solution and verifications of an attempt, on one progress bar.
        turns = config.samples + int(config.guided_solve)
        draw_missing(run, "verify and intervene", todo, lambda _: turns, propose)
        gates, words = at_gates(journal)
        run.metrics.row("verify", 1, gates, f"interventions: {words}")

    # Those that reached the continuations once reach them again, whatever was judged so far.
    passed = []
    for place, record in enumerate(journal):
        if record.gate in intervene.REACHED_CONTINUATION:
            pair = places[record.problem_id, record.attempt]
            read = partial(_read, wrong, pair, journal, place)
            passed.append(intervene.Passed(record.problem_id, record.id, read))
    continuations = run.folder.journal("continuations", Continuation)
    if config.continuations:
        _continue(run, passed, continuations)
    # Judged again each time: a run that continues with more continuations decides by all of them.
    journal.replace(intervene.judge(journal, continuations, config))
    return journal, continuations


def _read(
    wrong: Sequence[tuple[Problem, Attempt]], pair: int, journal: Journal[Intervention], place: int
) -> tuple[Problem, Attempt, Intervention]:
    return *wrong[pair], journal[place]


def _continue(run: Run, passed: Sequence[intervene.Passed], journal: Journal[Continuation]) -> None:
    """Draw waves of continuations until the stop rule is met for every intervention."""
    config, seed = run.config.intervene, run.config.seed

    # Read once: a wave needs only what became of those before it.
    done = intervene.outcomes(journal)

    def work(chunk: Sequence[intervene.Todo], advance: intervene.Advance) -> None:
        records = intervene.continue_from(run.sampler, chunk, config.continuation, seed, advance)
        journal.append(records)
        for key, found in intervene.outcomes(records).items():
            done.setdefault(key, {}).update(found)

    while todo := intervene.missing(passed, done, config):
        run.hold("base")
        # The earliest wave alone, so that an interrupted run keeps the order of its records.
        first = min(item.samples[0] // config.wave for item in todo)
        todo = [item for item in todo if item.samples[0] // config.wave == first]
        title = f"continuations, wave {first + 1}"
        draw_missing(run, title, todo, lambda item: len(item.samples), work)
        # Over all waves so far, so that the line says where the stage stands.
        right, drawn = Counter(), Counter()
        for (_, start), found in done.items():
            right[start] += sum(found.values())
            drawn[start] += len(found)
        line = ", ".join(f"{right[start]} of {n} right from {start}" for start, n in drawn.items())
        values = {f"right_{s}": right[s] for s in drawn} | {f"drawn_{s}": drawn[s] for s in drawn}
        run.metrics.row("continue", first + 1, values, f"continuations: {line}")


# --- evaluation --------------------------------------------------------------------------------


def evaluation(run: Run, name: str, step: int | None = None) -> Evaluation | None:
    """Counts of the named weights on the test problems; None without test problems.

    `step` marks an evaluation in the middle of RL, with the weights as they are. A stored
    evaluation is not repeated.
    """
    if not run.tests:
        return None
    key = name if step is None else f"{name}@{step}"
    stored = run.folder.read_json("evaluations.json", dict[str, Evaluation]) or {}
    # The weights of a finished stage do not change, nor does what was measured of them.
    if key in stored:
        return stored[key]
    if step is None:
        run.hold(name)
    config, seed = run.config.evaluate, run.config.seed
    # The same seeds for every set of weights, so that differences are paired.
    starts = [
        Start(p, [derive_seed(seed, "evaluate", p.id, n) for n in range(config.samples)])
        for p in run.tests
    ]
    counted: list[ProblemCounts] = []

    def work(chunk: Any, advance: intervene.Advance) -> None:
        groups = run.sampler.sample(chunk, config.sampling, advance)
        counted.extend(_count(s.problem, g) for s, g in zip(chunk, groups, strict=True))

    draw_missing(run, f"evaluate {key}", starts, lambda start: len(start.seeds), work)
    result = Evaluation(name=key, seed=seed, problems=counted)
    run.folder.write_json("evaluations.json", stored | {key: result})
    row: dict[str, Any] = {"of": key}
    line = f"evaluation of {key}: no answer could be graded"
    if result.accuracies():
        found = result.summary([])
        row |= {"accuracy": found.accuracy.value, "truncated": found.truncated}
        line = (
            f"evaluation of {key}: accuracy {found.accuracy.value:.4f} [{found.accuracy.low:.4f}, "
            f"{found.accuracy.high:.4f}] on {found.accuracy.num_problems} problems"
        )
        if found.reward:
            row["mean_reward"] = found.reward.value
            line += f", mean reward {found.reward.value:.4f}"
        line += f", {found.truncated:.0%} cut at the length limit" if found.truncated else ""
    run.metrics.row("evaluate", step or 0, row, line)
    return result


def _count(problem: Problem, group: Sequence[Graded]) -> ProblemCounts:
    return count_samples(
        problem.id,
        [graded.grade.status for graded in group],
        [graded.grade.reason for graded in group],
        [graded.completion.finish_reason for graded in group],
        [len(graded.completion.token_ids) for graded in group],
        [reward(graded.grade) for graded in group],
    )
