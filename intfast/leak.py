"""Whether a replacement step gives the final answer away."""

from __future__ import annotations

import re
import unicodedata

from intfast.grading.answers import all_boxed, compare_quickly
from intfast.grading.normal import normalise, number, unspaced

MIN_TELLING = 3
"""An answer of fewer characters (or a number of fewer digits) occurs in most steps by chance."""

_NUMBER = re.compile(
    r"(?<!\d)[+-]?(?:\\frac\{\d++\}\{\d++\}|\d{1,3}(?:,\d{3})++(?:\.\d++)?+|\d++(?:\.\d++|/\d++)?+)"
    r"(?![\w{])"
)
MAX_BOXES = 16
MAX_BEFORE = 120
"""Characters in front of a number that may say that it is the answer."""
_SAID = (
    r"answer\b[^.\n]{0,40}?(?:\bis\b|\bare\b|\bbe\b|\bequals?\b|:|=)"
    r"(?:\s+[a-z]+){0,2}?[\s$*(\[{\\]*"
)


def leaks(content: str, answer: str) -> bool:
    """Whether a replacement step states the final answer.

    In a \\boxed{}, or after "answer is" or "answer:", any answer counts, in any spelling that
    arithmetic knows. Elsewhere an answer of MIN_TELLING or more characters counts as a whole word,
    and a number of as many digits in any spelling; a shorter one ("2") does not.
    """
    # A box is a final answer wherever it stands, however short it is; no step needs many.
    boxes = all_boxed(content)
    if len(boxes) > MAX_BOXES or any(compare_quickly(answer, box) == "correct" for box in boxes):
        return True
    text, wanted = _plain(content), _plain(answer)
    # As it is written, and as mathematics would write it.
    spellings = {(text, wanted), (unspaced(text), unspaced(wanted))}
    value = number(normalise(wanted))
    is_telling = value is not None and sum(map(str.isdigit, wanted)) >= MIN_TELLING
    for found in _NUMBER.finditer(plain := unspaced(text)) if value is not None else ():
        if number(found[0]) != value:
            continue
        # "The answer is 7" tells with one digit; a bare 7 in the middle of a sum tells nothing.
        before = plain[max(0, found.start() - MAX_BEFORE) : found.start()]
        if re.search(_SAID + r"$", before) or (is_telling and not re.search(r"[\w.]$", before)):
            return True
    # What is no number can still stand there word for word.
    return any(_states(*pair) for pair in spellings if pair[1])


def _states(text: str, wanted: str) -> bool:
    if wanted not in text:
        return False
    exact = re.escape(wanted) + r"(?!\w|\.\d)"
    if re.search(_SAID + exact, text):
        return True
    return len(wanted) >= MIN_TELLING and re.search(rf"(?<![\w.]){exact}", text) is not None


def _plain(text: str) -> str:
    """One spelling of case, spacing and compatibility characters."""
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").casefold()
    return " ".join(text.split())
