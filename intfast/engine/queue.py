"""Flows that share one call of the engine: what one asks next enters while others still run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from heapq import heappop, heappush
from typing import Any, NamedTuple, Protocol

from intfast.engine.protocol import CHUNK_SAMPLES, Completion, Request
from intfast.state import interrupt

MAX_UNREAD = 256
"""Draws that may wait for the grader before no new flow begins."""


class Pending(Protocol):
    """The requests of a draw, and what comes of them."""

    requests_P: list[Request]
    left: int
    """Samples that have not ended."""

    def end(self, p: int, g: int, completion: Completion) -> None:
        """Take a completion."""

    def is_done(self) -> bool:
        """Whether `result` would not wait, once all have ended."""

    def result(self) -> Any:
        """What the flow is sent."""


class _Asked(NamedTuple):
    number: int
    """Of the flow, as they began: a smaller one goes first."""
    flow: Generator
    pending: Pending


def step(flow: Generator, result: Any = None) -> list[Any]:
    """What a flow yields next; empty when it has ended."""
    try:
        return [flow.send(result)]
    except StopIteration:
        return []


def in_rounds(
    flows: Iterable[Generator | None], together: Callable[[list[Any]], list[Any]]
) -> None:
    """As `Queue`, for several ranks: all that is waited for is drawn before any flow goes on.

    together: results of draws, which say their `num_samples`; a round has about CHUNK_SAMPLES
    """
    flows, waiting = iter(flows), []
    while True:
        while sum(draw.num_samples for _, draw in waiting) < CHUNK_SAMPLES:
            if (flow := next(flows, None)) is None:
                break
            waiting += [(flow, draw) for draw in step(flow)]
        if not waiting:
            return
        interrupt.check(meets=True)
        found = zip(waiting, together([draw for _, draw in waiting]), strict=True)
        waiting = [(flow, draw) for (flow, _), result in found for draw in step(flow, result)]


class Queue:
    """Its `more` and `ended` are for Engine.generate; flows begin when older ones leave room."""

    def __init__(
        self, flows: Iterable[Generator | None], pending: Callable[[Any], Pending]
    ) -> None:
        """flows: None says that none can begin now, or ever; pending: of what a flow yields."""
        self._flows, self._pending = iter(flows), pending
        self._num_flows = self._num_requests = 0
        # A heap of draws for which the engine has not been asked.
        self._waiting: list[_Asked] = []
        # Request -> its draw, and its place there.
        self._running: dict[int, tuple[_Asked, int]] = {}
        # Draws whose samples have ended; the grader may still be at them.
        self._unread: list[_Asked] = []

    def more(self, room: float) -> list[Request]:
        """See protocol.More. A draw is never split."""
        requests: list[Request] = []
        while room > 0 and (asked := self._next()):
            for p, request in enumerate(asked.pending.requests_P):
                self._running[self._num_requests] = asked, p
                self._num_requests += 1
                requests.append(request)
            room -= asked.pending.left
        return requests

    def ended(self, request: int, sample: int, completion: Completion) -> None:
        """See protocol.OnFinished."""
        asked, p = self._running[request]
        asked.pending.end(p, sample, completion)
        if not asked.pending.left:
            first = request - p
            for place in range(first, first + len(asked.pending.requests_P)):
                del self._running[place]
            self._unread.append(asked)

    def finish(self) -> None:
        """After `generate`: every flow comes to its end.

        Raises RuntimeError where the engine left samples out.
        """
        self._unread += dict.fromkeys(asked for asked, _ in self._running.values())
        self._running.clear()
        if left := self.more(1):
            raise RuntimeError(f"the engine ended while {len(left)} requests waited for it")

    def _next(self) -> _Asked | None:
        """What the oldest flow that waits has asked for, or a new one."""
        while True:
            for asked in [asked for asked in self._unread if asked.pending.is_done()]:
                self._go_on(asked)
            if self._waiting:
                return heappop(self._waiting)
            if len(self._unread) < MAX_UNREAD and (flow := next(self._flows, None)) is not None:
                self._num_flows += 1
                self._ask(self._num_flows, flow, None)
            elif self._running or not self._unread:
                return None
            else:
                # The engine has nothing to do, so there is time to wait for the grader.
                self._go_on(self._unread[0])

    def _go_on(self, asked: _Asked) -> None:
        self._unread.remove(asked)
        self._ask(asked.number, asked.flow, asked.pending.result())

    def _ask(self, number: int, flow: Generator, result: Any) -> None:
        for wanted in step(flow, result):
            asked = _Asked(number, flow, self._pending(wanted))
            if asked.pending.left:
                heappush(self._waiting, asked)
            else:
                self._unread.append(asked)
