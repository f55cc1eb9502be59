"""Gold and answer compared part by part: everything of the answer must be understood and agree.

Both come normalised. Lists, tuples, sets, intervals, relations, matrices, times, choices and
quantities are taken apart here; two expressions that arithmetic cannot tell apart go to `leaf`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from intfast.grading import units
from intfast.grading.normal import number
from intfast.grading.reasons import Reason
from intfast.grading.shapes import (
    PERCENT,
    RELATION,
    TOKEN,
    intervals,
    is_grouped,
    items,
    quantity,
    same_words,
    scaled,
    spelled,
    split,
    stripped,
)

Leaf = Callable[[str, str, str], Reason]
"""(gold, answer, "" | "proportional" | "positive multiple") -> the verdict on two expressions."""

# What may stand left of the last sign of equality: names, sums of names, f(3), |AB|, P(A).
_LEFT = re.compile(
    r"(?:\\text\{(?![^{}]*\bnot\b)[A-Za-z ]+\}|(?!\\pi|\\infty)\\[A-Za-z]+|[A-Za-z]'*"
    r"|_\{?\w{1,3}\}?|\([^()=]{1,20}\)|\|[A-Za-z]{1,3}\||\^\{-1\}|[-+{}^*: ])+"
)
_NAME = re.compile(r"[A-Za-z](?:\([a-z]\))?|\\[a-z]+(?:\{[A-Za-z]+\})?|\\text\{(?!not)[A-Za-z ]+\}")
# In an expression none of these has a meaning that the parser keeps.
_UNCLEAR = re.compile(
    r"\\text|\\ldots|\\p?mod(?![a-z])|\\(?:approx|sim|equiv)(?![a-z])|(?<!\{[a-z])\\to(?![a-z])"
    r"|(?:^|[-+*=(])\{[^{}]*\} ?\{|[?:;$&\"]|\d [\d(]|\d_|\)_|\^\{?[T*]|(?<![A-Za-z)])'"
    r"|\\(?:boxed|fbox|begin|end|lnot|neg|mp)(?![a-z])|\\log_\{?[01]\}?(?![\d.])|\\infty\s*[\w\\(]|^[*/^_.,)]|[-+*/^_(,]$"
)
_STRONG = re.compile(
    r"\\cup|\\infty[,)\]]|[,(\[]-?\\infty|[<>]|\\(?:[lgn]e|in)(?![a-z])|^\[|\]$|\\mathbb\{R\}"
)
_TIME = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))? ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer) )?(?:\(([A-J])\)|([A-J])(?![A-Za-z_^'(]))([).:]?)(.*)",
    re.IGNORECASE,
)
_FAMILY = re.compile(
    r"(.*?)[,| ]*\(?(?:"
    r"(?:\\text\{(?:for|where|with|for (?:all|any|some|every))?\s?(?:integers?)?\})?([a-z])"
    r"(?:\\in ?(?:\\mathbb\{Z\}|Z)|\\text\{(?:is )?any? integer\})"
    r"|\\text\{(?:for|where|with)(?: all| any| some| every)? integers?(?: values of)?\}([a-z]))\)?"
)
_FAMILY_SET = re.compile(r"\\\{(?:[a-z]\|(?=[a-z]=))?(.*\\mathbb\{Z\})\\\}")
_MATRIX = re.compile(
    r"\\begin\{([pb]?matrix|array)\}(?:\{[^{}]*\})?(.*?)(?:\\\\)?\\end\{\1\}", re.DOTALL
)
_BASED = re.compile(r"(-?\d[\dA-F]*)_\{?(\d{1,2})\}?")


class Comparison:
    """Compares normalised texts; `leaf` decides on two expressions."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf

    def same(self, gold: str, answer: str) -> Reason:
        """The verdict on two normalised texts."""
        if same_words(gold, answer) and gold != answer:
            return Reason.CORRECT
        gold, answer = stripped(gold), stripped(answer).lstrip("=")
        gold, answer = (re.sub(r"^[a-z]\\in ?(?=\\\{[^|:]*$)", "", text) for text in (gold, answer))
        if r"\approx" in gold:
            gold, answer = (t.replace(r"\approx", "=").removeprefix("=") for t in (gold, answer))
        for attempt in (self._choice, self._time, self._family, self._matrix, self._sets):
            if (reason := attempt(gold, answer)) is not None:
                return reason
        compound = quantity(gold), quantity(answer)
        if not any(found and found[2] for found in compound):
            kinds = items(gold), items(answer)
            related = [not kind and split(parts[0], RELATION)[1] for kind, parts in kinds]
            if (kinds[0][0] or kinds[1][0]) and not any(related):
                return self._lists(gold, answer, *kinds)
            gold, answer = (
                text if kind else parts[0]
                for text, (kind, parts) in zip((gold, answer), kinds, strict=True)
            )
        sides = split(gold, RELATION), split(answer, RELATION)
        if sides[0][1] or sides[1][1]:
            return self._relations(*sides)
        if ":" in gold and ":" in answer and gold.count(":") == answer.count(":"):
            return self._ratios(gold.split(":"), answer.split(":"))
        return self._quantities(gold, answer)

    # Each of these says None where the texts are not of its kind.

    def _choice(self, gold: str, answer: str) -> Reason | None:
        wanted = _CHOICE.fullmatch(gold)
        letter = (wanted[1] or wanted[2]) if wanted else ""
        if not letter.isupper() or (wanted[4] and not wanted[1]):
            both = re.fullmatch(r"[A-Za-z]", gold) and re.fullmatch(r"[A-Za-z]", answer)
            return Reason.WRONG if both and gold != answer else None
        value = wanted[4].strip()
        given = _CHOICE.fullmatch(re.sub(r"^\\text\{([^{}]*)\} ?", r"\1 ", answer).strip())
        if given and (given[1] or given[2]).isupper() and (given[1] or given[3] or not given[4]):
            if (given[1] or given[2]) != letter:
                return Reason.WRONG
            rest = given[4].strip()
            if rest and (
                not quantity(rest) or items(rest)[0] or re.search(r"\([A-J]\)|^[A-J]$", rest)
            ):
                return Reason.LEFTOVER
            return self.same(value, rest) if value and rest else Reason.CORRECT
        if value:
            return self.same(value, answer)
        return None if len(answer) > 1 else Reason.WRONG

    def _time(self, gold: str, answer: str) -> Reason | None:
        wanted, given = _TIME.fullmatch(spelled(gold)), _TIME.fullmatch(spelled(answer))
        if not wanted or not given:
            return None
        if not (wanted[4] or given[4] or (int(wanted[1]) < 24 and int(wanted[2]) < 60)):
            return None
        hours = []
        for found in (wanted, given):
            hour = int(found[1])
            hours.append(hour % 12 + 12 * (found[4] in "pP") if found[4] else hour)
        if (wanted[2], wanted[3] or "00") != (given[2], given[3] or "00"):
            return Reason.WRONG
        if hours[0] == hours[1]:
            return Reason.CORRECT
        return Reason.UNIT if hours[0] % 12 == hours[1] % 12 else Reason.WRONG

    def _family(self, gold: str, answer: str) -> Reason | None:
        inside = (_FAMILY_SET.fullmatch(text) for text in (gold, answer))
        texts = [one[1] if one else text for one, text in zip(inside, (gold, answer), strict=True)]
        found = [_FAMILY.fullmatch(text) for text in texts]
        if not found[0] or not found[0][1]:
            return None
        if not found[1] or not found[1][1]:
            return Reason.WRONG
        name = r"(?<![A-Za-z\\]){}(?![A-Za-z])"
        bodies = (re.sub(name.format(each[2] or each[3]), r"\\nu ", each[1]) for each in found)
        return self.same(*bodies)

    def _matrix(self, gold: str, answer: str) -> Reason | None:
        found = [_MATRIX.fullmatch(re.sub(r"^[(\[]|[)\]]$", "", text)) for text in (gold, answer)]
        if not any(found):
            return None
        if not all(found) or any(r"\begin" in each[2] for each in found):
            # A sum or product of matrices is the parser's.
            is_sum = all("matrix}" in text for text in (gold, answer))
            return self.leaf(gold, answer, "") if is_sum else Reason.WRONG
        rows = [[split(row, re.compile("&"))[0] for row in each[2].split(r"\\")] for each in found]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return Reason.WRONG
        return self._in_order(*([cell for row in each for cell in row] for each in rows))

    def _sets(self, gold: str, answer: str) -> Reason | None:
        is_strong = [_STRONG.search(text) for text in (gold, answer)]
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
        if kind == "," and is_grouped(gold) and not other:
            return self._quantities(gold, answer)
        if len(golds) == len(answers) == 1:
            is_one = {kind, other} <= {"", "{"} and r"\varnothing" not in golds + answers
            return self.same(golds[0], answers[0]) if is_one else Reason.WRONG
        # A set among the items is no item itself.
        nested = [sum(part.startswith(r"\{") for part in parts) for parts in (golds, answers)]
        if nested[0] != nested[1]:
            return Reason.WRONG
        words = {r"\text{or}", r"\text{and}"}
        joined = [words & set(TOKEN.findall(text)) for text in (gold, answer)]
        if all(joined) and joined[0] != joined[1] and re.search(r"[<>]|\\[lg]e", gold):
            return Reason.WRONG
        # Names on one side only: of one unknown they say nothing, of several they say the order.
        name = re.compile(r"([a-z](?:_\w)?)=(.*)")
        named = [[name.fullmatch(part) for part in each] for each in (golds, answers)]
        names = [{found[1] for found in each if found} for each in named]
        for at, parts in enumerate((golds, answers)):
            if names[at] and not names[1 - at]:
                if len(names[at]) == len(parts) > 1 and all(named[at]):
                    # In the gold's order, in the alphabet's for a gold without names.
                    parts[:] = sorted(parts) if at else parts
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
        return _first_fault([self.same(*pair) for pair in zip(golds, answers, strict=True)])

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
        if set(gold_signs + signs) != {"="}:
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
        is_call = [re.fullmatch(r"[A-Za-z](\(.*\))?", side) for side in (left[0], *answers)]
        if is_named and is_call[0] and any(is_call[1:]) and left[0] not in "".join(answers):
            return Reason.WRONG
        zero = [f"({left})-({right})" for left, right in (golds, answers)]
        return self._leaf(*zero, "proportional")

    def _chain(self, gold: str, answers: list[str]) -> Reason:
        """An answer "m + n = 8 + 9 = 17" to a gold without a sign of equality."""
        is_name = [_NAME.fullmatch(answer) is not None for answer in answers]
        if is_name == [False, True] and answers[1] != gold:
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
        shares = [
            [rf"\frac{{{part}}}{{{parts[0]}}}" for part in parts[1:]] for parts in (golds, answers)
        ]
        return _first_fault([self._leaf(*pair) for pair in zip(*shares, strict=True)])

    def _quantities(self, gold: str, answer: str) -> Reason:
        based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
        if any(based):
            if not all(based) or based[0][2] != based[1][2]:
                return Reason.UNIT
            digits = [found[1].lstrip("0") for found in based]
            return Reason.CORRECT if digits[0] == digits[1] else Reason.WRONG
        wanted, given = quantity(gold), quantity(answer)
        if wanted is None:
            return Reason.CORRECT if spelled(gold) == spelled(answer) else Reason.WRONG
        if given is None:
            return Reason.LEFTOVER
        (value, unit, _), (other, named, is_sum) = wanted, given
        if unit is None and named is None:
            return self._leaf(value, other)
        if named is None or (unit is None and named is not PERCENT):
            if is_sum or (named and named.pi and named.factor < Fraction(1, 180)):
                return Reason.LEFTOVER
            is_radian = r"\pi" in (other if unit else value) and (unit or named).pi == 1
            reason = Reason.WRONG if is_radian else self._leaf(value, other)
            bare = number(other)
            if reason is Reason.CORRECT and unit is PERCENT and bare is not None and abs(bare) < 1:
                reason = Reason.WRONG
            if reason is Reason.CORRECT:
                return reason
            # A share for a percentage, radians for degrees.
            scales = [one or units.Unit(()) for one in (unit, named)]
            if unit is PERCENT or (scales[0].pi + scales[1].pi and r"\pi" in value + other):
                return self._leaf(scaled(value, *scales[0][1:]), scaled(other, *scales[1][1:]))
            return reason
        if unit is None:
            return self._leaf(value, scaled(other, named.factor, 0))
        if unit.powers != named.powers:
            return Reason.UNIT
        pi = unit.pi - named.pi
        sides = scaled(value, unit.factor, max(pi, 0)), scaled(other, named.factor, max(-pi, 0))
        reason = self._leaf(*sides)
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


def _first_fault(reasons: list[Reason]) -> Reason:
    return next((reason for reason in reasons if reason is not Reason.CORRECT), Reason.CORRECT)


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
    """Whether a decimal of at least so many significant digits is a value, rounded to them."""
    found = re.fullmatch(r"[+-]?(\d*)\.(\d+)", decimal)
    if not found or len((found[1] + found[2]).lstrip("0")) < digits:
        return False
    return abs(Fraction(decimal) - value) * 2 * 10 ** len(found[2]) <= 1


def verdict(gold: str, answer: str, leaf: Leaf) -> Reason:
    """The verdict on two normalised texts."""
    if "e" not in gold:
        answer = re.sub(r"(?<![A-Za-z\\.\d])(\d+)e(?=[+-]?\d)", r"\1E", answer)
    return Comparison(leaf).same(gold, answer)
