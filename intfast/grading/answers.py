"""Texts and answers: find the answer in a text, and compare answers where arithmetic suffices.

What the model did not answer readably is wrong; what *we* could not decide is unscored, and an
unscored sample belongs in neither a reward nor a baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

MATHEMATICS = ("boxed", "stated")
"""The modes whose answers are compared as mathematics; those of "tail:WORD" as text."""
MAX_CHARS = 300
"""Longest answer that is compared, in characters."""
MAX_BETWEEN = 40
"""Most characters between two boxes of one list."""


class Status(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    UNSCORED = "unscored"


class Reason(StrEnum):
    """Why an answer counts as it does."""

    CORRECT = "correct"  # equal to the gold answer
    WRONG = "wrong"  # a readable answer, not equal
    NO_ANSWER = "no_answer"  # the text names no answer
    TRUNCATED = "truncated"  # no answer, and the text was cut at the token limit
    TOO_LONG = "too_long"  # more than MAX_CHARS characters
    BAD_CHARACTERS = "bad_characters"  # characters that no answer needs
    TOO_COMPLEX = "too_complex"  # a power tower or factorial that would not finish
    UNPARSEABLE = "unparseable"  # not mathematics that the parser knows
    # Unscored are the last three.
    TIMEOUT = "timeout"  # the comparison passed the deadline; its worker was killed
    CRASH = "crash"  # the worker died: memory, recursion, a fault of the parser
    GOLD_UNPARSEABLE = "gold_unparseable"  # the gold answer cannot be compared: drop the problem

    @property
    def status(self) -> Status:
        if self in (Reason.TIMEOUT, Reason.CRASH, Reason.GOLD_UNPARSEABLE):
            return Status.UNSCORED
        return Status.CORRECT if self is Reason.CORRECT else Status.WRONG


# A run of backslashes, then what it may escape. Possessive, so linear on hostile text. TeX also
# boxes what stands behind the command without braces: "\boxed 5".
_BRACE = re.compile(
    r"(?<!\\)(\\*+)((?:boxed|f(?:rame)?box)\s*+\{|[{}]|(?:boxed|fbox)(?![A-Za-z])\s*+(?P<bare>"
    r"[+-]?\d++(?:[.,/]\d++)*+%?|[A-Za-z](?!\w)|\\[dt]?frac(?:\{[^{}\\]{0,99}\}){2}|\\frac\d\d))"
)
# What stands between the boxes of one list: "\boxed{2}$ and $x = \boxed{3}".
_LISTED = re.compile(
    r"(?:\s|\$|[,;]|\\[,; ]|\\q?quad)*+(?:\\text\{\s*(?:and|or)\s*\}|and|or)?+"
    r"(?:\s|\$|\\[,; ]|\\q?quad)*+(?:[a-z](?:_\w)?\s*+=)?+[\s$]*+"
)
_COMMANDS = ("\\boxed", "\\fbox", "\\framebox")
_BLANK = re.compile(r"\s*+")
_ANSWER_LINE = re.compile(r"answer[\s*]{0,5}:([^\n]*)", re.IGNORECASE)

_ANSWER_SENTENCE = re.compile(r"\banswer\s{1,3}is\b[\s*:]{0,5}([^\n]*)", re.IGNORECASE)
# Emphasis, quotes and full stops behind an answer; "\\right." is mathematics.
_END_OF_SENTENCE = re.compile(r"(?<!\\right)(?<![\s*.\"])[\s*.\"]+$")


class _Box(NamedTuple):
    """Places in a text: of the command, and of its content."""

    command: int
    start: int
    stop: int


def last_boxed(text: str) -> str | None:
    """The content of the last balanced, non-empty box (\\boxed or \\fbox), or None.

    Boxes that the text lists ("\\boxed{2} and \\boxed{3}") are one answer, "2, 3": the last of
    several rival guesses is no answer to a question that has one. Linear in the text.
    """
    outer: list[_Box] = []
    for box in _boxes(text):
        # They come as they close, so one around another behind it: the inner one is the answer.
        if not outer or outer[-1].command < box.command:
            outer.append(box)
    if not outer:
        return None
    found = [outer.pop()]
    while outer and found[-1].command - outer[-1].stop <= MAX_BETWEEN:
        between = text[outer[-1].stop : found[-1].command].removeprefix("}")
        if not _LISTED.fullmatch(between) or not re.search(r"(?<!\\)[,;]|and|or", between):
            break
        found.append(outer.pop())
    contents = dict.fromkeys(text[box.start : box.stop].strip() for box in reversed(found))
    return ", ".join(contents)


def all_boxed(text: str) -> list[str]:
    """The contents of all balanced, non-empty boxes."""
    return [text[box.start : box.stop].strip() for box in _boxes(text)]


def _boxes(text: str) -> Iterator[_Box]:
    """The balanced boxes with content, in the order in which they close."""
    first = min((at for at in map(text.find, _COMMANDS) if at >= 0), default=-1)
    if first < 0:
        return
    while first and text[first - 1] == "\\":
        first -= 1
    open_at: list[tuple[int, int] | None] = []
    for match in _BRACE.finditer(text, first):
        slashes, token = match.group(1, 2)
        if match["bare"]:
            if slashes:
                yield _Box(match.start(), match.start("bare"), match.end())
        elif token[0] in "bf":
            open_at.append((match.start(), match.end()) if slashes else None)
        elif len(slashes) % 2:
            continue
        elif token == "{":
            open_at.append(None)
        elif open_at:
            opened, stop = open_at.pop(), match.start(2)
            # Any blank content is short or one run of spaces; nested boxes are not copied here.
            if opened is not None and not _BLANK.fullmatch(text, opened[1], stop):
                yield _Box(opened[0], opened[1], stop)


def extract(text: str, mode: str) -> str | None:
    """The answer that a text names, or None.

    mode "boxed": the last box (`last_boxed`), else the rest of the line after the last
    "Answer:". mode "stated": the same, else the rest of the sentence after the last "answer is".
    mode "tail:WORD": the words after the last occurrence of WORD, single-spaced.
    Raises ValueError for another mode.
    """
    if mode in MATHEMATICS:
        return last_boxed(text) or _said(text, mode == "stated") or None
    kind, _, marker = mode.partition(":")
    if kind != "tail" or not marker or marker.split() != [marker]:
        raise ValueError(f'grading mode must be "boxed", "stated" or "tail:WORD", got {mode!r}')
    words = text.split()
    if marker not in words:
        return None
    start = len(words) - words[::-1].index(marker)
    return " ".join(words[start:]) or None


def _said(text: str, in_prose: bool) -> str | None:
    """The answer that a text without a box states."""
    said = _ANSWER_LINE.findall(text)
    if not said and in_prose:
        said = [rest.partition(". ")[0] for rest in _ANSWER_SENTENCE.findall(text)]
    return _END_OF_SENTENCE.sub("", said[-1]).lstrip('* \t"') if said else None


# What data sets write where there is no answer to compare with.
_MARKER = re.compile(
    r"|[?.\-\u2013\u2014_*\s]+|n\s*/\s*a|n\.\s?a\.?|tbd|todo|null|nan|nil|unknown|missing|omitted|untitled"
    r"|(?:not|no) (?:available|applicable|provided|given|answer|answers|solution provided)"
    r"|(?:the )?answers? (?:may |will |can )?var(?:y|ies)|q\.?\s?e\.?\s?d\.?"
    r"|(?:(?:please )?(?:see|refer to|as in|shown in|given in) )?(?:the |its |attached |formal )*"
    r"(?:proofs?|figures?|diagrams?|pictures?|images?|graphs?|explanations?|solutions?|text|above"
    r"|below|attachments?)(?: (?:above|below|required|needed|omitted|attached|\d+|by \w+))*"
    r"|(?:(?:as )?shown|proved|proven|derived|verified)(?: (?:above|below|in text|in the text))?"
    r"|(?:left )?(?:to the reader|as an exercise)(?: (?:to|for) the reader)?",
)


def is_marker(gold: str) -> bool:
    """Whether a gold "answer" only marks that there is none: "proof", "see figure", "N/A"."""
    if len(gold) > MAX_CHARS:
        return False
    words = re.sub(
        r"\\(?:text\w*|mathrm|mathbf|emph|q?quad)\b|\\[,;! ]|[{}$()\[\]\"'`\u25a0\u220e]", " ", gold
    )
    words = " ".join(words.replace("NA", "n/a").casefold().split())
    return _MARKER.fullmatch(words.rstrip(".!: ") if len(words) > 1 else words) is not None


_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u00b0": r"^\circ",
        "\u222a": r"\cup ",
        "\u00b1": r"\pm ",
    }
)
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:left|right)(?![a-z])|~")
_SPACES = re.compile(r"(?<=\W)\s+|\s+(?=\W)")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|boldsymbol)\{([^{}\\$]*)\}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_ALLOWED = re.compile(r"[A-Za-z0-9\s+\-*/=<>^_{}()\[\]\\,.:;|!%&~'?$]*")


def normalise(text: str) -> str:
    """One spelling for what LaTeX writes in many; equal results mean equal answers."""
    text = text.strip().translate(_SYMBOLS)
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right):
            text = text[len(left) : -len(right)].strip()
    # A currency: one dollar sign delimits nothing.
    if text.count("$") == 1:
        text = text.removeprefix("$")
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "").rstrip(".")
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text)
    text = _SPACES.sub("", _SPACING.sub(" ", text).strip())
    text = re.sub(r"(?<=\d) (?=[A-Za-z]\b)", "", text)
    text = re.sub(r"\^(\\circ|\{\\circ\})$", "", text)
    wrapped = _WRAPPED.fullmatch(text)
    return wrapped[1].strip() if wrapped else text


_DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{(\d+)\}|\\frac(\d)(\d)|(\d+)/(\d+))")


def number(normalised: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction of integers, else None."""
    if _THOUSANDS.fullmatch(normalised):
        normalised = normalised.replace(",", "")
    if _DECIMAL.fullmatch(normalised):
        return Fraction(normalised.rstrip("."))
    match = _FRACTION.fullmatch(normalised)
    if not match:
        return None
    top, bottom = (int(group) for group in match.groups()[1:] if group is not None)
    if bottom == 0:
        return None
    return Fraction(-top if match[1] == "-" else top, bottom)


# A number in front of what it counts: the parser knows some nouns ("apples") and not others.
_COUNTED = re.compile(r"(.*\d) ([a-z]{3,}(?: [a-z]{2,}){0,2})[.\s]*", re.IGNORECASE)
_NO_NOUN = re.compile(
    r"\b(?:and|but|by|choose|divided|from|if|in|is|not|nor|of|or|over|per|percent|than|times|to|vs"
    r"|versus|minus|plus|mod|modulo|hundreds?|thousands?|[mbtr]+illions?|dozens?|score|half|halves"
    r"|quarters?|thirds?|(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|factorial"
    r"|sqrt|sin|cos|tan|log|exp|pi)\b",
    re.IGNORECASE,
)


def bare(gold: str, answer: str) -> str:
    """The answer without the noun behind it, where the gold answer is a number.

    Example: bare("12", "5 + 7 = 12 books.") == "5 + 7 = 12".
    """
    if len(answer) > MAX_CHARS or number(normalise(gold)) is None:
        return answer
    found = _COUNTED.fullmatch(answer)
    return answer if found is None or _NO_NOUN.search(found[2]) else found[1]


# Factorials of large integers, powers or factorials; stacked superscripts; giant exponents.
_EXPLOSIVE = re.compile(
    r"\d{5,}[\s})]*!|!\s*[})][\s})]*!|\^[\s{(]*\d+[\s})]*[})]\s*!|\^\s*\d+\s*\^|\^[\s{(]*-?\d{6,}"
    r"|\\[dt]?binom[\s{(]*\d{5,}|\\Gamma[\s({]*\d{5,}|(?:\\int.*){4}"
)
_NUMBER_TOWER = re.compile(r"\^[\s{(]*(\d+)\s*\^[\s{(]*(\d+)")
MAX_EXPONENT_DIGITS = 5
MAX_TOWER = 2
MAX_NESTING = 6
"""The parser's time grows exponentially with the depth of brackets of one kind."""
MAX_BARS = 8


def is_explosive(text: str) -> bool:
    """Whether parsing or evaluating the expression could not be expected to finish."""
    if _EXPLOSIVE.search(text) or text.count("|") > MAX_BARS:
        return True
    for base, exponent in _NUMBER_TOWER.findall(text):
        if len(exponent) > 3 or int(exponent) * len(base) > MAX_EXPONENT_DIGITS:
            return True
    height, open_groups = 0, []
    for match in re.finditer(r"\^\s*[{(]?|[{(\[]|[)}\]]", text):
        token = match[0]
        if token[0] in ")}]":
            height -= open_groups.pop() if open_groups else 0
            continue
        is_power = token[0] == "^"
        if (is_power and height >= MAX_TOWER) or len(open_groups) >= MAX_NESTING:
            return True
        if token[-1] in "{([":
            open_groups.append(int(is_power))
            height += int(is_power)
    return False


def _inadmissible(text: str) -> Reason | None:
    """Why a text must not reach the parser, or None."""
    if len(text) > MAX_CHARS:
        return Reason.TOO_LONG
    if not _ALLOWED.fullmatch(text.translate(_SYMBOLS)) or "__" in text:
        return Reason.BAD_CHARACTERS
    return Reason.TOO_COMPLEX if is_explosive(text) else None


def compare_numbers(gold: str, answer: str) -> Reason | None:
    """The verdict on two normalised texts when arithmetic on plain numbers settles it."""
    chain = {value for part in answer.split("=") if (value := number(part)) is not None}
    if len(chain) > 1 and "=" not in gold:
        # "6=5": math-verify would read the last side only.
        return Reason.WRONG
    gold_value = number(gold)
    answer_value = number(re.sub(r"^[A-Za-z]=", "", answer))
    if gold_value is None or answer_value is None:
        return None
    if gold_value == answer_value:
        return Reason.CORRECT
    # A decimal may be a rounding of the gold value; how close is close enough is math-verify's.
    is_decimal = "." in gold or "." in answer
    if is_decimal and abs(gold_value - answer_value) <= abs(gold_value) / 100:
        return None
    return Reason.WRONG


def compare_quickly(gold: str, answer: str) -> Reason | None:
    """The verdict when it needs no mathematics parser, else None."""
    if is_marker(gold):
        return Reason.GOLD_UNPARSEABLE
    if gold.strip() == answer.strip():
        return Reason.CORRECT
    if _inadmissible(gold):
        # Spelling variants of an ungradable gold are still equal to it.
        same = len(gold) <= MAX_CHARS >= len(answer) and normalise(gold) == normalise(answer)
        return Reason.CORRECT if same else Reason.GOLD_UNPARSEABLE
    gold_text = normalise(gold)
    if not gold_text:
        return Reason.GOLD_UNPARSEABLE
    if refusal := _inadmissible(answer):
        return refusal
    answer_text = normalise(bare(gold, answer))
    if "$" in answer_text:
        # Several formulas in one answer would be read as whichever matches.
        return Reason.UNPARSEABLE
    if gold_text == answer_text:
        return Reason.CORRECT
    return compare_numbers(gold_text, answer_text)
