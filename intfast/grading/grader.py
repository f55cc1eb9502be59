"""Submissions -> Grades, with every comparison that needs a parser in a process that can be killed.

The reasons and what they count as are in answers.py. `python -m intfast.study regrade
FILE` grades stored rows again without generating anything.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import UNSET, UnsetType

from intfast import ranks
from intfast.grading.answers import MATHEMATICS, compare_quickly, extract
from intfast.grading.normal import normalise, number
from intfast.grading.reasons import LAST_WORDS, READY, VERDICTS, Reason, Status
from intfast.records import Problem, Record, Reward
from intfast.state import interrupt

WORKER = Path(__file__).with_name("worker.py")
WORKER_START_S = 120.0
WORKER_MEMORY_BYTES = 300 << 20
"""What a worker may hold in memory, libraries and answer together."""
MAX_CACHED = 100_000

Job = tuple[str, str]
"""(gold answer, extracted answer) to compare."""


class Grade(Record):
    """Example: Grade(status="wrong", reason="no_answer")."""

    status: Status
    reason: Reason
    reward: Reward = UNSET
    """Of a grading function, where it is not the 1 of a right answer or the 0 of a wrong one."""

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields of a record that is graded."""
        return {"grade": self.status, "reason": self.reason, "reward": self.reward}


class Submission(NamedTuple):
    """One text to grade against one gold answer. `finish_reason` is that of the completion."""

    gold: str
    text: str
    finish_reason: str = "stop"
    row: str | UnsetType = UNSET
    """The problem's row as JSON, which a grading function reads; records.Problem.row."""


class _Worker:
    """One child process: starting, then idle or busy with one job until its deadline."""

    def __init__(
        self, timeout_s: float, *arguments: object, script: Path | None = None, folder: str = ""
    ) -> None:
        limits = map(str, (int(timeout_s) + 2, WORKER_MEMORY_BYTES, *arguments))
        # Nothing of the parent's but where Python finds its modules.
        environment = {
            "PYTHONPATH": os.pathsep.join(path for path in (folder, *sys.path) if path),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            # With gmpy2 one big-number call cannot be interrupted, and verdicts would depend on it.
            "SYMPY_GROUND_TYPES": "python",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script or WORKER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        self.verdict_fd = self.process.stdout.fileno()
        self.timeout_s = timeout_s
        self.job: Any = None
        """What it was given, and has not answered: of the built-in comparison one Job."""
        self.ready = False
        self.deadline = time.monotonic() + WORKER_START_S

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    @property
    def is_spent(self) -> bool:
        """Idle, yet dead or with more to say: whatever it says now would be taken for a verdict."""
        return self.idle and bool(wait([self.verdict_fd], 0))

    def give(self, job: Job) -> None:
        """Start one (gold, answer) comparison; a dead worker shows when its verdict is read."""
        self.job = job
        self.deadline = time.monotonic() + self.timeout_s
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
        except BrokenPipeError:
            self.process.kill()

    def read(self) -> tuple[list[tuple[Job, Any]], bool]:
        """The verdicts that have come, and whether the process has ended.

        A first READY ends the start.
        """
        byte = os.read(self.verdict_fd, 2)
        if not self.ready:
            self.started(byte == READY)
            return [], False
        job, self.job = self.job, None
        verdict = byte if byte in VERDICTS | LAST_WORDS else b""
        found = [] if job is None else [(job, (VERDICTS | LAST_WORDS)[verdict])]
        return found, verdict in LAST_WORDS

    def started(self, is_ready: bool) -> None:
        """End the start. Raises RuntimeError where the process could not be made ready."""
        if not is_ready:
            message = self.process.stderr.read(4000).decode(errors="replace").strip()
            raise RuntimeError(f"a grading worker did not start; its last words:\n{message}")
        self.process.stderr.close()
        self.ready = True

    def late(self) -> list[tuple[Job, Any]]:
        """What becomes of the job whose deadline has passed."""
        return [(self.job, Reason.TIMEOUT)]

    def close(self) -> None:
        """End the process group now and reap it. A worker holds nothing worth saving."""
        # Until it is reaped, its id is that of its group, which may hold more than itself.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


class Grader:
    """Grades submissions; use as a context manager, from one thread.

    Workers start when the first comparison needs one, and are killed and replaced when it passes
    `timeout_s`. Verdicts are cached per (gold, extracted answer).
    """

    def __init__(
        self, mode: str = "boxed", workers: int = 2, timeout_s: float = 5.0, digits: int = 0
    ) -> None:
        extract("", mode)
        if workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"a grader needs workers >= 1 and timeout_s > 0, got {workers} and {timeout_s}"
            )
        self.mode = mode
        # Of all ranks of this machine together.
        self.num_workers = max(1, workers // ranks.now().neighbours)
        self.timeout_s = timeout_s
        self.digits = digits
        self._workers: list[_Worker] = []
        self._cache: dict[Job, Reason] = {}
        self._queue: deque[Job] = deque()
        self._begun: dict[Job, Reason | None] = {}
        """Jobs in the queue or with a worker, and verdicts that nobody has asked for yet."""

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        while self._workers:
            self._workers.pop().close()
        self._queue.clear()
        self._begun.clear()

    def grade_many(self, submissions: Iterable[Submission | tuple[str, ...]]) -> list[Grade]:
        """One Grade per (gold, text[, finish_reason]), in order.

        Raises RuntimeError when a worker cannot be started.
        """
        found = [self._quickly(Submission(*submission)) for submission in submissions]
        verdicts = self._judge([job for job, reason in found if reason is None])
        reasons = [reason or verdicts[job] for job, reason in found]
        return [Grade(status=reason.status, reason=reason) for reason in reasons]

    def start(self, submission: Submission) -> list[Job]:
        """Begin a comparison and return at once; `grade_many` of the same submission ends it.

        What this process compares itself is left to `grade_many`; else what is begun is returned.
        """
        job, reason = self._quickly(submission)
        jobs = [job] if reason is None else []
        self._begin(jobs)
        self._advance(0.0)
        return jobs

    def has(self, jobs: Sequence[Job]) -> bool:
        """Whether the verdicts of comparisons that were begun are there."""
        if jobs:
            self._advance(0.0)
        return all(self._begun.get(job, True) for job in jobs)

    def check_golds(self, golds: Sequence[str]) -> list[bool]:
        """Whether each gold answer can be graded against, so that no rollout is spent on it."""
        if self.mode not in MATHEMATICS:
            return [bool(gold.split()) for gold in golds]
        refused = {g for g in golds if compare_quickly(g, "?") is Reason.GOLD_UNPARSEABLE}
        # Whether the parser reads the others is seen where it compares each with itself.
        unread = [g for g in golds if g not in refused and number(normalise(g)) is None]
        verdicts = self._judge([(gold, gold) for gold in unread])
        refused |= {g for (g, _), reason in verdicts.items() if reason.status is Status.UNSCORED}
        return [gold not in refused for gold in golds]

    def gives_away(self, problem: Problem, step: str) -> bool:
        """Whether a step alone earns what is right, beside what `leak.leaks` finds: a question for
        grading functions; here `leaks` has compared whatever could be an answer."""
        return False

    def tried(self, problems: Sequence[Problem]) -> list[str]:
        """What there is to say of references as this grader sees them; FunctionGrader.tried."""
        return []

    def sources(self) -> dict[str, str]:
        """Digests of what is not of intfast; FunctionGrader.sources."""
        return {}

    def _quickly(self, row: Submission) -> tuple[Job, Reason | None]:
        """(gold, extracted answer), and the verdict where it needs no worker."""
        answer = extract(row.text, self.mode)
        if answer is None:
            reason = Reason.TRUNCATED if row.finish_reason == "length" else Reason.NO_ANSWER
        elif self.mode in MATHEMATICS:
            reason = compare_quickly(row.gold, answer, self.digits)
        else:
            reason = Reason.CORRECT if answer == " ".join(row.gold.split()) else Reason.WRONG
        return (row.gold, answer or ""), reason

    def _judge(self, jobs: list[Job]) -> dict[Job, Reason]:
        """Verdicts of the jobs, from the cache or from workers."""
        verdicts = {job: self._cache[job] for job in jobs if job in self._cache}
        self._begin(jobs)
        missing = set(jobs) - verdicts.keys()
        while any(self._begun[job] is None for job in missing):
            interrupt.check()
            # Not longer than a request to stop may wait.
            self._advance(1.0)
        verdicts |= {job: self._begun.pop(job) for job in missing}
        if len(self._cache) + len(verdicts) > MAX_CACHED:
            self._cache.clear()
        self._cache.update((j, r) for j, r in verdicts.items() if r is not Reason.CRASH)
        return verdicts

    def _begin(self, jobs: list[Job]) -> None:
        new = [j for j in dict.fromkeys(jobs) if j not in self._cache and j not in self._begun]
        self._begun.update(dict.fromkeys(new))
        self._queue.extend(new)

    def _advance(self, patience_s: float) -> None:
        """Give jobs to idle workers and take the verdicts that come within so many seconds."""
        try:
            for worker in [worker for worker in self._workers if worker.is_spent]:
                self._remove(worker)
            busy = sum(not worker.idle for worker in self._workers)
            for _ in range(len(self._workers), min(self.num_workers, busy + len(self._queue))):
                self._workers.append(self._worker())
            for worker in self._workers:
                if worker.idle and self._queue:
                    worker.give(self._next(worker))
            self._begun.update(self._collect(patience_s))
        except BaseException:
            # A verdict still on its way must never be read as that of a later job.
            self.close()
            raise

    def _collect(self, patience_s: float) -> Iterator[tuple[Job, Any]]:
        """Wait for the next verdicts or the next deadline; dead and late workers are removed."""
        waiting = [worker for worker in self._workers if not worker.idle]
        if not waiting:
            return
        next_deadline = min(worker.deadline for worker in waiting)
        patience_s = min(patience_s, max(0.0, next_deadline - time.monotonic()))
        ready_fds = wait([worker.verdict_fd for worker in waiting], patience_s)
        now = time.monotonic()
        for worker in waiting:
            if worker.verdict_fd in ready_fds:
                found, has_ended = worker.read()
                if has_ended:
                    self._remove(worker)
                yield from found
            elif now >= worker.deadline:
                self._remove(worker)
                if not worker.ready:
                    raise RuntimeError(f"a grading worker did not start in {WORKER_START_S} s")
                yield from worker.late()

    def _worker(self) -> _Worker:
        return _Worker(self.timeout_s, self.digits)

    def _next(self, worker: _Worker) -> Any:
        """What to give to an idle worker."""
        return self._queue.popleft()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()
