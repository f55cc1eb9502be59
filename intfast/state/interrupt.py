"""Requests to stop, and signs of life: one flag that long work asks for, one clock that it feeds.

SIGTERM, SIGHUP and the first Ctrl-C only set the flag. `check()`, called between decode steps,
grading waits, chunks and training steps, raises `Stopped`; training stages save what they finished
as it passes. A second Ctrl-C has the system's default action: the process ends at once; so does any
of them before the first sign of life, when there is nothing to save.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from intfast import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised by `check` once a stop was requested; no handler of errors may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """What a shell reports for a process that this signal ended."""


class _State:
    requested: int | None = None
    is_early = False
    phase = "start"
    alive = started = time.monotonic()


def beat() -> None:
    """Progress was made: feeds the watchdog."""
    _State.alive = time.monotonic()
    _State.is_early = False


def check(meets: bool = False) -> None:
    """Progress was made, and nothing is half done: raises Stopped when a stop was requested.

    meets  every rank comes by here: several stop nowhere else, and all together
    """
    beat()
    number, several = _State.requested or 0, ranks.now()
    if several.world > 1:
        if os.getppid() != several.parent:  # nobody is left to end the others where one ends
            number = number or signal.SIGTERM
        number = several.agree(number) if meets else 0
    if number:
        raise Stopped(number)


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
    if ranks.now().waiting:
        # Who is stuck has a watchdog of its own.
        _State.alive = time.monotonic()
        return f"{_State.phase}, waiting for other ranks", 0.0
    return _State.phase, time.monotonic() - _State.alive


def seconds_up() -> float:
    """Seconds since this process took over its signals, or imported this module."""
    return time.monotonic() - _State.started


@contextmanager
def handling(is_early: bool = False) -> Iterator[None]:
    """Turn the signals into requests while inside; for the command line, from its main thread.

    A signal that the parent process told us to ignore (nohup) stays ignored.
    is_early  end the process at once until the first sign of life
    """
    before = {n: signal.getsignal(n) for n in SIGNALS}
    take_over(is_early)
    try:
        yield
    finally:
        _State.is_early = False
        for number, handler in before.items():
            signal.signal(number, handler)


def take_over(is_early: bool) -> None:
    """As `handling`, without an end."""
    _State.requested, _State.is_early = None, is_early
    _State.started = time.monotonic()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _request)


def _request(number: int, _frame: object) -> None:
    name = signal.Signals(number).name
    if _State.is_early:
        # Modules are being imported: an exception would be taken for their failure.
        with suppress(OSError):
            os.write(2, f"stopped by {name}; repeat the command\n".encode())
        os._exit(128 + number)
    # Repeated SIGTERMs come from schedulers and must not cut the saving short.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _State.requested is None:
        _State.requested = number
        # Not through the console: this may interrupt its own printing.
        with suppress(OSError):
            said = ranks.now().name + name
            os.write(2, f"\n{said}: stopping after this step; Ctrl-C leaves at once\n".encode())
