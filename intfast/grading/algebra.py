"""Two expressions compared by latex2sympy, sympy and math-verify; imported by the worker alone.

Expressions are never expanded or simplified, which can run forever: they are equal when they agree
at several points to more digits than either text has, and exactly where both are rational.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb, factorial, prod
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy.assumptions import wrapper as _imported_early  # noqa: F401
from sympy.core.function import AppliedUndef
from sympy.core.random import seed
from sympy.sets.handlers import issubset as _imported_too  # noqa: F401

from intfast.grading.compare import is_rounded
from intfast.grading.normal import number
from intfast.grading.reasons import Reason
from intfast.grading.shapes import fraction

_AS_WRITTEN = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_REPAIRED = NormalizationConfig(
    basic_latex=False, units=False, malformed_operators=True, nits=False, boxed="none"
)
MAX_INTEGER = 5000
"""Largest argument of a factorial, and most digits of an integer power."""
MAX_TERMS = 3000
"""Most terms of a sum or product."""
_POINTS = (0.4, 2.3, 7.1, -1.6)
"""Where expressions are compared; every symbol is near them, each somewhere else."""
_BELOW = {sympy.tan: sympy.cos, sympy.sec: sympy.cos, sympy.cot: sympy.sin, sympy.csc: sympy.sin}
"""Functions with a division inside, and what they divide by."""
_INFINITE = (sympy.oo, -sympy.oo)


class Unreadable(Exception):
    """An expression that the parser does not know, or that must not be evaluated."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class _Parser(_Latex2Sympy):
    """The parser, but for the one thing that it computes while it reads."""

    def convert_binom(self, binom: Any) -> sympy.Expr:
        """A binomial that is measured before it is evaluated."""
        parts = self.convert_expr(binom.upper), self.convert_expr(binom.lower)
        return sympy.binomial(*parts, evaluate=False)


def leaf(on_gold: Callable[[bool], None], digits: int) -> Callable[[str, str, str], Reason]:
    """The comparison of two expressions.

    on_gold: told before each text whether it is the gold's
    digits:  decimals of so many significant digits may be rounded; 0: none may
    """

    def compared(gold: str, answer: str, relation: str) -> Reason:
        # Sympy decides some questions by sampling.
        random.seed(0)
        seed(0)
        on_gold(True)
        try:
            one = read(gold)
        except Unreadable:
            return Reason.GOLD_UNPARSEABLE
        on_gold(False)
        try:
            two = read(answer)
            is_same = equal(one, two, 40 + len(gold) + len(answer), relation)
        except Unreadable as error:
            return error.reason
        if not is_same and digits:
            is_same = is_close(one, answer, digits) or is_close(two, gold, digits)
        return Reason.CORRECT if is_same else Reason.WRONG

    return compared


def exact(text: str) -> str:
    """A text with fractions for its decimals: a float would be rounded."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if "(" not in text else text
    # Two factors side by side would be added, as a mixed number.
    text = re.sub(r"(?<![\w\\^_}.])(\d+)(?=\(|\\binom|\\frac\{[^{}]*[^\d{}])", r"\1\\cdot ", text)
    text = re.sub(r"\)(?=\(|\d|\\frac|\\binom)", r")\\cdot ", text)
    if "\\int" not in text and "\\frac{d" not in text:
        # Elsewhere the parser takes "dx" for a differential.
        text = re.sub(r"(?<![A-Za-z\\])d(?=[A-Za-z])", "{d}", text)
    text = re.sub(
        r"(?<![\d.])\d*\.\d*\\(?:overline|bar|dot)\{\d+\}|(?<![\d.])(?:\d+\.\d*|\.\d+|\d+(?=E))(?:E[+-]?\d+)?",
        lambda match: _as_fraction(match[0]),
        text,
    )
    return re.sub(r"(?<![\d^_}])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", _unmixed, text)


def _unmixed(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    if top < bottom:
        return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"
    return rf"{whole}\cdot\frac{{{top}}}{{{bottom}}}"


def _as_fraction(decimal: str) -> str:
    value = number(decimal)
    if value is None:
        raise Unreadable(Reason.UNPARSEABLE)
    return f"({fraction(value)})"


def read(text: str) -> sympy.Basic:
    """The expression of a text, unevaluated. Raises Unreadable."""
    if (value := number(text)) is not None:
        return sympy.Rational(value.numerator, value.denominator)
    try:
        parser = _Parser(is_real=True, config=_AS_WRITTEN)
        expression = parser.parse(normalize_latex(exact(text), _REPAIRED))
    except (MemoryError, Unreadable):
        raise
    except Exception as error:
        raise Unreadable(Reason.UNPARSEABLE) from error
    if isinstance(expression, sympy.Expr):
        unit = sympy.Symbol("i", real=True)
        if unit in expression.free_symbols:
            expression = expression.xreplace({unit: sympy.I})
        if expression.has(sympy.Limit):
            expression = expression.doit()
        if expression.has(sympy.Derivative):
            raise Unreadable(Reason.UNPARSEABLE)
        _measure(expression)
        _refuse_undefined(expression)
    return expression


def _measure(expression: sympy.Expr) -> float:
    """A rough size of a number, 0 where it is none; raises Unreadable before something explodes."""
    sizes = [_measure(part) for part in expression.args if isinstance(part, sympy.Basic)]
    if isinstance(expression, (sympy.Sum, sympy.Product)):
        terms = 1.0
        for _, low, high in expression.limits:
            terms *= max(_measure(high) - _measure(low), 1)
        if terms > MAX_TERMS:
            raise Unreadable(Reason.TOO_COMPLEX)
    try:
        if expression.is_Rational:
            return abs(float(expression.p / expression.q))
        is_product = isinstance(expression, (sympy.factorial, sympy.binomial, sympy.gamma))
        if is_product and max(sizes) > MAX_INTEGER:
            raise Unreadable(Reason.TOO_COMPLEX)
        if isinstance(expression, sympy.factorial) and sizes[0]:
            return float(factorial(int(sizes[0]))) if sizes[0] < 170 else float("inf")
        if expression.is_Pow and all(sizes):
            if sizes[1] > 4 * MAX_INTEGER:
                raise Unreadable(Reason.TOO_COMPLEX)
            return sizes[0] ** sizes[1]
        if expression.is_Mul:
            return sympy.prod(sizes) if sizes else 0.0
        return float(sum(sizes))
    except OverflowError:
        return float("inf")


def _refuse_undefined(expression: sympy.Expr) -> None:
    """Raises Unreadable for a division by zero anywhere, whatever it is multiplied with."""
    for part in sympy.preorder_traversal(expression):
        if part in (sympy.zoo, sympy.nan):
            raise Unreadable(Reason.UNDEFINED)
        is_root = isinstance(part, sympy.Pow) and (
            part.exp.could_extract_minus_sign() or _is_zero(part.exp)
        )
        if (is_root or isinstance(part, sympy.log)) and _is_zero(part.args[0]):
            raise Unreadable(Reason.UNDEFINED)
        below = _BELOW.get(type(part))
        if below and not part.free_symbols and _is_zero(below(part.args[0])):
            raise Unreadable(Reason.UNDEFINED)
    if not expression.free_symbols:
        infinite = expression.doit() if expression.has(*_INFINITE) else expression.evalf(5)
        if infinite.has(sympy.zoo, sympy.nan):
            raise Unreadable(Reason.UNDEFINED)


def _is_zero(expression: sympy.Expr) -> bool:
    if (value := rational(expression)) is not None:
        return value == 0
    values = [value for value in _values([expression], 40) if value]
    return bool(values) and all(abs(value[0]) < sympy.Float(10) ** -30 for value in values)


def rational(expression: sympy.Expr) -> Fraction | None:
    """The exact value of an expression of integers, None where it is none or too large."""
    if expression.is_Rational:
        return Fraction(int(expression.p), int(expression.q))
    parts = [rational(part) if isinstance(part, sympy.Expr) else None for part in expression.args]
    if None in parts or not parts:
        return None
    if expression.is_Add:
        return sum(parts, Fraction(0))
    if expression.is_Mul:
        return prod(parts, start=Fraction(1))
    if isinstance(expression, sympy.UnevaluatedExpr):
        return parts[0]
    first, last = parts[0], parts[-1]
    if expression.is_Pow and last.denominator == 1 and (first or last > 0):
        bits = max(first.numerator.bit_length(), first.denominator.bit_length())
        return first ** int(last) if bits * abs(last) < 16 * MAX_INTEGER else None
    is_count = all(part.denominator == 1 and 0 <= part <= MAX_INTEGER for part in parts)
    if isinstance(expression, sympy.factorial) and is_count:
        return Fraction(factorial(int(first)))
    if isinstance(expression, sympy.binomial) and is_count:
        return Fraction(comb(int(first), int(last)))
    return None


def equal(gold: sympy.Basic, answer: sympy.Basic, digits: int, relation: str) -> bool:
    """Whether two expressions are equal, or a multiple of each other."""
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return verify([gold], [answer], timeout_seconds=None)
    exacts = rational(gold), rational(answer)
    if None not in exacts and not relation:
        return exacts[0] == exacts[1]
    if gold.has(*_INFINITE) or answer.has(*_INFINITE):
        return gold.doit() == answer.doit()
    # f(x) is as good as a symbol.
    calls = gold.atoms(AppliedUndef) | answer.atoms(AppliedUndef)
    names = enumerate(sorted(calls, key=lambda call: call.sort_key()))
    named = {call: sympy.Symbol(f"f{place}", real=True) for place, call in names}
    gold, answer = gold.xreplace(named), answer.xreplace(named)
    tolerance = sympy.Float(10, digits) ** (15 - digits)
    pairs = []
    for pair in _values([gold, answer], digits):
        if pair is None:
            return verify([gold], [answer], timeout_seconds=None)
        is_real = all(sympy.im(value) == 0 for value in pair)
        if is_real and not relation and not _is_near(*pair, tolerance):
            return False
        pairs.append((is_real, *pair))
    # Where both are real somewhere, other places are outside of what they are meant for.
    pairs = [pair for pair in pairs if pair[0]] or pairs
    if not relation or not (gold.free_symbols or answer.free_symbols):
        return all(_is_near(one, two, tolerance) for _, one, two in pairs)
    if any(abs(value) < tolerance for pair in pairs for value in pair[1:]):
        return False
    ratios = [one / two for _, one, two in pairs]
    is_turned = relation == "positive multiple" and sympy.re(ratios[0]) < 0
    return not is_turned and all(_is_near(ratio, ratios[0], tolerance) for ratio in ratios)


def _is_near(one: sympy.Expr, two: sympy.Expr, tolerance: sympy.Float) -> bool:
    return bool(abs(one - two) <= tolerance * max(1, abs(one)))


def _values(expressions: list[sympy.Expr], digits: int) -> Iterator[tuple[sympy.Expr, ...] | None]:
    """Their values at each point; None where one has none."""
    symbols = sorted(set().union(*(e.free_symbols for e in expressions)), key=lambda s: s.name)
    for place, near in enumerate(_POINTS if symbols else _POINTS[:1]):
        # Not in proportion: x - 2y and y - 2x are multiples of each other along a line.
        near_it = random.Random(place)
        point = {
            symbol: sympy.Rational(int(near * near_it.randint(10_000, 14_000)), 10_000)
            for symbol in symbols
        }
        values = tuple(e.evalf(digits, subs=point, maxn=4 * digits) for e in expressions)
        yield values if all(map(_is_number, values)) else None


def _is_number(value: sympy.Expr) -> bool:
    return all(part.is_Number and part.is_finite for part in value.as_real_imag())


def is_close(expression: sympy.Basic, decimal: str, digits: int) -> bool:
    """Whether a decimal of enough digits is the expression, rounded to its places."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return False
    value = expression.evalf(60 + len(decimal))
    return value.is_comparable and is_rounded(Fraction(str(sympy.Rational(value))), decimal, digits)
