"""How much of an engine's rows are busy while a run collects: flows against barriers, replayed.

No model: a sample takes as many steps as it has tokens, drawn from a lognormal law by its seed, a
prompt takes none, and whether an answer is right is drawn too. The flows are those of the trainer
in shape (attempts, guided solutions, verifications, waves until the stop rule is met, by the
trainer's own queue and rule); with barriers the same draws are made stage by stage, in calls of
CHUNK_SAMPLES, as the trainer did before. Both draw the same samples.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any, NamedTuple

from intfast.config import InterveneConfig
from intfast.engine.generation import FREE_SHARE
from intfast.engine.protocol import CHUNK_SAMPLES, derive_seed
from intfast.engine.queue import Queue, step
from intfast.waves import Tried, next_wave

NAME = "occupancy"
ATTEMPTS, VERIFICATIONS = 4, 4
PASSES, RIGHT = 0.3, 0.1
"""Chance that a verification passes the gates, and the mean chance of an answer to be right."""


class Asked(NamedTuple):
    """Stands for a request."""

    seeds: Sequence[int]


class Wanted:
    """Stands for a draw; its result is the number of tokens of every sample."""

    def __init__(self, requests_P: list[Asked]) -> None:
        self.requests_P = requests_P
        self.left = self.total = sum(len(request.seeds) for request in requests_P)

    def end(self, p: int, g: int, completion: Any) -> None:
        """One sample less."""
        self.left -= 1

    def is_done(self) -> bool:
        """There is no grader to wait for."""
        return True

    def result(self) -> None:
        """Outcomes are functions of seeds."""


class Rows:
    """An engine of so many rows that only counts: `busy` has the ends of its samples."""

    def __init__(self, num_rows: int, length: Callable[[int], int], free_share: float) -> None:
        """free_share: rows are given to samples once so many of them are free."""
        self.num_rows, self.length, self.free_share = num_rows, length, free_share
        self.clock = 0
        self.spans: list[tuple[int, int]] = []

    def generate(self, requests: Sequence[Asked], ended: Callable, more: Callable) -> None:
        """As Engine.generate."""
        running: list[tuple[int, int, int]] = []
        waiting: deque[tuple[int, int, int]] = deque()
        num_requests = 0

        def take(new: Sequence[Asked]) -> None:
            nonlocal num_requests
            for p, request in enumerate(new, num_requests):
                waiting.extend((p, g, seed) for g, seed in enumerate(request.seeds))
            num_requests += len(new)

        take(requests)
        while True:
            free = self.num_rows - len(running)
            if not running or free >= max(1, self.free_share * self.num_rows):
                if (room := free - len(waiting)) > 0:
                    take(more(room))
                for p, g, seed in [waiting.popleft() for _ in range(min(free, len(waiting)))]:
                    end = self.clock + self.length(seed)
                    self.spans.append((self.clock, end))
                    heappush(running, (end, p, g))
            if not running:
                return
            self.clock, p, g = heappop(running)
            ended(p, g, None)

    def occupancy(self, begin: float, end: float) -> float:
        """Busy share of the rows between these shares of the whole time."""
        a, b = begin * self.clock, end * self.clock
        busy = sum(max(0.0, min(b, stop) - max(a, start)) for start, stop in self.spans)
        return busy / (self.num_rows * (b - a))


def lengths(median: float, sigma: float, cap: int) -> Callable[[int], int]:
    """Tokens of the sample with a seed: lognormal, cut at the cap."""

    def length(seed: int) -> int:
        drawn = random.Random(seed).lognormvariate(math.log(median), sigma)
        return max(1, min(cap, round(drawn)))

    return length


def problem(n: int, rule: InterveneConfig, seed: int) -> Generator[list[Asked], None, None]:
    """All draws of one problem; all its attempts are wrong, as of those that are selected."""

    def seeds(name: str, *numbers: int, count: int) -> list[int]:
        return [derive_seed(seed, name, n, *numbers, g) for g in range(count)]

    yield [Asked(seeds("attempts", count=ATTEMPTS))]
    yield [Asked(seeds("guided", a, count=1)) for a in range(ATTEMPTS)]
    verified = [seeds("verify", a, count=VERIFICATIONS) for a in range(ATTEMPTS)]
    yield [Asked(v) for v in verified]
    passed = [a for a, v in enumerate(verified) if any(_chance(s) < PASSES for s in v)]
    # Of hard problems most continuations fail, of some many succeed.
    rate_I = {a: RIGHT * 2 * _chance(derive_seed(seed, "rate", n, a)) for a in passed}
    names = {a: seeds("continue", a, count=rule.continuations) for a in passed}
    done: dict[int, dict[int, bool]] = {a: {} for a in passed}
    while any(waves := next_wave([Tried(str(n), done[a]) for a in passed], rule)):
        drawn = [(a, samples) for a, samples in zip(passed, waves, strict=True) if samples]
        yield [Asked([names[a][g] for g in samples]) for a, samples in drawn]
        for a, samples in drawn:
            done[a] |= {g: _chance(names[a][g] + 1) < rate_I[a] for g in samples}


def _chance(seed: int) -> float:
    return random.Random(seed ^ 0x5EED).random()


def flow(rows: Rows, flows: Iterator[Generator]) -> int:
    """As the trainer does: what a problem asks next enters while others run.

    Returns the most samples that a kill could cost: those of draws that had begun and not ended.
    """
    queue, most = Queue(flows, Wanted), 0

    def ended(p: int, g: int, completion: Any) -> None:
        nonlocal most
        begun = {asked.number: asked.pending.total for asked, _ in queue._running.values()}
        most = max(most, sum(begun.values()))
        queue.ended(p, g, completion)

    rows.generate([], ended, queue.more)
    queue.finish()
    return most


def barriers(rows: Rows, flows: Iterator[Generator]) -> int:
    """As it did: the first draws of all problems, then the second ones, in calls of a chunk.

    Returns the samples of the largest call.
    """
    waiting, most = [(f, wanted) for f in flows for wanted in step(f)], 0

    def call(chunk: list[Asked]) -> None:
        nonlocal most
        most = max(most, sum(len(request.seeds) for request in chunk))
        rows.generate(chunk, lambda *_: None, lambda room: [])

    while waiting:
        chunk: list[Asked] = []
        for _, requests in waiting:
            if sum(len(r.seeds) for r in [*chunk, *requests]) > CHUNK_SAMPLES:
                call(chunk)
                chunk = []
            chunk += requests
        call(chunk)
        waiting = [(f, wanted) for f, _ in waiting for wanted in step(f)]
    return most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--problems", type=int, default=334, help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 256], help="(%(default)s)")
    parser.add_argument("--median", type=float, default=7000, help="tokens (%(default)s)")
    parser.add_argument("--sigma", type=float, default=0.6, help="of the logarithm (%(default)s)")
    parser.add_argument("--cap", type=int, default=16_384, help="tokens (%(default)s)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row with a figure for each number of rows and each stop rule."""
    length = lengths(args.median, args.sigma, args.cap)
    figures: dict[str, Any] = {}
    for num_rows in args.rows:
        for rule in ("first_success", "never"):
            for share, when in ((0.0, "at once"), (FREE_SHARE, "by eighths")):
                name = f"{num_rows} rows given {when}, {rule}"
                figures[name] = compare(args, length, num_rows, rule, share)
                print(name, figures[name], flush=True)
    names = ("problems", "median", "sigma", "cap", "seed")
    return [{"setting": {k: getattr(args, k) for k in names}, "figures": figures}]


def compare(
    args: argparse.Namespace, length: Callable, num_rows: int, stop: str, free_share: float
) -> dict[str, float]:
    """Steps and busy shares of both ways; they must draw the same samples."""
    found: dict[str, Any] = {}
    spans = {}
    for way, drive in (("barriers", barriers), ("flow", flow)):
        rule = InterveneConfig(stop=stop)
        # Where nothing is decided between waves, flows draw them at once (intervene.missing).
        if way == "flow" and stop == "never":
            rule = InterveneConfig(stop=stop, wave=rule.continuations)
        rows = Rows(num_rows, length, free_share)
        at_stake = drive(
            rows, map(partial(problem, rule=rule, seed=args.seed), range(args.problems))
        )
        spans[way] = sorted(end - start for start, end in rows.spans)
        found |= {
            f"{way}_steps": rows.clock,
            f"{way}_samples_at_stake": at_stake,
            f"{way}_busy": round(rows.occupancy(0, 1), 3),
            f"{way}_busy_first_nine_tenths": round(rows.occupancy(0, 0.9), 3),
            f"{way}_busy_last_tenth": round(rows.occupancy(0.9, 1), 3),
        }
    if spans["barriers"] != spans["flow"]:
        raise RuntimeError("the two ways did not draw the same samples")
    return found | {"steps_ratio": round(found["flow_steps"] / found["barriers_steps"], 3)}
