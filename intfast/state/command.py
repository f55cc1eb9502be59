"""What every command of this package does around its work: stops, streams, errors, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from intfast import ranks
from intfast.safe_text import shown
from intfast.state import interrupt, oom


class Outcome:
    """How the work of a command ended."""

    code = 0
    """The exit code, as `python -m intfast.train --help` lists them."""


@contextmanager
def outcome(continues: str, goes_on: bool = False) -> Iterator[Outcome]:
    """Handle requests to stop while inside, and turn what is raised into a message and a code.

    continues  what to tell about going on, behind "stopped by SIGTERM; "
    goes_on    whether the work is worth it where nobody can read what it prints
    """
    ended = Outcome()

    def tell(error: OSError) -> None:
        said = f"stdout cannot be written ({error.strerror})"
        if goes_on:
            print(shown(f"WARNING: {said}; the work goes on without it"), file=sys.stderr)
        # A reader that has seen enough, as head has, is no failure.
        elif not isinstance(error, BrokenPipeError):
            print(shown(f"error: {said}"), file=sys.stderr)
            ended.code = ended.code or 1

    # Without stderr the exit code alone can speak.
    with _guarded("stderr", lambda error: None), _guarded("stdout", tell):
        try:
            with interrupt.handling(is_early=True), oom.explained("load"):
                yield ended
        except (ValueError, RuntimeError) as error:
            here = ranks.launched()
            if here.is_main or not isinstance(error, ranks.Refused):
                print(shown(f"{here.name}error: {error}"), file=sys.stderr)
            ended.code = 2 if isinstance(error, ValueError) else 1
        except interrupt.Stopped as stopped:
            if ranks.launched().is_main:
                print(shown(f"{stopped}; {continues}"), file=sys.stderr)
            ended.code = stopped.exit_code


def say(text: str, code: int = 0) -> int:
    """Print the help of a command, or on stderr why it ends with `code`; returns the exit code."""
    with outcome("") as ended:
        print(shown(text), file=sys.stderr if code else sys.stdout)
    return ended.code or code


class _Stream:
    """A standard stream; once a write fails, it is told, and all that follows goes nowhere."""

    def __init__(self, stream: TextIO, tell: Callable[[OSError], None]) -> None:
        self._stream, self._tell = stream, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # The descriptor, since Python still holds text that it writes when the process ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._tell(error)


@contextmanager
def _guarded(name: str, tell: Callable[[OSError], None]) -> Iterator[None]:
    kept = getattr(sys, name)
    # None where the shell closed it.
    stream = kept and _Stream(kept, tell)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        if stream:
            stream.flush()
        setattr(sys, name, kept)
