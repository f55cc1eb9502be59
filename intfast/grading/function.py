"""Grades by a scoring function of the user: `grade.function`, in workers as the built-in ones.

    score(problem, completion) -> bool | float | None
    scores(problems, completions) -> a list of these

`problem` is the row with all its columns, `completion` the whole answer; None is unscored. What is
at least `grade.correct_at` is right. The function is named by whoever starts the run, and imported
from the folder that this was done in, or from an installed package: never by a row of data, a model
folder or a stored config.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from intfast import ranks
from intfast.config import GradeConfig
from intfast.grading.grader import Grade, Grader, Job, Submission, _Worker
from intfast.grading.reasons import Reason, Status
from intfast.records import Problem
from intfast.state import interrupt

SCRIPT = Path(__file__).with_name("function_worker.py")
MAX_TOGETHER = 64
"""Texts of one message to a worker, and of one call where the function takes lists."""
FAST_S = 0.05
"""A message that is answered within this is followed by a longer one."""
CHECK_EVERY = 64
"""Of so many texts one is scored twice, to see whether the function decides by the text alone."""
TRIED = 16
"""References that are scored before anything is generated."""
FORMS = ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "Answer: {}")
"""How an answer is written where there is no reference: the best of them counts."""

_Said = float | None | tuple[str, str]


class _FunctionWorker(_Worker):
    """A process with the function; the deadline is that of one call."""

    _decode = msgspec.json.Decoder(list[_Said] | str).decode

    def __init__(self, grader: FunctionGrader) -> None:
        name, mode = grader.settings.function, grader.settings.mode
        super().__init__(grader.timeout_s, name, mode, script=SCRIPT, folder=os.getcwd())
        self.grader, self.size, self.given_at = grader, 1, 0.0
        self._left: deque[Job] = deque()
        self._rest = b""

    def give(self, job: Any) -> None:
        self.job, self._left, self.given_at = job, deque(job), time.monotonic()
        self.deadline = self.given_at + self.timeout_s
        pairs = ",".join(f"[{row},{json.dumps(text)}]" for row, text in job)
        # A process that has died shows where it is read.
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"[{pairs}]\n".encode())

    def read(self) -> tuple[list[tuple[Job, Any]], bool]:
        data = os.read(self.verdict_fd, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not self.ready:
            if lines or not data:
                self.started(bool(lines))
                self.grader.loaded(json.loads(lines[0]))
            return [], False
        found: list[tuple[Job, Any]] = []
        for line in lines:
            try:
                said = self._decode(line)
            except msgspec.DecodeError:
                return found + self.late(Reason.CRASH), True
            if isinstance(said, str):
                return found + self.late((Reason.FORBIDDEN, f"not allowed here: {said}")), True
            # Another number was not written by us: what follows would be taken for the next texts.
            if len(said) != (len(self._left) if self.grader.is_batch else min(1, len(self._left))):
                return found + self.late(Reason.CRASH), True
            found += [(self._left.popleft(), value) for value in said]
            self.deadline = (now := time.monotonic()) + self.timeout_s
        if not data:
            return found + self.late(Reason.CRASH), True
        if not self._left and self.job is not None:
            self.job, is_fast = None, now - self.given_at < FAST_S
            self.size = min(2 * self.size, MAX_TOGETHER) if is_fast else max(1, self.size // 2)
        return found, False

    def late(self, reason: Any = Reason.TIMEOUT) -> list[tuple[Job, Any]]:
        """The outcome of the call that did not come back; what is behind it goes to another."""
        if not self._left:
            return []
        if self.grader.is_batch and len(self._left) > 1:
            # Nobody knows which text it was.
            self.grader.again(self._left, alone=True)
            return []
        job = self._left.popleft()
        self.grader.again(self._left)
        return [(job, reason)]


class FunctionGrader(Grader):
    """Grades by `settings.function`; otherwise as Grader, but that nothing is remembered.

    say: is told, once for each reason, what was wrong with a call
    """

    def __init__(self, settings: GradeConfig, say: Callable[[str], None] = print) -> None:
        super().__init__(settings.mode, settings.workers, settings.timeout_s)
        self.mode = "function"
        self.settings, self.say = settings, say
        self.is_batch = False
        self._alone: set[Job] = set()
        self._sources: dict[str, str] | None = None
        self._told: set[str] = set()

    def check_golds(self, golds: Sequence[str]) -> list[bool]:
        """A function needs no gold answer."""
        return [True] * len(golds)

    def grade_many(self, submissions: Iterable[Submission | tuple[Any, ...]]) -> list[Grade]:
        """One Grade per submission, in order. Raises ValueError where the function cannot be
        loaded, or was changed while the run went on."""
        jobs = [self._quickly(Submission(*submission))[0] for submission in submissions]
        found = self._judge(jobs)
        again = [j for j in found if zlib.crc32(j[1].encode(errors="replace")) % CHECK_EVERY == 0]
        self._compare(found, self._judge(again))
        return [found[job] for job in jobs]

    def gives_away(self, problem: Problem, step: str) -> bool:
        """Whether the function takes a step alone for a right answer."""
        asked = [Submission(problem.answer, step, row=problem.row)]
        # On one rank: a verdict may depend on a clock, and all must go the same way.
        return ranks.now().first(lambda: self.grade_many(asked)[0].status) == Status.CORRECT

    def sources(self) -> dict[str, str]:
        """Digests of the modules of the user's folder that the function was imported with."""
        if self._sources is None:
            self._workers.append(self._worker())
        while self._sources is None:
            interrupt.check()
            self._advance(1.0)
        return self._sources

    def tried(self, problems: Sequence[Problem]) -> list[str]:
        """What the function gives the references of the first problems, in sentences.

        Raises ValueError where it can score none of them.
        """
        name, texts, grades = f"grade.function = {self.settings.function!r}", [], []
        for p in [p for p in problems if p.reference or p.answer][:TRIED]:
            # A bare answer may stand where the function does not look.
            forms = [p.reference] if p.reference else [form.format(p.answer) for form in FORMS]
            asked = [Submission(p.answer, text, row=p.row) for text in forms]
            found, again = self.grade_many(asked), self.grade_many(asked)
            self._compare(*(dict(enumerate(g)) for g in (found, again)))
            best = max(range(len(forms)), key=lambda n, found=found: _rank(found[n]))
            texts.append((p, forms[best]))
            grades.append(found[best])
        if not texts:
            self.sources()
            return [f"{name} is not tried: no problem has a reference or an answer"]
        unscored = Counter(g.reason.value for g in grades if g.status is Status.UNSCORED)
        counts = ", ".join(f"{n} {reason}" for reason, n in unscored.items())
        if unscored.total() == len(grades):
            raise ValueError(f"{name} scores none of the first {len(grades)} references: {counts}")
        (first, text), values = texts[0], [_value(grade) for grade in grades]
        lines = [f"{name} gives the reference of {first.source} {values[0]}: ...{text[-80:]!r}"]
        if low := [
            f"{problem.source} {value}"
            for (problem, _), grade, value in zip(texts, grades, values, strict=True)
            if grade.status is not Status.CORRECT
        ]:
            lines.append(
                f"warning: {name} gives {len(low)} of the first {len(grades)} references less "
                f"than grade.correct_at = {self.settings.correct_at:g}: {', '.join(low)}; nothing "
                "like them will be right: look at the function, or lower grade.correct_at"
            )
        return lines

    def loaded(self, said: dict[str, Any]) -> None:
        """A worker has loaded the function, or says why it could not."""
        name = self.settings.function
        if "error" in said:
            raise ValueError(
                f"grade.function = {name!r} cannot be loaded (names are looked up in "
                f"{said['folder']} and in installed packages):\n{said['error']}"
            )
        if self._sources not in (None, said["sources"]):
            raise ValueError(f"grade.function = {name!r} was changed while the run went on")
        self.is_batch, self._sources = said["is_batch"], said["sources"]

    def again(self, jobs: Iterable[Job], alone: bool = False) -> None:
        """Put jobs back that a worker did not come to."""
        self._queue.extendleft(reversed(jobs := list(jobs)))
        self._alone.update(jobs if alone else ())

    def _worker(self) -> _FunctionWorker:
        return _FunctionWorker(self)

    def _next(self, worker: Any) -> list[Job]:
        size = MAX_TOGETHER if self.is_batch else worker.size
        size = min(size, -(-len(self._queue) // self.num_workers))
        jobs = [self._queue.popleft()]
        while len(jobs) < size and self._alone.isdisjoint((jobs[0], self._queue[0])):
            jobs.append(self._queue.popleft())
        return jobs

    def _quickly(self, row: Submission) -> tuple[Job, Reason | None]:
        return (row.row or json.dumps({"answer": row.gold}), row.text), None

    def _judge(self, jobs: list[Job]) -> dict[Job, Any]:
        found = super()._judge(jobs)
        # Whole texts would fill the memory, and one that comes again is rare.
        self._cache.clear()
        self._alone.difference_update(found)
        return found

    def _collect(self, patience_s: float) -> Iterator[tuple[Job, Grade]]:
        for job, said in super()._collect(patience_s):
            yield job, self._grade(said)

    def _grade(self, said: Reason | _Said) -> Grade:
        if isinstance(said, float):
            low, high = self.settings.range or (said, said)
            if low <= said <= high:
                is_right = said >= self.settings.correct_at
                reason = Reason.CORRECT if is_right else Reason.WRONG
                reward = UNSET if said == is_right else said
                return Grade(status=reason.status, reason=reason, reward=reward)
            said = Reason.OUT_OF_RANGE, f"{said:g} is not in grade.range, {low:g} to {high:g}"
        reason, words = said if isinstance(said, tuple) else (said or Reason.NO_REWARD, "")
        if words:
            self._tell(reason, f"{reason} (the first): {words}")
        return Grade(status=Status.UNSCORED, reason=Reason(reason))

    def _compare(self, once: dict[Any, Grade], twice: dict[Any, Grade]) -> None:
        for key, grade in twice.items():
            a, b = once[key], grade
            if a != b and Status.UNSCORED not in (a.status, b.status):
                words = f"warning: the same text was given {_value(a)} and then {_value(b)}"
                self._tell("twice", f"{words}; a run with it cannot be repeated")

    def _tell(self, key: str, words: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self.say(f"grade.function = {self.settings.function!r}: {words}")


def _rank(grade: Grade) -> tuple[bool, bool, float]:
    """Orders grades: right before wrong before unscored, then by reward."""
    reward = grade.reward if isinstance(grade.reward, float) else 0.0
    return grade.status is Status.CORRECT, grade.status is Status.WRONG, reward


def _value(grade: Grade) -> str:
    """The reward of a grade in words."""
    if grade.status is Status.UNSCORED:
        return grade.reason.value
    return f"{float(grade.status is Status.CORRECT) if grade.reward is UNSET else grade.reward:g}"


def check_named(config: Path, stored: str, given: str, option: str) -> None:
    """Raise ValueError where a stored config names a function that nobody named again: the folder
    may be somebody else's, and what it names would be imported here."""
    if stored != given and stored:
        raise ValueError(f"{config} names a function to import; to do so, add {option}{stored}")


def grader_of(settings: GradeConfig) -> Grader:
    """The grader that the settings name."""
    if settings.function:
        return FunctionGrader(settings)
    return Grader(settings.mode, settings.workers, settings.timeout_s, settings.digits)
