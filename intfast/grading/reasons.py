"""Why an answer counts as it does.

What the model did not answer readably is wrong; what *we* could not decide is unscored, and an
unscored sample belongs in neither a reward nor a baseline.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    UNSCORED = "unscored"


class Reason(StrEnum):
    """Why an answer counts as it does."""

    CORRECT = "correct"  # equal to the gold answer
    WRONG = "wrong"  # a readable answer, not equal
    UNIT = "unit"  # another unit, angle, base or half of the day
    UNDEFINED = "undefined"  # a division by zero, infinity minus infinity, ...
    LEFTOVER = "leftover"  # something beside the value that is not understood
    NO_ANSWER = "no_answer"  # the text names no answer
    TRUNCATED = "truncated"  # no answer, and the text was cut at the token limit
    TOO_LONG = "too_long"  # more than MAX_CHARS characters
    BAD_CHARACTERS = "bad_characters"  # characters that no answer needs
    TOO_COMPLEX = "too_complex"  # a power tower or factorial that would not finish
    UNPARSEABLE = "unparseable"  # not mathematics that the parser knows
    # Unscored are these; the last six are of grading functions alone.
    TIMEOUT = "timeout"  # the comparison passed the deadline; its worker was killed
    CRASH = "crash"  # the worker died: memory, recursion, a fault of the parser
    GOLD_UNPARSEABLE = "gold_unparseable"  # the gold answer cannot be compared: drop the problem
    NO_REWARD = "no_reward"  # the function returned None
    RAISED = "raised"  # it raised an exception
    WRONG_TYPE = "wrong_type"  # it returned something else than a number, True, False or None
    NOT_FINITE = "not_finite"  # it returned NaN or an infinity
    OUT_OF_RANGE = "out_of_range"  # it returned a number outside grade.range
    FORBIDDEN = "forbidden"  # it forked, wrote a file, opened a socket or ran a text as a program

    @property
    def status(self) -> Status:
        if self in UNSCORED:
            return Status.UNSCORED
        return Status.CORRECT if self is Reason.CORRECT else Status.WRONG


_LISTED = tuple(Reason)
UNSCORED = frozenset(_LISTED[_LISTED.index(Reason.TIMEOUT) :])
READY = b"R"
"""What a worker says when it can compare."""
VERDICTS = {
    b"C": Reason.CORRECT,
    b"W": Reason.WRONG,
    b"N": Reason.UNIT,
    b"X": Reason.UNDEFINED,
    b"L": Reason.LEFTOVER,
    b"K": Reason.TOO_COMPLEX,
    b"U": Reason.UNPARSEABLE,
    b"G": Reason.GOLD_UNPARSEABLE,
}
"""What a worker says of an answer, and goes on."""
LAST_WORDS = {b"u": Reason.UNPARSEABLE, b"g": Reason.GOLD_UNPARSEABLE, b"": Reason.CRASH}
"""What it ends with: a text refused unread, or nothing."""
