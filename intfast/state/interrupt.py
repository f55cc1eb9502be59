"""Requests to stop, and signs of life: one flag that long work asks for, one clock that it feeds.

SIGTERM, SIGHUP and the first Ctrl-C only set the flag. `check()`, called between decode steps,
grading waits, chunks and training steps, raises `Stopped`; training stages save what they finished
as it passes. A second Ctrl-C has the system's default action: the process ends at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised by `check` once a stop was requested; no handler of errors may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """What a shell reports for a process that this signal ended."""


class _State:
    requested: int | None = None
    phase = "start"
    alive = started = time.monotonic()


def beat() -> None:
    """Progress was made: feeds the watchdog."""
    _State.alive = time.monotonic()


def check() -> None:
    """Progress was made, and nothing is half done: raises Stopped when a stop was requested."""
    beat()
    if _State.requested is not None:
        raise Stopped(_State.requested)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what is being done, for whoever finds it stuck; both ends are signs of life."""
    outer, _State.phase = _State.phase, name
    beat()
    try:
        yield
    finally:
        _State.phase = outer
        beat()


def last_sign() -> tuple[str, float]:
    """(phase, seconds since the last progress)."""
    return _State.phase, time.monotonic() - _State.alive


def seconds_up() -> float:
    """Seconds since this process took over its signals, or imported this module."""
    return time.monotonic() - _State.started


@contextmanager
def handling() -> Iterator[None]:
    """Turn the signals into requests while inside; for the command line, from its main thread.

    A signal that the parent process told us to ignore (nohup) stays ignored.
    """
    _State.requested = None
    _State.started = time.monotonic()
    before = {n: signal.getsignal(n) for n in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _request(number: int, _frame: object) -> None:
    # Repeated SIGTERMs come from schedulers and must not cut the saving short.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _State.requested is None:
        _State.requested = number
        name = signal.Signals(number).name
        # Not through the console: this may interrupt its own printing.
        os.write(2, f"\n{name}: stopping after this step; Ctrl-C leaves at once\n".encode())
