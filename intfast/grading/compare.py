"""Gold and answer compared part by part: everything of the answer must be understood and agree.

Both come normalised. Lists, tuples, sets, intervals, relations, matrices, times, choices and
quantities are taken apart here; two expressions that arithmetic cannot tell apart go to `leaf`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from intfast.grading import units
from intfast.grading.normal import normalise, number
from intfast.grading.reasons import Reason

Leaf = Callable[[str, str, str], Reason]
"""(gold, answer, "" | "proportional" | "positive multiple") -> the verdict on two expressions."""

_TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end"}
_LIST = re.compile(r",|;|\\text\{,? ?(?:and|or)\}")
_OR = re.compile(r"\\text\{or\}|\\cup")
_RELATION = re.compile(r"=|<|>|\\le|\\ge|\\ne|\\in")
_NAME = re.compile(r"[A-Za-z]|\\[a-z]+(?:\{[A-Za-z]+\})?|\\text\{(?!not)[A-Za-z ]+\}")
# What may stand left of the last sign of equality: names, sums of names, f(3), |AB|, P(A).
_LEFT = re.compile(
    r"(?:\\text\{(?![^{}]*\bnot\b)[A-Za-z ]+\}|(?!\\pi|\\infty)\\[A-Za-z]+|[A-Za-z]'*|_\{?\w{1,3}\}?"
    r"|\([^()=]{1,20}\)|\|[A-Za-z]{1,3}\||\^\{-1\}|[-+{}^* ])+"
)
_INTRO = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my|our) )?(?:final |correct |exact |total )?"
    r"(?:answers?|results?|solutions?|values?|number|total|sum|product|area|probability)"
    r"(?: (?:is|are|equals?)(?: equal to)?:?|:|=)|it is|we get|answer",
    re.IGNORECASE,
)
# In an expression none of these has a meaning that the parser keeps.
_UNCLEAR = re.compile(
    r"\\text|\\ldots|\\p?mod(?![a-z])|(?:^|[-+*=(])\{[^{}]*\} ?\{|\\approx|\\sim|\\equiv|(?<!\{[a-z])\\to(?![a-z])|[?:;$&\"]|\d [\d(]|\d_|\)_|\^\{?[T*]|(?<![A-Za-z)])'"
    r"|\\(?:boxed|fbox|begin|end|lnot|neg|mp)(?![a-z])|\\[A-Za-z]*(?:infty)\s*[\w\\(]|^[*/^_.,)]|[-+*/^_(,]$"
)  # fmt: skip
_SYNONYMS = (
    {"no solution", "no solutions", "empty set", "the empty set", r"\varnothing"},
    {"all real numbers", "all reals", r"\mathbb{R}"},
    {"does not exist", "DNE"},
)
_TIME = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))? ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer) )?(?:\(([A-J])\)|([A-J])(?![A-Za-z_^'(]))[).:]?(.*)",
    re.IGNORECASE,
)
_FAMILY = re.compile(
    r"(.*?)[, ]*(?:\\text\{(?:for|where|with|for (?:all|any|some|every))?\s?(?:integers?)?\})?"
    r"([a-z])\\in ?\\mathbb\{Z\}"
)
_MATRIX = re.compile(
    r"\\begin\{([pb]?matrix|array)\}(?:\{[^{}]*\})?(.*?)(?:\\\\)?\\end\{\1\}", re.DOTALL
)
_BASED = re.compile(r"(-?\d[\dA-F]*)_\{?(\d{1,2})\}?")
_PART = r"(\d[\d.,/ ]*)(\\text\{(?!and\})[^{}]*\}(?:\^\{?\d\}?)?)"
_COMPOUND = re.compile(rf"{_PART}(?:(?:\\text\{{and\}}|,)?{_PART})+")
_UNIT = re.compile(r"\\text\{|\\frac\{\\text|\\%")


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """(parts, separators) of a text, cut where no bracket is open."""
    parts, found, depth = [""], [], 0
    for token in _TOKEN.findall(text):
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
    """(kind, parts): kind "(", "[", "{", "<" by the brackets around, "," for a bare list, "" for one.

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
    if len(parts) == 1 or _is_grouped(text):
        return (",", signs) if len(signs := _signs(text)) > 1 else ("", [text])
    return ",", [sign for part in parts for sign in _signs(part)]


def _is_closed(text: str) -> bool:
    """Whether no bracket of a text closes before it opens, or stays open."""
    depth = 0
    for token in _TOKEN.findall(text):
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
        return inner if inner and inner[0] in ("", found[1]) else None
    variable = ""
    if found := re.fullmatch(r"([a-z])\\in ?(.*)", text):
        variable, text = found[1], found[2]
    if text in (r"\mathbb{R}", r"\text{all real numbers}"):
        return variable, [("(", r"-\infty", r"\infty", ")")]
    parts, _ = split(text, _OR)
    if len(parts) > 1:
        inner = [intervals(part) for part in parts]
        names = {each[0] for each in inner if each} - {""}
        if None in inner or len(names) > 1:
            return None
        return "".join(names), [one for each in inner for one in each[1]]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _is_closed(text[1:-1]):
        ends, _ = split(text[1:-1], re.compile("[,;]"))
        return (variable, [(text[0], *ends, text[-1])]) if len(ends) == 2 else None
    if text.startswith(r"\{") and len(one := items(text)[1]) == 1:
        return variable, [("[", one[0], one[0], "]")]
    return _inequality(text)


def _inequality(text: str) -> tuple[str, list[Interval]] | None:
    sides, signs = split(text, _RELATION)
    if signs in (["<"], [">"], [r"\le"], [r"\ge"], [r"\ne"]) and re.fullmatch(
        r"\\?[a-z]+", sides[1]
    ):
        flip = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
        if not re.fullmatch("[a-z]", sides[0]):
            sides, signs = sides[::-1], [flip.get(signs[0], signs[0])]
    if signs and set(signs) <= {">", r"\ge"} and len(sides) == 3:
        sides, signs = sides[::-1], [{">": "<"}.get(sign, r"\le") for sign in reversed(signs)]
    if len(sides) == 3 and set(signs) <= {"<", r"\le"} and re.fullmatch("[a-z]", sides[1]):
        ends = (
            ("(" if signs[0] == "<" else "["),
            sides[0],
            sides[2],
            (")" if signs[1] == "<" else "]"),
        )
        return sides[1], [ends]
    if len(sides) != 2 or not re.fullmatch("[a-z]", sides[0]) or signs[0] in ("=", r"\in"):
        return None
    low, high, end = r"-\infty", r"\infty", sides[1]
    if re.search(rf"(?<![A-Za-z\\]){sides[0]}(?![A-Za-z])", end):
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
_PERCENT = units.Unit((("percent", 1),), Fraction(1, 100))


def quantity(text: str) -> Quantity | None:
    """(value, unit, whether several quantities are added), or None where words are not understood."""
    text = text.replace(" and}", r"}\text{and}")
    if _COMPOUND.fullmatch(text):
        found = re.findall(_PART, text)
        parts = [(number(value.strip(" ,")), units.parse(unit)) for value, unit in found]
        if None in [part for pair in parts for part in pair]:
            return None
        factors = [unit.factor for _, unit in parts]
        if len({(unit.powers, unit.pi) for _, unit in parts}) > 1 or factors != sorted(set(factors))[::-1]:
            return None
        total = sum(value * unit.factor for value, unit in parts)
        return _text(total), parts[0][1]._replace(factor=Fraction(1)), True
    start = _UNIT.search(text)
    if start is None:
        return text, None, False
    value, rest = text[: start.start()].rstrip("~ "), text[start.start() :]
    if rest == r"\%":
        return value, _PERCENT, False
    if not value or re.search(r"[=<>]|\d", re.sub(r"\^\{?-?\d\}?", "", rest)):
        # A percent sign inside an expression is the parser's.
        return None if r"\text" in text or not value else (text, None, False)
    unit = units.parse(rest, is_one=number(value) in (1, -1))
    return None if unit is None else (value, unit, False)


def _text(value: Fraction) -> str:
    return rf"{'-' if value < 0 else ''}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _scaled(value: str, factor: Fraction, pi: int) -> str:
    exact = number(value)
    text = (
        _text(exact * factor)
        if exact is not None
        else rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}\cdot({value})"
    )
    return text if not pi else rf"{text}\cdot\pi^{{{pi}}}"


class Comparison:
    """Compares normalised texts; `leaf` decides on two expressions."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf

    def same(self, gold: str, answer: str) -> Reason:
        """The verdict on two normalised texts."""
        if same_words(gold, answer) and gold != answer:
            return Reason.CORRECT
        gold, answer = stripped(gold), stripped(answer).lstrip("=")
        if r"\approx" in gold:
            gold, answer = (
                re.sub(r"^=", "", text.replace(r"\approx", "=")) for text in (gold, answer)
            )
        for attempt in (self._choice, self._time, self._family, self._matrix, self._sets):
            if (reason := attempt(gold, answer)) is not None:
                return reason
        compound = quantity(gold), quantity(answer)
        if not any(found and found[2] for found in compound):
            kinds = items(gold), items(answer)
            related = [not kind and split(parts[0], _RELATION)[1] for kind, parts in kinds]
            if (kinds[0][0] or kinds[1][0]) and not any(related):
                return self._lists(gold, answer, *kinds)
            gold, answer = (
                text if kind else parts[0]
                for text, (kind, parts) in zip((gold, answer), kinds, strict=True)
            )
        sides = split(gold, _RELATION), split(answer, _RELATION)
        if sides[0][1] or sides[1][1]:
            return self._relations(*sides)
        if ":" in gold and ":" in answer and gold.count(":") == answer.count(":"):
            return self._ratios(gold.split(":"), answer.split(":"))
        return self._quantities(gold, answer)

    def _choice(self, gold: str, answer: str) -> Reason | None:
        wanted = _CHOICE.fullmatch(gold) if gold[-1:] != "'" else None
        if (
            not wanted
            or not (letter := wanted[1] or wanted[2])
            or not letter.isupper()
            or (wanted[3] and not wanted[1])
        ):
            both = re.fullmatch(r"[A-Za-z]", gold) and re.fullmatch(r"[A-Za-z]", answer)
            return Reason.WRONG if both and gold != answer else None
        given = _CHOICE.fullmatch(re.sub(r"^\\text\{([^{}]*)\}", r"\1", answer))
        if given and (given[1] or given[2]).isupper() and (given[1] or not given[3]):
            rest = given[3].strip()
            if (given[1] or given[2]) != letter:
                return Reason.WRONG
            if not rest:
                return Reason.CORRECT
            is_value = (
                quantity(rest) is not None
                and not items(rest)[0]
                and not re.search(r"\([A-J]\)", rest)
            )
            return (
                Reason.LEFTOVER
                if not is_value
                else self.same(wanted[3], rest)
                if wanted[3]
                else Reason.CORRECT
            )
        return (
            self.same(wanted[3].strip(), answer)
            if wanted[1] and wanted[3]
            else None
            if len(answer) > 1
            else Reason.WRONG
        )

    def _time(self, gold: str, answer: str) -> Reason | None:
        wanted, given = _TIME.fullmatch(spelled(gold)), _TIME.fullmatch(spelled(answer))
        if (
            not wanted
            or not given
            or not (wanted[4] or given[4] or (int(wanted[1]) < 24 and int(wanted[2]) < 60))
        ):
            return None
        hours = []
        for found in (wanted, given):
            hour = int(found[1])
            hours.append(hour % 12 + 12 * (found[4] in "pP") if found[4] else hour)
        if (wanted[2], wanted[3] or "00") != (given[2], given[3] or "00"):
            return Reason.WRONG
        is_same_face = int(wanted[1]) % 12 == int(given[1]) % 12
        return (
            Reason.CORRECT
            if hours[0] == hours[1]
            else Reason.UNIT
            if is_same_face
            else Reason.WRONG
        )

    def _family(self, gold: str, answer: str) -> Reason | None:
        found = [_FAMILY.fullmatch(text) for text in (gold, answer)]
        if not found[0] or not found[0][1]:
            return None
        if not found[1] or not found[1][1]:
            return Reason.WRONG
        bodies = [
            re.sub(rf"(?<![A-Za-z\\]){each[2]}(?![A-Za-z])", r"\\nu ", each[1]) for each in found
        ]
        return self.same(*bodies)

    def _matrix(self, gold: str, answer: str) -> Reason | None:
        found = [_MATRIX.fullmatch(re.sub(r"^[(\[]|[)\]]$", "", text)) for text in (gold, answer)]
        if not any(found):
            return None
        if not all(found):
            return Reason.WRONG
        rows = [[split(row, re.compile("&"))[0] for row in each[2].split(r"\\")] for each in found]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return Reason.WRONG
        return self._in_order(*([cell for row in each for cell in row] for each in rows))

    def _sets(self, gold: str, answer: str) -> Reason | None:
        is_strong = [
            re.search(
                r"\\cup|\\infty[,)\]]|[,(\[]-?\\infty|[<>]|\\[lgn]e(?![a-z])|\\in(?![a-z])|^\[|\]$|\\mathbb\{R\}",
                text,
            )
            for text in (gold, answer)
        ]
        wanted, given = intervals(gold), intervals(answer)
        if not any(is_strong) or not wanted or not given:
            return None
        if wanted[0] and given[0] and wanted[0] != given[0]:
            return Reason.WRONG
        rest = list(given[1])
        for one in wanted[1]:
            for other in rest:
                is_end = one[0] == other[0] and one[3] == other[3]
                if is_end and self._in_order(one[1:3], other[1:3]) is Reason.CORRECT:
                    rest.remove(other)
                    break
            else:
                return Reason.WRONG
        return Reason.WRONG if rest else Reason.CORRECT

    def _lists(
        self, gold: str, answer: str, wanted: tuple[str, list[str]], given: tuple[str, list[str]]
    ) -> Reason:
        (kind, golds), (other, answers) = wanted, given
        if kind == "," and _is_grouped(gold) and not other:
            return self._quantities(gold, answer)
        if len(golds) == len(answers) == 1:
            is_one = {kind, other} <= {"", "{"} and r"\varnothing" not in golds + answers
            return self.same(golds[0], answers[0]) if is_one else Reason.WRONG
        joined = [
            {r"\text{or}", r"\text{and}"} & set(_TOKEN.findall(text)) for text in (gold, answer)
        ]
        if all(joined) and joined[0] != joined[1] and re.search(r"[<>]|\\[lg]e", gold):
            return Reason.WRONG
        named, answered = (
            [re.fullmatch(r"([a-z](?:_\w)?)=(.*)", part) for part in parts]
            for parts in (golds, answers)
        )
        names = [{found[1] for found in each if found} for each in (named, answered)]
        if names[0] != names[1]:
            # Names on one side only: of one unknown they say nothing, of several they say the order.
            for parts, found, own, opposite in (
                (golds, named, names[0], names[1]),
                (answers, answered, names[1], names[0]),
            ):
                if own and not opposite:
                    if len(own) == len(parts) > 1 and all(found):
                        parts.sort()
                        kind = other = "("
                    parts[:] = [part.partition("=")[2] or part for part in parts]
        if len(golds) != len(answers):
            return Reason.WRONG
        if "(" in (kind, other) or "<" in (kind, other) or "[" in (kind, other):
            if "{" in (kind, other) or ("[" in (kind, other) and kind != other):
                return Reason.WRONG
            return self._in_order(golds, answers)
        return self._in_any_order(golds, answers)

    def _in_order(self, golds: Sequence[str], answers: Sequence[str]) -> Reason:
        reasons = [self.same(*pair) for pair in zip(golds, answers, strict=True)]
        return next((reason for reason in reasons if reason is not Reason.CORRECT), Reason.CORRECT)

    def _in_any_order(self, golds: Sequence[str], answers: Sequence[str]) -> Reason:
        rest = list(answers)
        for gold in golds:
            reasons = [self.same(gold, answer) for answer in rest]
            if Reason.CORRECT not in reasons:
                return reasons[0] if len(set(reasons)) == 1 else Reason.WRONG
            del rest[reasons.index(Reason.CORRECT)]
        return Reason.CORRECT

    def _relations(
        self, wanted: tuple[list[str], list[str]], given: tuple[list[str], list[str]]
    ) -> Reason:
        (golds, gold_signs), (answers, signs) = wanted, given
        if not all(golds):
            return Reason.WRONG
        if not all(answers):
            return Reason.UNPARSEABLE
        if set(gold_signs) | set(signs) - {"="} != {"="} and set(gold_signs + signs) != {"="}:
            return self._inequalities(golds, gold_signs, answers, signs)
        if not gold_signs:
            return self._chain(golds[0], answers)
        *left, value = golds
        if not _LEFT.fullmatch(left[0]) and _LEFT.fullmatch(value) and len(golds) == 2:
            left, value = [value], left[0]
        is_named = len(left) == 1 and _LEFT.fullmatch(left[0]) is not None
        if not signs:
            return self.same(value, answers[0]) if is_named else Reason.WRONG
        if is_named and left[0] in answers and len(answers) == 2:
            return self.same(value, answers[1 - answers.index(left[0])])
        if len(golds) != 2 or len(answers) != 2:
            return Reason.WRONG
        if (
            is_named
            and re.fullmatch(r"[A-Za-z](\(.*\))?", left[0])
            and any(re.fullmatch(r"[A-Za-z](\(.*\))?", a) for a in answers)
            and left[0] not in "".join(answers)
        ):
            return Reason.WRONG
        zero = [f"({left})-({right})" for left, right in (golds, answers)]
        return self._leaf(*zero, "proportional")

    def _chain(self, gold: str, answers: list[str]) -> Reason:
        """An answer "m + n = 8 + 9 = 17" to a gold without a sign of equality."""
        if (
            len(answers) == 2
            and _NAME.fullmatch(answers[1])
            and not _NAME.fullmatch(answers[0])
            and answers[1] != gold
        ):
            answers = answers[::-1]
        first, *others, last = answers
        if (reason := self.same(gold, last)) is not Reason.CORRECT:
            return reason
        if not _LEFT.fullmatch(first):
            others.append(first)
        reasons = [self.same(gold, other) for other in others]
        return Reason.CORRECT if set(reasons) <= {Reason.CORRECT} else Reason.WRONG

    def _inequalities(
        self, golds: list[str], gold_signs: list[str], answers: list[str], signs: list[str]
    ) -> Reason:
        flip = {">": "<", r"\ge": r"\le"}
        if len(golds) != 2 or len(answers) != 2:
            return Reason.WRONG
        if gold_signs[0] in flip:
            golds, gold_signs = golds[::-1], [flip[gold_signs[0]]]
        if signs[0] in flip:
            answers, signs = answers[::-1], [flip[signs[0]]]
        if gold_signs != signs or r"\in" in signs:
            return Reason.WRONG
        zero = [f"({left})-({right})" for left, right in (golds, answers)]
        return self._leaf(*zero, "proportional" if signs == [r"\ne"] else "positive multiple")

    def _ratios(self, golds: list[str], answers: list[str]) -> Reason:
        """3 : 4 is 6 : 8."""
        pairs = zip(golds[1:], answers[1:], strict=True)
        crossed = [(f"({gold})({answers[0]})", f"({answer})({golds[0]})") for gold, answer in pairs]
        reasons = [
            self._leaf(one.replace(")(", r")\cdot("), two.replace(")(", r")\cdot("))
            for one, two in crossed
        ]
        return next((reason for reason in reasons if reason is not Reason.CORRECT), Reason.CORRECT)

    def _quantities(self, gold: str, answer: str) -> Reason:
        based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
        if any(based):
            if (
                all(based)
                and based[0][1].lstrip("0") == based[1][1].lstrip("0")
                and based[0][2] == based[1][2]
            ):
                return Reason.CORRECT
            return Reason.WRONG if all(based) and based[0][2] == based[1][2] else Reason.UNIT
        wanted, given = quantity(gold), quantity(answer)
        if wanted is None:
            return Reason.CORRECT if spelled(gold) == spelled(answer) else Reason.WRONG
        if given is None:
            return Reason.LEFTOVER
        (value, unit, _), (other, named, is_sum) = wanted, given
        if unit is None and named is None:
            return self._leaf(value, other)
        if named is None or (unit is None and named is not _PERCENT):
            if is_sum or (named and named.pi and named.factor < Fraction(1, 180)):
                return Reason.LEFTOVER
            reason = self._leaf(value, other)
            bare = number(other)
            if reason is Reason.CORRECT and unit is _PERCENT and bare is not None and abs(bare) < 1:
                reason = Reason.WRONG
            if reason is Reason.CORRECT:
                return reason
            # A share for a percentage, radians for degrees.
            scales = [one or units.Unit(()) for one in (unit, named)]
            if unit is _PERCENT or (scales[0].pi + scales[1].pi and r"\pi" in value + other):
                return self._leaf(_scaled(value, *scales[0][1:]), _scaled(other, *scales[1][1:]))
            return reason
        if unit is None:
            return self._leaf(value, _scaled(other, named.factor, 0))
        if unit.powers != named.powers:
            return Reason.UNIT
        pi = unit.pi - named.pi
        reason = self._leaf(
            _scaled(value, unit.factor, max(pi, 0)), _scaled(other, named.factor, max(-pi, 0))
        )
        return Reason.UNIT if reason is Reason.WRONG and unit != named else reason

    def _leaf(self, gold: str, answer: str, relation: str = "") -> Reason:
        gold, answer = (re.sub(r"([A-Za-z])'+", r"\1_{prime}", text) for text in (gold, answer))
        if number(gold) is not None and number(answer) is not None:
            return self.leaf(gold, answer, relation)
        if _UNCLEAR.search(gold) or not gold:
            return Reason.CORRECT if gold == answer and gold else Reason.WRONG
        if not answer or _UNCLEAR.search(answer):
            return Reason.LEFTOVER
        return self.leaf(gold, answer, relation)


def _is_grouped(text: str) -> bool:
    """Whether the commas of a text group the digits of one number."""
    found = quantity(text)
    return found is not None and number(found[0]) is not None


class NeedsParser(Exception):
    """Arithmetic does not settle it."""


def arithmetic(digits: int) -> Leaf:
    """The comparison of two plain numbers; raises NeedsParser for other expressions."""

    def compared(gold: str, answer: str, relation: str) -> Reason:
        one, two = number(gold), number(answer)
        if one is None or two is None or relation:
            raise NeedsParser
        is_close = digits and (is_rounded(one, answer, digits) or is_rounded(two, gold, digits))
        return Reason.CORRECT if one == two or is_close else Reason.WRONG

    return compared


def is_rounded(value: Fraction, decimal: str, digits: int) -> bool:
    """Whether a decimal with at least so many significant digits is a value, rounded to its places."""
    found = re.fullmatch(r"[+-]?(\d*)\.(\d+)", decimal)
    if not found or len((found[1] + found[2]).lstrip("0")) < digits:
        return False
    return abs(Fraction(decimal) - value) * 2 * 10 ** len(found[2]) <= 1


def verdict(gold: str, answer: str, leaf: Leaf) -> Reason:
    """The verdict on two normalised texts."""
    if "e" not in gold:
        answer = re.sub(r"(?<![A-Za-z\\.\d])(\d+)e(?=[+-]?\d)", r"\1E", answer)
    return Comparison(leaf).same(gold, answer)
