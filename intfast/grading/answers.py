"""Texts and answers: find the answer in a text, and compare answers where arithmetic suffices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from intfast.grading.compare import NeedsParser, arithmetic, verdict
from intfast.grading.normal import in_ascii, normalise
from intfast.grading.reasons import Reason

MATHEMATICS = ("boxed", "stated")
"""The modes whose answers are compared as mathematics; those of "tail:WORD" as text."""
MAX_CHARS = 300
"""Longest answer that is compared, in characters."""
MAX_BETWEEN = 40
"""Most characters between two boxes of one list."""


# A run of backslashes, then what it may escape. Possessive, so linear on hostile text. TeX also
# boxes what stands behind the command without braces: "\boxed 5".
_BRACE = re.compile(
    r"(?<!\\)(\\*+)((?:boxed|f(?:rame)?box)\s*+\{|[{}]|(?:boxed|fbox)(?![A-Za-z])\s*+(?P<bare>"
    r"[+-]?\d++(?:[.,/]\d++)*+%?|[A-Za-z](?!\w)|\\[dt]?frac(?:\{[^{}\\]{0,99}\}){2}|\\frac\d\d))"
)
# What stands between the boxes of one list: "\boxed{2}$ and $x = \boxed{3}".
_LISTED = re.compile(
    r"(?:\s|\$|[,;]|\\[,; ()]|\\q?quad)*+(?:\\text\{\s*(?:and|or)\s*\}|and|or)?+"
    r"(?:\s|\$|\\[,; ()]|\\q?quad)*+(?:[a-z](?:_\w)?\s*+=)?+[\s$]*+"
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
    r"|[?.\-\u2013\u2014_*\s]+|n\s*/\s*a|n\.\s?a\.?|tbd|to be (?:determined|shown|proved)"
    r"|todo|various|null|nan|nil|unknown|missing|omitted|untitled"
    r"|(?:not|no) (?:available|applicable|provided|given|answer|answers|solution provided)"
    r"|(?:the )?answers? (?:may |will |can )?var(?:y|ies)|q\.?\s?e\.?\s?d\.?"
    r"|(?:(?:please )?(?:see|refer to|as in|shown in|given in) )?(?:the |its |attached |formal )*"
    r"(?:proofs?|figures?|diagrams?|pictures?|images?|graphs?|explanations?|solutions?|text|above"
    r"|below|attachments?)(?: (?:above|below|required|needed|omitted|attached|\d+|by \w+))*"
    r"|(?:(?:as )?shown|proved|proven|derived|verified)(?: (?:above|below|in text|in the text))?"
    r"|(?:left )?(?:to the reader|as (?:an )?exercise)(?: (?:to|for) the reader)?",
)


def is_marker(gold: str) -> bool:
    """Whether a gold "answer" only marks that there is none: "proof", "see figure", "N/A"."""
    if len(gold) > MAX_CHARS:
        return False
    commands = r"\\(?:text\w*|mathrm|mathbf|emph|q?quad|boxed|(?:black|)square|Box)\b|\\[,;! ]"
    words = re.sub(commands + r"|[{}$()\[\]\"'`\u25a0\u220e]", " ", gold)
    words = " ".join(words.replace("NA", "n/a").casefold().split())
    return _MARKER.fullmatch(words.rstrip(".!: ") if len(words) > 1 else words) is not None


_ALLOWED = re.compile(r"[A-Za-z0-9\s+\-*/=<>^_{}()\[\]\\,.:;|!%&~'?$]*")

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
    if not _ALLOWED.fullmatch(in_ascii(text)) or "__" in text:
        return Reason.BAD_CHARACTERS
    return Reason.TOO_COMPLEX if is_explosive(text) else None


def compare_quickly(gold: str, answer: str, digits: int = 0) -> Reason | None:
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
    answer_text = normalise(answer)
    if gold_text == answer_text:
        return Reason.CORRECT
    if not answer_text or "$" in answer_text:
        # Several formulas in one answer would be read as whichever matches.
        return Reason.UNPARSEABLE
    with suppress(NeedsParser):
        return verdict(gold_text, answer_text, arithmetic(digits))
    return None
