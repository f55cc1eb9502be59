"""Normalised answers taken apart: lists and brackets, intervals, words, quantities."""

from __future__ import annotations

import re
from fractions import Fraction

from intfast.grading import units
from intfast.grading.normal import normalise, number

TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end"}
_LIST = re.compile(r",|;|\\text\{,? ?(?:and|or)\}")
_AND = re.compile(r"\\text\{and\}")
_OR = re.compile(r"\\text\{or\}|\\cup")
RELATION = re.compile(r"=|<|>|\\le|\\ge|\\ne|\\in")
_INTRO = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my|our) )?(?:final |correct |exact |total )?"
    r"(?:answers?|results?|solutions?|values?|number|total|sum|product|area|probability)"
    r"(?: (?:is|are|equals?)(?: equal to)?:?|:|=)|it is|we get|answer"
    r"|(?:so|thus|hence|therefore),?$|there (?:is|are)(?: exactly)?(?: a total of)?"
    r"|a? ?total of|exactly|(?:the )?value of$",
    re.IGNORECASE,
)
_SYNONYMS = (
    {"no solution", "no solutions", "empty set", "the empty set", r"\varnothing"},
    {"all real numbers", "all reals", r"\mathbb{R}"},
    {"does not exist", "DNE"},
)
_PART = r"(\d[\d.,/ ]*)(\\text\{(?!and\})[^{}]*\}(?:\^\{?\d\}?)?)"
_COMPOUND = re.compile(rf"{_PART}(?:(?:\\text\{{and\}}|,)?{_PART})+")
_UNIT = re.compile(r"\\text\{|\\frac\{\\text|\\%")


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """(parts, separators) of a text, cut where no bracket is open."""
    parts, found, depth = [""], [], 0
    for token in TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth <= 0 and separator.fullmatch(token):
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts], found


def spelled(text: str) -> str:
    """A text without the marks of words."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    return " ".join(text.split()).rstrip(". ")


def same_words(gold: str, answer: str) -> bool:
    """Whether two texts are the same words; letter case tells symbols apart, and no words."""
    one, two = spelled(gold), spelled(answer)
    if one == two or any(one in same and two in same for same in _SYNONYMS):
        return True
    if one.casefold() != two.casefold() or not re.fullmatch(r"[A-Za-z][A-Za-z '-]+", one):
        return False
    is_text = r"\text" in gold + answer or any(word.title() in (one, two) for word in (one, two))
    return is_text and (len(one) > 2 or one.casefold() in ("no", "ok"))


def stripped(text: str) -> str:
    """A text without what introduces it ("the answer is")."""
    words = re.match(r"\\text\{([^{}]*)\}(.*)", text) or re.match(r"()([A-Z][a-z]+ .*)", text)
    inner = (words[1] or words[2]) if words else ""
    if found := _INTRO.match(inner):
        rest = inner[found.end() :].strip(" :=") + (words[2] if words[1] else "")
        return normalise(rest) if rest else text
    return text


def items(text: str) -> tuple[str, list[str]]:
    """(kind, parts): kind "(", "[", "{", "<" by the brackets, "," for a bare list, "" for one.

    "2 \\pm 1" is a bare list of two.
    """
    for kind, left, right in (
        ("(", "(", ")"),
        ("[", "[", "]"),
        ("{", r"\{", r"\}"),
        ("{", "{", "}"),
        ("<", r"\langle", r"\rangle"),
    ):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and _is_closed(inner):
            parts, _ = split(inner, _LIST)
            if kind == "(" and len(parts) == 1:
                return items(parts[0])
            return kind, [sign for part in parts for sign in _signs(part)] if kind == "{" else parts
    parts, _ = split(text, _LIST)
    parts = [part for part in parts if part] if len(parts) > 1 else parts
    if len(parts) == 1 or is_grouped(text):
        return (",", signs) if len(signs := _signs(text)) > 1 else ("", [text])
    return ",", [sign for part in parts for sign in _signs(part)]


def _is_closed(text: str) -> bool:
    """Whether no bracket of a text closes before it opens, or stays open."""
    depth = 0
    for token in TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _signs(text: str) -> list[str]:
    if r"\pm" not in text or r"\text" in text:
        return [text]
    plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
    return [plus.removeprefix("+"), text.replace(r"\pm", "-").replace(r"\mp", "+")]


Interval = tuple[str, str, str, str]


def intervals(text: str) -> tuple[str, list[Interval]] | None:
    """(variable or "", intervals) of a union, an inequality in one variable or a set of such."""
    if found := re.fullmatch(r"\\\{([a-z])(?:\\in ?\\mathbb\{R\})?[|:](.*)\\\}", text):
        inner = intervals(found[2])
        # The name of a bound variable says nothing.
        return ("", inner[1]) if inner and inner[0] in ("", found[1]) else None
    variable = ""
    if found := re.fullmatch(r"([a-z])\\in ?(.*)", text):
        variable, text = found[1], found[2]
    if text in (r"\mathbb{R}", r"\text{all real numbers}"):
        return variable, [("(", r"-\infty", r"\infty", ")")]
    if found := re.fullmatch(r"\\mathbb\{R\}\\(?:setminus|backslash) ?\\\{([^{},]+)\\\}", text):
        return variable, [("(", r"-\infty", found[1], ")"), ("(", found[1], r"\infty", ")")]
    parts, _ = split(text, _OR)
    if len(parts) > 1:
        inner = [intervals(part) for part in parts]
        names = {each[0] for each in inner if each} - {""}
        if None in inner or len(names) > 1:
            return None
        return "".join(names), [one for each in inner for one in each[1]]
    parts, _ = split(text, _AND)
    if len(parts) == 2 and all(each := [_inequality(part) for part in parts]):
        # Bounds from below and from above: one interval.
        (name, low), (other, high) = sorted(each, key=lambda one: one[1][0][1] == r"-\infty")
        is_bounded = low[0][2] == r"\infty" and high[0][1] == r"-\infty"
        if name != other or len(low) + len(high) > 2 or not is_bounded:
            return None
        return name, [(*low[0][:2], *high[0][2:])]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _is_closed(text[1:-1]):
        ends, _ = split(text[1:-1], re.compile("[,;]"))
        return (variable, [(text[0], *ends, text[-1])]) if len(ends) == 2 else None
    if text.startswith(r"\{") and len(one := items(text)[1]) == 1:
        return variable, [("[", one[0], one[0], "]")]
    return _inequality(text)


_VARIABLE = re.compile(r"(?:[a-z]|\\(?:alpha|beta|theta|phi|lambda|mu|omega))(?:\([a-z]\))?")


def _inequality(text: str) -> tuple[str, list[Interval]] | None:
    sides, signs = split(text, RELATION)
    flip = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
    is_turned = len(signs) == 1 and signs[0] in flip and re.fullmatch(r"\\?[a-z]+", sides[1])
    if is_turned and not _VARIABLE.fullmatch(sides[0]):
        sides, signs = sides[::-1], [flip[signs[0]]]
    if signs and set(signs) <= {">", r"\ge"} and len(sides) == 3:
        sides, signs = sides[::-1], [{">": "<"}.get(sign, r"\le") for sign in reversed(signs)]
    if len(sides) == 3 and set(signs) <= {"<", r"\le"} and _VARIABLE.fullmatch(sides[1]):
        left, right = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
        return sides[1], [(left, sides[0], sides[2], right)]
    if len(sides) != 2 or not _VARIABLE.fullmatch(sides[0]) or signs[0] in ("=", r"\in"):
        return None
    low, high, end = r"-\infty", r"\infty", sides[1]
    if re.search(rf"(?<![A-Za-z\\]){re.escape(sides[0])}(?![A-Za-z])", end):
        return None
    found = {
        "<": [("(", low, end, ")")],
        r"\le": [("(", low, end, "]")],
        ">": [("(", end, high, ")")],
        r"\ge": [("[", end, high, ")")],
        r"\ne": [("(", low, end, ")"), ("(", end, high, ")")],
    }
    return sides[0], found[signs[0]]


Quantity = tuple[str, units.Unit | None, bool]
PERCENT = units.Unit((("percent", 1),), Fraction(1, 100))


def quantity(text: str) -> Quantity | None:
    """(value, unit, whether several are added), or None where not all words are understood."""
    text = text.replace(" and}", r"}\text{and}")
    if _COMPOUND.fullmatch(text):
        found = re.findall(_PART, text)
        parts = [(number(value.strip(" ,")), units.parse(unit)) for value, unit in found]
        if None in [part for pair in parts for part in pair]:
            return None
        factors = [unit.factor for _, unit in parts]
        kinds = {(unit.powers, unit.pi) for _, unit in parts}
        if len(kinds) > 1 or factors != sorted(set(factors), reverse=True):
            return None
        total = sum(value * unit.factor for value, unit in parts)
        return fraction(total), parts[0][1]._replace(factor=Fraction(1)), True
    start = _UNIT.search(text)
    if start is None:
        return text, None, False
    value, rest = text[: start.start()].rstrip("~ "), text[start.start() :]
    if rest == r"\%":
        return value, PERCENT, False
    if not value or re.search(r"[=<>]|\d", re.sub(r"\^\{?-?\d\}?", "", rest)):
        # A percent sign inside an expression is the parser's.
        return None if r"\text" in text or not value else (text, None, False)
    unit = units.parse(rest, is_one=number(value) in (1, -1))
    return None if unit is None else (value, unit, False)


def fraction(value: Fraction) -> str:
    return rf"{'-' if value < 0 else ''}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def scaled(value: str, factor: Fraction, pi: int) -> str:
    exact = number(value)
    text = rf"{fraction(factor)}\cdot({value})" if exact is None else fraction(exact * factor)
    return text if not pi else rf"{text}\cdot\pi^{{{pi}}}"


def is_grouped(text: str) -> bool:
    """Whether the commas of a text group the digits of one number."""
    found = quantity(text)
    return found is not None and number(found[0]) is not None
