"""The stages that only generate: attempts, interventions with continuations, evaluation.

Attempts and interventions ask their journal what is there, and draw what is missing in flows, one a
problem, that share the engine. Records are on the disk when a draw of a problem has ended, and
are put into the order of the problems when all are there. An evaluation is written once, at its
end: one that was interrupted is drawn again.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from intfast import intervene, parity
from intfast.config import AttemptConfig, Config
from intfast.credit import reward
from intfast.engine.protocol import derive_seed
from intfast.evaluate import Evaluation, ProblemCounts, count_samples
from intfast.grading.watch import at_gates
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.run import Run
from intfast.sample import Draw, Flow, Graded, Start
from intfast.state import interrupt
from intfast.state.journal import Lazy

Wrong = Sequence[tuple[Problem, Attempt]]


@dataclass
class Found:
    """What the stages before training brought to light."""

    selected: list[Problem]
    # Read from the disk as they are asked for: together they do not fit into memory.
    attempts: Sequence[Attempt] = ()
    wrong: Wrong = ()
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
    goes_on = any(config.needs_interventions for config in configs)
    if goes_on:
        _draw_together(run)
    if any(config.needs_attempts for config in configs):
        found.attempts = attempts(run)
        found.selected = select(run, found.attempts)
        found.wrong = wrong_attempts(run, found.selected, found.attempts)
    if goes_on:
        found.interventions, found.continuations = interventions(run, found.wrong)
    return found


def _draw_together(run: Run) -> None:
    """Draw attempts, and what follows from those of a problem while others still have none."""
    first, then, config = _Attempts(run), _Interventions(run), run.config.attempts
    todo, undecided = deque(run.problems), deque(run.problems)

    def flows() -> Iterator[Flow | None]:
        num_selected = 0
        while undecided:
            if not first.missing(undecided[0]):
                # In the order of the problems, as `select` takes them.
                problem = undecided.popleft()
                records = first.of(problem)
                if num_selected != config.max_problems and _is_selected(config, records):
                    num_selected += 1
                    yield then.flow(wrong_attempts(run, [problem], records))
            elif todo:
                yield first.flow(todo.popleft())
            else:
                yield None

    if any(map(first.missing, todo)):
        run.hold("base")
        run_flows(run, "attempts and interventions", flows())
        run.metrics.row("collect", 1, {})


def run_flows(run: Run, title: str, flows: Iterable[Flow | None], total: int | None = None) -> None:
    """Run flows under one bar; total: samples, where it is known how many there will be."""
    # Nothing may be generated with weights that were not compared on both sides.
    parity.before_generating(run)
    with interrupt.phase(title), run.metrics.progress(title, total) as advance:
        run.sampler.flow(flows, advance)


def _row(run: Run, stage: str, values: dict[str, Any], line: str) -> None:
    """One row and line about all records of a stage, unless a run that continues has it."""
    if not run.metrics.rows(stage):
        run.metrics.row(stage, 1, values, line)


# --- attempts ----------------------------------------------------------------------------------


class _Attempts:
    """What there is, and flows that draw what is missing."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.attempts
        self.journal = run.folder.journal("attempts", Attempt)
        # What is there is known by its name, not by its place: records may be missing anywhere.
        self.places: dict[str, dict[int, int]] = defaultdict(dict)
        for place, record in enumerate(self.journal):
            self.places[record.problem_id][record.sample] = place

    def missing(self, problem: Problem) -> list[int]:
        """Numbers of the samples that are not there."""
        return [n for n in range(self.config.samples) if n not in self.places[problem.id]]

    def of(self, problem: Problem) -> list[Attempt]:
        """Those that are there."""
        return [self.journal[place] for _, place in sorted(self.places[problem.id].items())]

    def flow(self, problem: Problem) -> Flow:
        """Draw and write those that are missing."""
        if samples := self.missing(problem):
            # A seed of its own name: what is missing is drawn as if nothing had failed.
            seeds = [derive_seed(self.run.config.seed, "attempts", problem.id, n) for n in samples]
            (group,) = yield Draw([Start(problem, seeds)], self.config.sampling)
            self.places[problem.id] |= {n: len(self.journal) + i for i, n in enumerate(samples)}
            self.journal.append(map(partial(self.run.sampler.attempt, problem), samples, group))


def attempts(run: Run) -> Sequence[Attempt]:
    """`attempts.samples` graded attempts of every training problem, from the base model."""
    stage = _Attempts(run)
    if num := sum(len(stage.missing(problem)) for problem in run.problems):
        # Held only where something is drawn: a finished stage loads no weights.
        run.hold("base")
        run_flows(run, "attempts", map(stage.flow, run.problems), num)
    order = {problem.id: n for n, problem in enumerate(run.problems)}
    stage.journal.sort(lambda record: (order.get(record.problem_id, len(order)), record.sample))

    grades = Counter(record.grade for record in stage.journal)
    line = "attempts: " + ", ".join(f"{count} {grade}" for grade, count in grades.most_common())
    if cut := sum(record.finish_reason == "length" for record in stage.journal):
        line += f"; {cut} cut at the length limit"
    _row(run, "attempts", dict(grades) | {"cut": cut}, line)
    return stage.journal


def _is_selected(config: AttemptConfig, records: Iterable[Attempt]) -> bool:
    return not (config.unsolved_only and any(record.grade == "correct" for record in records))


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


def wrong_attempts(run: Run, selected: Sequence[Problem], records: Sequence[Attempt]) -> Wrong:
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


class _Interventions:
    """What there is of them and of their continuations, and flows that draw what is missing."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.intervene
        self.journal = run.folder.journal("interventions", Intervention)
        self.continuations = run.folder.journal("continuations", Continuation)
        drawn = Counter((record.problem_id, record.attempt) for record in self.journal)
        self.done = {key for key, count in drawn.items() if count == self.config.samples}
        # An attempt whose candidates were cut off in the middle is verified again.
        if len(self.done) < len(drawn):
            self.journal.replace(r for r in self.journal if (r.problem_id, r.attempt) in self.done)
        self.passed: dict[tuple[str, int], tuple[str, int]] = {}
        self._note(0, self.journal)
        # Read once: a wave needs only what became of those before it.
        self.outcomes = intervene.outcomes(self.continuations)

    def _note(self, begin: int, records: Iterable[Intervention]) -> None:
        for place, record in enumerate(records, begin):
            key = record.problem_id, record.attempt
            self.done.add(key)
            # Those that reached the continuations once reach them again, whatever was judged.
            if record.gate in intervene.REACHED_CONTINUATION:
                self.passed[key] = record.id, place

    def unverified(self, wrong: Wrong) -> list[tuple[Problem, Attempt]]:
        """Those without candidates."""
        return [pair for pair in wrong if (pair[0].id, pair[1].sample) not in self.done]

    def missing(self, wrong: Wrong) -> list[intervene.Todo]:
        """The next wave of continuations behind these attempts; empty where the rule is met."""
        passed = []

        def read(n: int, place: int) -> tuple[Problem, Attempt, Intervention]:
            return *wrong[n], self.journal[place]

        # Records name their attempt; the problem and its text are looked up by it.
        for n, (problem, attempt) in enumerate(wrong if self.config.continuations else ()):
            if found := self.passed.get((problem.id, attempt.sample)):
                passed.append(intervene.Passed(problem.id, found[0], partial(read, n, found[1])))
        return intervene.missing(passed, self.outcomes, self.config)

    def flow(self, wrong: Wrong) -> Flow:
        """Verify attempts at one problem; then wave after wave until the stop rule is met."""
        if pairs := self.unverified(wrong):
            sampler, seed = self.run.sampler, self.run.config.seed
            records = yield from intervene.propose(sampler, pairs, self.config, seed)
            begin = len(self.journal)
            self.journal.append(records)
            self._note(begin, records)
        # "futility" learns from all problems: its waves begin when all of them are verified.
        while self.config.stop != "futility" and (todo := self.missing(wrong)):
            yield from self.draw(todo)

    def draw(self, todo: Sequence[intervene.Todo]) -> Flow:
        """Draw and write continuations."""
        sampler, seed = self.run.sampler, self.run.config.seed
        records = yield from intervene.continue_from(sampler, todo, self.config, seed)
        self.continuations.append(records)
        for key, found in intervene.outcomes(records).items():
            self.outcomes.setdefault(key, {}).update(found)


def interventions(run: Run, wrong: Wrong) -> tuple[Sequence[Intervention], Sequence[Continuation]]:
    """Candidates with their final gate, and all continuations, for these wrong attempts."""
    stage, config, title = _Interventions(run), run.config.intervene, "verify and intervene"
    journal, continuations = stage.journal, stage.continuations
    keys = [(problem.id, attempt.sample) for problem, attempt in wrong]
    groups = groupby(range(len(keys)), lambda n: keys[n][0])
    by_problem = [Lazy(list(group), wrong.__getitem__) for _, group in groups]
    if todo := [part for part in by_problem if stage.unverified(part) or stage.missing(part)]:
        run.hold("base")
        run_flows(run, title, map(stage.flow, todo))
    while wave := stage.missing(wrong):
        run_flows(run, title, (stage.draw([item]) for item in wave))
    # The order of one problem after the other, and of continuations wave after wave.
    order = {key: n for n, key in enumerate(keys)}
    journal.sort(lambda r: (order.get((r.problem_id, r.attempt), len(order)), r.sample))
    number = {record.id: n for n, record in enumerate(journal)}

    def turn(record: Continuation) -> tuple[int, ...]:
        start = intervene.STARTS.index(record.start)
        place = number.get(record.intervention_id, len(number))
        return record.sample // config.wave, start, place, record.sample

    continuations.sort(turn)
    # Judged again each time: a run that continues with more continuations decides by all of them.
    journal.replace(intervene.judge(journal, continuations, config))
    gates, words = at_gates(journal)
    _row(run, "verify", gates, f"interventions: {words}")
    grades = Counter((record.start, record.grade == "correct") for record in continuations)
    right = {start: grades[start, True] for start in intervene.STARTS}
    drawn = {start: right[start] + grades[start, False] for start in intervene.STARTS}
    line = ", ".join(
        f"{right[start]} of {num} right from {start}" for start, num in drawn.items() if num
    )
    values = {f"right_{s}": n for s, n in right.items()} | {
        f"drawn_{s}": n for s, n in drawn.items()
    }
    _row(run, "continue", values, f"continuations: {line}")
    return journal, continuations


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
    counted: dict[str, ProblemCounts] = {}

    def flow(problem: Problem) -> Flow:
        # The same seeds for every set of weights, so that differences are paired.
        seeds = [derive_seed(seed, "evaluate", problem.id, n) for n in range(config.samples)]
        (group,) = yield Draw([Start(problem, seeds)], config.sampling)
        counted[problem.id] = _count(problem, group)

    num = len(run.tests) * config.samples
    run_flows(run, f"evaluate {key}", map(flow, run.tests), num)
    result = Evaluation(name=key, seed=seed, problems=[counted[p.id] for p in run.tests])
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
