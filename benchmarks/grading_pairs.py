# ruff: noqa: E501 - a template is a line
"""Pairs of gold and answer whose verdict follows from how they are made, by class.

A class is a function (rng, held) -> (gold, answer, is right, why), called over and over. The value
of a pair is computed here with integers and fractions, or the templates say the same in two
spellings; no grader is asked. `held` chooses other templates, for the set that is looked at last.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from math import gcd
from typing import NamedTuple

Made = tuple[str, str, bool, str]


class Pair(NamedTuple):
    """`text` is a whole completion. Example: Pair("units", "5", "\\boxed{5\\text{ g}}", True, "")."""

    category: str
    gold: str
    text: str
    is_right: bool
    why: str


CLASSES: dict[str, Callable[[random.Random, bool], Made]] = {}


def category(make: Callable[[random.Random, bool], Made]) -> Callable[[random.Random, bool], Made]:
    """Register a class under its function's name."""
    CLASSES[make.__name__] = make
    return make


def made(seed: int, count: int, held: bool = False) -> list[Pair]:
    """About `count` distinct pairs of each class."""
    found: dict[tuple[str, str, str], Pair] = {}
    for name, make in CLASSES.items():
        rng = random.Random(f"{seed} {name}")
        for _ in range(count):
            gold, answer, is_right, why = make(rng, held)
            text = answer if "box" in answer else rf"So it is \boxed{{{answer}}}."
            found.setdefault((name, gold, text), Pair(name, gold, text, is_right, why))
    return list(found.values())


def _fraction(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _ratio(rng: random.Random, top: int = 40) -> Fraction:
    """A proper fraction in lowest terms whose decimal does not end."""
    while True:
        value = Fraction(rng.randint(1, top), rng.choice((3, 7, 9, 11, 13, 17)))
        if value.denominator > 1:
            return value


def _digits(value: Fraction, places: int) -> str:
    scaled = value.numerator * 10**places // value.denominator
    return f"{scaled // 10**places}.{scaled % 10**places:0{places}}"


def _grouped(number: int, mark: str) -> str:
    return f"{number:,}".replace(",", mark)


SCALES = "thousand,million,billion,hundred,dozen"
HELD_SCALES = "trillion,score,lakh,gross,hundred thousand"
TAILS = "factorial,or more,or less,at least,is wrong,plus 2,minus 1,times 3,squared,and a half,or 9"
HELD_TAILS = (
    "at most,cubed,choose 2,modulo 7,if x is positive,thirds,per cent of 9,remainder 1,to 8"
)
NOUNS = "apples,marbles,books,students,ways,units,people,coins,cm,hours,dollars,square meters"
HELD_NOUNS = (
    "pencils,children,points,tickets,integers,kilometers,women,kg,cubic feet,pages,mL,acres"
)


@category
def words_behind(rng: random.Random, held: bool) -> Made:
    n = rng.randint(2, 99)
    kind = rng.randrange(4)
    if kind == 0:
        word = rng.choice((HELD_SCALES if held else SCALES).split(","))
        form = rng.choice((r"\text{{ {}}}", r"\,\mathrm{{{}}}", " {}", r"~\textbf{{{}}}"))
        return f"{n}", f"{n}" + form.format(word), False, "scale word"
    if kind == 1:
        word = rng.choice((HELD_TAILS if held else TAILS).split(","))
        return f"{n}", rf"{n}\text{{ {word}}}", False, "hedge or operation"
    if kind == 2:
        a, b = rng.choice((("hours", "minutes"), ("feet", "inches"), ("pounds", "ounces")))
        m = rng.randint(1, 11)
        shape = rng.choice(
            (r"{n}\text{{ {a} and }}{m}\text{{ {b}}}", r"{n}\text{{ {a} }}{m}\text{{ {b}}}")
        )
        return f"{n}", shape.format(n=n, a=a, m=m, b=b), False, "second quantity"
    noun = rng.choice((HELD_NOUNS if held else NOUNS).split(","))
    form = rng.choice((r"\text{{ {}}}", r"\ \text{{{}}}", r"\,\mathrm{{{}}}", r"\text{{ {}.}}"))
    return f"{n}", f"{n}" + form.format(noun), True, "what it counts"


UNITS = [
    ("m", "cm", 100),
    ("kg", "g", 1000),
    ("hours", "minutes", 60),
    ("km", "m", 1000),
    ("feet", "inches", 12),
]
HELD_UNITS = [
    ("L", "mL", 1000),
    ("days", "hours", 24),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("minutes", "seconds", 60),
]
NAMES = {
    "m": "meters",
    "kg": "kilograms",
    "cm": "centimeters",
    "g": "grams",
    "km": "kilometers",
    "hours": "hr",
}
HELD_NAMES = {
    "L": "liters",
    "mL": "milliliters",
    "feet": "ft",
    "seconds": "s",
    "mm": "millimeters",
    "inches": "in",
}


@category
def units(rng: random.Random, held: bool) -> Made:
    n = rng.randint(2, 90)
    big, small, factor = rng.choice(HELD_UNITS if held else UNITS)
    kind = rng.randrange(5)
    gold = rf"{n}\text{{ {big}}}"
    if kind == 0:
        return gold, rf"{n}\text{{ {small}}}", False, "another unit"
    if kind == 1:
        return gold, rf"{n * factor}\text{{ {small}}}", True, "converted"
    if kind == 2:
        return gold, rf"{n * factor + 1}\text{{ {small}}}", False, "converted wrongly"
    short, long = rng.choice(list((HELD_NAMES if held else NAMES).items()))
    if kind == 3:
        return rf"{n}\text{{ {short}}}", rf"{n}\ \text{{{long}}}", True, "the unit's other name"
    power = rng.choice("23")
    shape = rng.choice((r"{n}\text{{ cm}}^{p}", r"{n}\ \text{{cm}}^{{{p}}}"))
    right = rng.random() < 0.5
    answer = (
        rf"{n}\text{{ {'square' if power == '2' else 'cubic'} centimeters}}"
        if right
        else rf"{n}\text{{ cm}}"
    )
    return shape.format(n=n, p=power), answer, right, "powers of units"


@category
def angles(rng: random.Random, held: bool) -> Made:
    n = rng.choice((15, 20, 36, 72, 80, 130) if held else (30, 45, 60, 90, 120, 150, 135))
    part = Fraction(n, 180)
    radians = rf"\frac{{{part.numerator}\pi}}{{{part.denominator}}}"
    circle = rng.choice((r"^\circ", r"^{\circ}", "\xb0", r"\text{ degrees}"))
    kind = rng.randrange(6)
    if kind == 0:
        return (
            rf"{n}^\circ",
            rf"{n}\text{{ {rng.choice(('rad', 'radians'))}}}",
            False,
            "radians are no degrees",
        )
    if kind == 1:
        return rf"{n}^\circ", radians + r"\text{ radians}", True, "the same angle"
    if kind == 2:
        return rf"{n}^\circ", f"{n}{circle}", True, "a degree sign"
    if kind == 3:
        return (
            rf"{n}^\circ",
            rf"{n}'" if not held else rf"{n}\text{{ minutes}}",
            False,
            "minutes of arc",
        )
    if kind == 4:
        return radians, radians.replace(r"\frac", r"\dfrac"), True, "radians"
    name, value = rng.choice(((r"\sin 30^\circ", "1/2"), (r"\cos 60^{\circ}", "1/2"), (r"\tan 45^\circ", "1"))
                             if not held else ((r"\sin(150^\circ)", "1/2"), (r"\cos 180^\circ", "-1"), (r"\tan{135^\circ}", "-1")))  # fmt: skip
    return (
        (value, name, True, "function of degrees")
        if rng.random() < 0.6
        else (rf"\frac{{{n}}}{{7}}", name, False, "function of degrees")
    )


@category
def times(rng: random.Random, held: bool) -> Made:
    hour, minute = rng.randint(1, 11), rng.randint(10, 59)
    half, other = rng.sample(("AM", "PM"), 2)
    gold = rf"{hour}:{minute}\text{{ {half}}}"
    soft = f"{half[0].lower()}.m."
    kind = rng.randrange(5)
    if kind == 0:
        return gold, rf"{hour}:{minute}\text{{ {other}}}", False, "other half of the day"
    if kind == 1:
        shape = rng.choice(("{h}{{:}}{m}\\text{{ {s}}}", "{h}:{m} {s}", "0{h}:{m}\\ \\text{{{s}}}"))
        if held:
            shape = rng.choice((r"{h}:{m}~\mathrm{{{s}}}", r"\text{{{h}:{m} {s}}}", "{h}:{m}{s}"))
        return gold, shape.format(h=hour, m=minute, s=soft), True, "another spelling"
    if kind == 2:
        return (
            gold,
            rf"{hour}:{minute - 1 if minute > 10 else 11}\text{{ {half}}}",
            False,
            "a minute off",
        )
    if kind == 3:
        clock = hour + 12 * (half == "PM")
        return gold, f"{clock:02}:{minute}", True, "24 hours"
    other = f"{hour}:{(minute + 7) % 50 + 10}" if rng.random() < 0.5 else f"{hour}:{minute}"
    return f"{hour}:{minute}", other, other == f"{hour}:{minute}", "a ratio or a time"


@category
def exact_decimals(rng: random.Random, held: bool) -> Made:
    kind = rng.randrange(5)
    places = rng.choice((8, 10, 12) if held else (5, 6, 7))
    if kind == 0:
        value = _ratio(rng)
        return _fraction(value), _digits(value, places), False, "a cut decimal"
    if kind == 1:
        root, text = rng.choice(
            ((2, "1.41421356237309"), (3, "1.73205080756887"), (5, "2.23606797749978"))
        )
        return rf"\sqrt{{{root}}}", text[: places + 2], False, "a root is no decimal"
    if kind == 2:
        name, text = rng.choice(
            (
                (r"\pi", "3.14159265358979"),
                ("e", "2.71828182845904"),
                (r"\ln 2", "0.69314718055994"),
            )
        )
        return name, text[: places + 2], False, "a constant is no decimal"
    value = Fraction(
        rng.randint(1, 999), rng.choice((8, 16, 25, 40, 80) if held else (2, 4, 5, 8, 20))
    )
    decimal = _digits(value, 6).rstrip("0").rstrip(".")
    if kind == 3:
        return (_fraction(value), decimal, True, "a finite decimal") if rng.random() < 0.5 else (
            decimal, _fraction(value), True, "a finite decimal")  # fmt: skip
    long = "0." + "".join(rng.choices("123456789", k=places + 1))
    return long, long[:-1] + ("8" if long[-1] != "8" else "7"), False, "the last digit differs"


@category
def undefined(rng: random.Random, held: bool) -> Made:
    a, b = rng.randint(2, 20), rng.randint(2, 9)
    shapes = (
        (a, r"{a}+\frac{{0}}{{{b}-{b}}}"), (0, r"\frac{{y}}{{0}}-\frac{{y}}{{0}}"), (0, r"\frac{{{b}}}{{{b}-{b}}}\cdot 0"),
        (0, r"\frac{{0}}{{{b}-{b}}}"), (1, r"\frac{{{b}-{b}}}{{{b}-{b}}}"), (a, r"{a}\cdot\frac{{0}}{{0}}"),
    )  # fmt: skip
    if held:
        shapes = (
            (a, r"{a}+0/({b}-{b})"), (1, r"({b}-{b})^{{0}}/({b}-{b})"), (0, r"0\cdot({b}-{b})^{{-1}}"), (0, r"\infty-\infty"),
            (a, r"\frac{{{a}\cdot({b}-{b})}}{{{b}-{b}}}"), (0, r"\frac{{{b}}}{{\infty}}\cdot\frac{{1}}{{0}}"),
        )  # fmt: skip
    if rng.random() < 0.3:
        return f"{a}", rf"{a}+\frac{{0}}{{{b}+{b}}}", True, "a zero above a number"
    gold, shape = rng.choice(shapes)
    return f"{gold}", shape.format(a=a, b=b), False, "a division by zero"


@category
def bases_and_dots(rng: random.Random, held: bool) -> Made:
    base = rng.choice((5, 6, 9) if held else (7, 8, 4))
    n = int("".join(rng.choice("123") for _ in range(rng.randint(2, 4))))
    spelled = rng.choice((f"{n}_{base}", rf"{n}_{{{base}}}"))
    kind = rng.randrange(5)
    if kind == 0:
        return f"{n}", spelled, False, "another base"
    if kind == 1:
        return f"{n}_{base}", f"{n}_{base + 1}", False, "another base"
    if kind == 2:
        return (
            f"{n}_{base}",
            rf"{n}_{{{base}}}" if not held else rf"{n}_{{\text{{{base}}}}}",
            True,
            "the same base",
        )
    if kind == 3:
        return f"{n}_{base}", rf"{n + 1}_{base}", False, "other digits"
    return (
        f"{n}",
        f"{n}"
        + rng.choice(
            (r"\ldots", r"\dots", "...") if not held else (r"\cdots", r",\ldots", "\u2026")
        ),
        False,
        "it goes on",
    )


SPACES = (r"\,", "\u202f", "\xa0", r"\ ", "{,}", ",")
HELD_SPACES = ("\u2009", r"\;", r"\:", "~", r"\thinspace ", " ")


@category
def thousands(rng: random.Random, held: bool) -> Made:
    n = rng.randint(1001, 10 ** rng.choice((5, 6, 8)))
    mark = rng.choice(HELD_SPACES if held else SPACES)
    kind = rng.randrange(3)
    if kind == 0:
        return f"{n}", _grouped(n, mark), True, "groups"
    if kind == 1:
        return f"{n}", _grouped(n + rng.choice((1, 1000, -1)), mark), False, "another number"
    head, _, tail = _grouped(n, " ").rpartition(" ")
    product = int(head.replace(" ", "")) * int(tail)
    return f"{product}", _grouped(n, mark), False, "no product of groups"


@category
def intervals(rng: random.Random, held: bool) -> Made:
    a = rng.randint(-9, 9)
    b = a + rng.randint(1, 9)
    left, right = rng.choice("(["), rng.choice(")]")
    low = "<" if left == "(" else rng.choice((r"\le ", r"\leq "))
    high = "<" if right == ")" else rng.choice((r"\le ", r"\leqslant " if held else r"\leq "))
    x = rng.choice("xtk" if held else "xy")
    kind = rng.randrange(6)
    if kind == 0:
        return f"{left}{a},{b}{right}", f"{a}{low}{x}{high}{b}", True, "an inequality"
    if kind == 1:
        return f"[{a},{b}{right}", f"{a}<{x}{high}{b}", False, "an open end"
    if kind == 2:
        gold = rf"{left}{a},\infty)"
        op = ">" if left == "(" else r"\ge "
        flipped = f"{a}<{x}" if left == "(" else rf"{a}\le {x}"
        return gold, rng.choice((f"{x}{op}{a}", flipped)), True, "a half line"
    if kind == 3:
        word = rng.choice(
            (r"\text{ or }", r"\lor ", r"\text{ or } ")
            if not held
            else (r",\ ", r"\ \text{or}\ ", r"\vee ")
        )
        if word == r",\ ":
            word = r"\text{ or }"
        return rf"(-\infty,{a})\cup({b},\infty)", f"{x}<{a}{word}{x}>{b}", True, "two half lines"
    if kind == 4:
        return (
            rf"({a},{b})",
            rf"{x}\in ({a},{b})" if not held else rf"{b}>{x}>{a}",
            True,
            "membership, or the other way",
        )
    return rf"[{a},\infty)", rf"{x}\ge {b}", False, "another end"


FULL = str.maketrans(
    {str(d): chr(0xFF10 + d) for d in range(10)} | {"-": "\uff0d", "+": "\uff0b", "/": "\uff0f"}
)
BOLD = str.maketrans({str(d): chr(0x1D7CE + d) for d in range(10)})
SUPER = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
VULGAR = {"½": (1, 2), "¾": (3, 4), "⅓": (1, 3), "⅝": (5, 8), "⅔": (2, 3), "⅛": (1, 8)}


@category
def unicode_signs(rng: random.Random, held: bool) -> Made:
    n, r = rng.randint(2, 99), rng.choice((2, 3, 5, 7, 11))
    off = rng.random() < 0.3
    kind = rng.randrange(6)
    if kind == 0:
        return (
            f"{-n + off}",
            f"{-n}".translate(BOLD if held else FULL),
            not off,
            "digits of another width",
        )
    if kind == 1:
        sign, (top, bottom) = rng.choice(list(VULGAR.items()))
        whole = rng.choice(("", str(n))) if held else ""
        value = Fraction(top, bottom) + (n if whole else 0) + off
        return _fraction(value), whole + sign, not off, "a vulgar fraction"
    if kind == 2:
        root = (
            rng.choice(("{n}√{r}", "{n}√({r})"))
            if not held
            else rng.choice(("{n}·√{r}", "√{r} · {n}"))
        )
        return rf"{n + off}\sqrt{{{r}}}", root.format(n=n, r=r), not off, "a root sign"
    if kind == 3:
        return f"{n**2 + off}", f"{n}²", not off, "a superscript"
    if kind == 4:
        if held:
            return (
                rf"x^{{{r}}}+{n + off}",
                "x" + str(r).translate(SUPER) + f" + {n}",
                not off,
                "a superscript",
            )
        return rf"x\ne {n + off}", f"x≠{n}", not off, "not equal"
    sign = rng.choice("\u2212\u2013" if not held else "\uff0d\u2212")
    return f"{-n + off}", f"{sign}{n}", not off, "a minus sign"


@category
def repeating(rng: random.Random, held: bool) -> Made:
    block = "".join(rng.choices("123456789", k=rng.choice((1, 2, 3))))
    before = "".join(rng.choices("123456789", k=rng.choice((0, 1))))
    if set(block) == {"9"}:
        block = "45"
    value = Fraction(int(before or 0), 10 ** len(before))
    value += Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(before))
    bar = rng.choice(
        (r"0.{}\overline{{{}}}", r"0.{}\overline{{{}}}" if not held else r"0.{}\bar{{{}}}")
    )
    if held and len(block) == 1:
        bar = r"0.{}\dot{{{}}}"
    text = bar.format(before, block)
    off = rng.random() < 0.35
    if rng.random() < 0.2:
        return _fraction(value), f"0.{before}{block}", False, "it does not end"
    if off:
        value += Fraction(1, 10)
    return (
        (text, _fraction(value), not off, "a repeating decimal")
        if rng.random() < 0.3
        else (_fraction(value), text, not off, "a repeating decimal")
    )


@category
def mixed_numbers(rng: random.Random, held: bool) -> Made:
    n, d = rng.randint(1, 30), rng.choice((3, 5, 6, 7) if held else (2, 4, 5, 8))
    top = rng.choice([t for t in range(1, d) if gcd(t, d) == 1])
    off = rng.random() < 0.3
    value = n + Fraction(top, d)
    shapes = (
        r"{n}\ {t}/{d}",
        "{n} {t}/{d}",
        r"{n}\frac{{{t}}}{{{d}}}",
        r"{n}\,\frac{{{t}}}{{{d}}}",
    )
    if held:
        shapes = (
            r"{n}\tfrac{{{t}}}{{{d}}}",
            r"{n}~\dfrac{{{t}}}{{{d}}}",
            r"{n}\text{{ }}\frac{{{t}}}{{{d}}}",
            "{n}\xa0{t}/{d}",
        )
    sign = rng.choice(("", "-"))
    answer = sign + rng.choice(shapes).format(n=n, t=top, d=d)
    value = -value if sign else value
    if rng.random() < 0.25:
        return (
            _fraction((sign and -Fraction(n * top, d)) or Fraction(n * top, d)),
            answer,
            False,
            "no product",
        )
    return _fraction(value + off), answer, not off, "a mixed number"


SAME = [(r"\{\}", r"\varnothing"), (r"\emptyset", r"\varnothing"), (r"\phi", r"\varphi"), (r"\mathbb{R}", r"\mathbf{R}"),
        (r"\ln 2", r"\log_e 2"), (r"\ln 5", r"\log_{e} 5"), (r"x\le 3", r"x\leqslant 3"), (r"x\ne 0", r"x\neq 0")]  # fmt: skip
HELD_SAME = [(r"\varnothing", r"\{ \}"), (r"\epsilon", r"\varepsilon"), (r"\mathbb{Z}", "\u2124"), (r"\theta", r"\vartheta"),
             (r"x\ge 3", r"x\geqslant 3"), (r"\frac{x}{2}", r"x\div 2"), (r"2\pi r", r"2\cdot\pi\cdot r"), (r"\sqrt{2}", r"\surd 2")]  # fmt: skip
OTHER = [
    (r"\phi", r"\psi"),
    (r"\mathbb{R}", r"\mathbb{Z}"),
    (r"\emptyset", "0"),
    (r"\ln 2", r"\log_{10} 2"),
    (r"\alpha", "a"),
]
HELD_OTHER = [
    (r"\mathbb{Q}", r"\mathbb{R}"),
    (r"\epsilon", r"\eta"),
    (r"\{0\}", r"\varnothing"),
    (r"\log_2 3", r"\log_3 2"),
    (r"\beta", "B"),
]


@category
def names(rng: random.Random, held: bool) -> Made:
    if rng.random() < 0.6:
        gold, answer = rng.choice(HELD_SAME if held else SAME)
        return (
            (gold, answer, True, "two names")
            if rng.random() < 0.5
            else (answer, gold, True, "two names")
        )
    gold, answer = rng.choice(HELD_OTHER if held else OTHER)
    return gold, answer, False, "two symbols"


@category
def equations(rng: random.Random, held: bool) -> Made:
    n = rng.randint(2, 99)
    x = rng.choice("abnkm" if held else "xyz")
    shapes = [(f"{n}", f"{n}={x}", True), (f"{n}", f"{x}={n}", True), (f"{x}={n}", f"{n}={x}", True), (f"{n}", f"{n + 1}={x}", False),
              (f"{x}={n}", f"q={n}", False), (f"{n}", f"{x}={n - 1}={n}", False), (f"f(x)={n}x", f"{n}x", True)]  # fmt: skip
    if held:
        shapes = [(f"y={n}x+1", f"{n}x+1", True), (f"y={n}x+1", f"{n}x+1=y", True), (f"{n}", f"{x}+p={n}", True), (f"{n}", f"{n}={n + 1}", False),
                  (f"f(x)={n}x", f"g(x)={n}x", False), (f"{n}", rf"\text{{Area}}={n}", True), (f"x+y={n}", f"y+x={n}", True)]  # fmt: skip
    return *rng.choice(shapes), "sides"


@category
def choices(rng: random.Random, held: bool) -> Made:
    letter, other = rng.sample("ABCDE", 2)
    n = rng.randint(10, 99)
    shapes = [(rf"\textbf{{({letter})}}\ {n}", True), (rf"\text{{({letter}) }}{n}", True), (f"({letter})", True), (rf"\text{{({letter})}}", True),
              (rf"\textbf{{({other})}}\ {n}", False), (f"({letter}), ({other})", False), (f"{letter}{other}", False), (letter.lower(), False)]  # fmt: skip
    if held:
        shapes = [(rf"\textbf{{({letter}) }}{n}", True), (rf"\mathrm{{({letter})}}\ \frac{{{n}}}{{7}}", True), (f"({letter}) {n}", True), (f"{letter}.", True),
                  (rf"\text{{({letter}) or ({other})}}", False), (rf"\text{{not }}{letter}", False), (rf"\textbf{{({other}) }}{n}", False), (f"{letter}_1", False)]  # fmt: skip
    return letter, *rng.choice(shapes), "a choice"


@category
def words_around(rng: random.Random, held: bool) -> Made:
    n = rng.randint(2, 99)
    day, wrong = rng.sample(("Friday", "Monday", "Tuesday", "Sunday", "Thursday"), 2)
    shapes = [(f"{n}", rf"\text{{The result is }}{n}", True), (f"{n}", rf"\text{{The answer is }}{n}.", True), (rf"\text{{{day}}}", rf"\text{{{day}.}}", True),
              (f"{n}", rf"\text{{The answer is not }}{n}", False), (f"{n}", rf"\text{{more than }}{n}", False), (rf"\text{{{day}}}", rf"\text{{{wrong}.}}", False)]  # fmt: skip
    if held:
        shapes = [(f"{n}", rf"\text{{The final answer is }}{n}", True), (f"{n}", rf"\text{{Answer: }}{n}", True), (day, rf"\textbf{{{day}}}.", True),
                  (f"{n}", rf"\text{{about }}{n}", False), (f"{n}", rf"\text{{less than }} {n}", False), (rf"\text{{{day}}}", rf"\text{{not {day}}}", False)]  # fmt: skip
    return *rng.choice(shapes), "words around"


@category
def boxes(rng: random.Random, held: bool) -> Made:
    a, b, c = rng.sample(range(2, 60), 3)
    shapes = [(f"{a}", rf"so $\fbox{{{a}}}$", True), (f"{a}", rf"so $\boxed {a}$.", True), (f"({a},{b}),({c},1)", rf"So $\boxed{{({a},{b})}}$ and $\boxed{{({c},1)}}$.", True),
              (f"k={a}, n={b}", rf"We get $\boxed{{k={a}}}$ and $\boxed{{n={b}}}$.", True), (f"{b}", rf"$\boxed{{{a}}}$ or $\boxed{{{b}}}$", False),
              (f"{a}", rf"$\boxed{{{a}}}$ was wrong, so $\boxed{{{b}}}$", False), (f"{a},{b}", rf"First \boxed{{{a}}}. Then, no: \boxed{{{b}}}", False)]  # fmt: skip
    if held:
        shapes = [(f"-{a}", rf"thus \boxed -{a}$", True), (rf"\frac{{{a}}}{{61}}", rf"$\boxed\frac{{{a}}}{{61}}$", True), (f"{a},{b},{c}", rf"$\boxed{{{a}}}$, $\boxed{{{b}}}$, and $\boxed{{{c}}}$", True),
                  (f"{a}, {b}", rf"$x=\boxed{{{a}}}$ or $x=\boxed{{{b}}}$", True), (f"{a}", rf"\fbox{{{b}}}", False), (f"{a},{b}", rf"$\boxed{{{a}}}$, $\boxed{{{b}}}$, $\boxed{{{c}}}$", False),
                  (f"{a}", rf"\boxed{{{a}}} and \boxed{{{b}}}", False)]  # fmt: skip
    return *rng.choice(shapes), "boxes"


@category
def powers(rng: random.Random, held: bool) -> Made:
    n, e = rng.choice((2, 3, 5, 6, 7)), rng.randint(19, 30)
    lead = rng.randint(101, 999)
    if lead % 10 == 0:
        lead += 1
    mantissa = f"{lead // 100}.{lead % 100:02}"
    shapes = [(rf"3\sqrt{{{n}}}", rf"3\cdot {n}^{{0.5}}", True), (rf"\sqrt{{{n}}}", f"{n}^{{0.5}}", True), (rf"{mantissa}\times 10^{{{e}}}", f"{lead}" + "0" * (e - 2), True),
              (rf"{mantissa}\times 10^{{{e}}}", f"{lead}" + "0" * (e - 3), False), (f"{lead * 100}", f"{mantissa}e4", True), (f"{lead * 100}", f"{mantissa}e5", False),
              (rf"\sqrt{{{n}}}", f"{n}^{{0.4}}", False)]  # fmt: skip
    if held:
        shapes = [(rf"\sqrt[4]{{{n}}}", f"{n}^{{0.25}}", True), (rf"{n}\sqrt{{{n}}}", f"{n}^{{1.5}}", True), (f"{lead}" + "0" * (e - 2), rf"{mantissa}\cdot 10^{{{e}}}", True),
                  (f"0.00{lead}", f"{mantissa}E-3", True), (f"0.00{lead}", rf"{mantissa}\times 10^{{-4}}", False), (f"{lead}" + "0" * (e - 2), rf"{lead}\times 10^{{{e - 2}}}", True),
                  (rf"\sqrt[3]{{{n}}}", f"{n}^{{0.333}}", False)]  # fmt: skip
    return *rng.choice(shapes), "powers"


@category
def complex_numbers(rng: random.Random, held: bool) -> Made:
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    shapes = [("i", r"e^{i\pi/2}", True), ("-1", r"e^{i\pi}", True), (f"{a}+{b}i", f"{b}i+{a}", True), (f"{a}+{b}i", f"{a}-{b}i", False),
              (f"{-(b**2)}", f"({b}i)^2", True), ("i", "-i", False), (f"{b}i", rf"\sqrt{{-{b**2}}}", True), (f"{a}+{b}i", f"{a}+{b}", False)]  # fmt: skip
    if held:
        shapes = [("-i", r"e^{3i\pi/2}", True), ("1", r"e^{2\pi i}", True), (f"{a * a + b * b}", f"({a}+{b}i)({a}-{b}i)", True), (f"{a}-{b}i", rf"{a}-{b}\mathrm{{i}}", True),
                  ("i", r"\frac{1}{i}", False), ("-i", r"\frac{1}{i}", True), (f"{a}i", f"{a}", False), (rf"{a}+\sqrt{{2}}i", rf"{a}+i\sqrt{{2}}", True)]  # fmt: skip
    return *rng.choice(shapes), "complex numbers"


@category
def unit_fractions(rng: random.Random, held: bool) -> Made:
    n = rng.randint(2, 99)
    top, bottom = rng.choice(
        (("miles", "hour"), ("g", "mL"), ("dollars", "hour"))
        if held
        else (("m", "s"), ("km", "h"), ("kg", "m"))
    )
    gold = rng.choice((f"{n}", rf"{n}\text{{ {top}/{bottom}}}"))
    shapes = [
        (rf"{n}\ \frac{{\text{{{top}}}}}{{\text{{{bottom}}}}}", True),
        (rf"{n}\text{{ {top}/{bottom}}}", True),
        (rf"{n + 1}\,\frac{{\text{{{top}}}}}{{\text{{{bottom}}}}}", False),
    ]
    if held:
        shapes = [
            (rf"{n}\text{{ {top} per {bottom}}}", True),
            (rf"{n}\,\mathrm{{{top}/{bottom}}}", True),
            (rf"{n}\text{{ {top}}}/\text{{{bottom}}}", True),
            (rf"{n + 2}\text{{ {top}/{bottom}}}", False),
        ]
    if gold != f"{n}":
        shapes.append((rf"{n}\text{{ {top}}}", False))
        shapes.append((rf"{n}\text{{ {bottom}/{top}}}", False))
    return gold, *rng.choice(shapes), "rates"


@category
def matrices(rng: random.Random, held: bool) -> Made:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))
    kind = rng.choice(("pmatrix", "bmatrix"))
    gold = rf"\begin{{pmatrix}}{a}&{b}\\{c}&{d}\end{{pmatrix}}"
    row = rng.choice(
        (r"\\[2pt]", r"\\ ", r"\\") if not held else (r"\\[0.5em] ", r"\\[-3mm]", r"\\ ")
    )
    same = rf"\begin{{{kind}}} {a} & {b} {row} {c} & {d} \end{{{kind}}}"
    pick = rng.randrange(4)
    if pick < 2:
        return gold, same, True, "spelling of rows"
    if pick == 2:
        return gold, same.replace(f" {d} ", f" {d + 1} "), False, "another entry"
    column = rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}"
    if a != b and rng.random() < 0.5:
        return column, rf"\begin{{pmatrix}}{b}{row}{a}\end{{pmatrix}}", False, "order"
    return column, rf"\begin{{pmatrix}} {a}{row} {b} \end{{pmatrix}}", True, "spelling of rows"


@category
def sound_golds(rng: random.Random, held: bool) -> Made:
    n, d = rng.randint(2, 40), rng.choice((3, 7, 9))
    top = rng.randint(1, d - 1)
    part = Fraction(n * d + top, d)
    k, m = rng.sample("kmn", 2)
    shapes = [(rf"{n}\frac{{{top}}}{{{d}}}\%", rf"{_fraction(part)}\%", True), (rf"\{{x \mid x\le {n}\}}", rf"(-\infty,{n}]", True),
              (rf"x=\frac{{\pi}}{{{d}}}+2{k}\pi,\ {k}\in\mathbb{{Z}}", rf"x=\frac{{\pi}}{{{d}}}+2{m}\pi,\ {m}\in\mathbb{{Z}}", True),
              (rf"x=\frac{{\pi}}{{{d}}}+2{k}\pi,\ {k}\in\mathbb{{Z}}", rf"x=\frac{{\pi}}{{{d + 1}}}+2{m}\pi,\ {m}\in\mathbb{{Z}}", False), (rf"\{{x \mid x\le {n}\}}", rf"(-\infty,{n})", False)]  # fmt: skip
    if held:
        shapes = [(rf"\{{x : x > {n}\}}", rf"({n},\infty)", True), (rf"\{{x\in\mathbb{{R}} \mid x\ge {n}\}}", rf"[{n},\infty)", True), (rf"{n}\frac{{{top}}}{{{d}}}\%", rf"{n}\%", False),
                  (rf"{n}{k}\pi,\ {k}\in\mathbb{{Z}}", rf"{n}{m}\pi, {m}\in\mathbb{{Z}}", True), (rf"{n}{k}\pi,\ {k}\in\mathbb{{Z}}", rf"{n + 1}{m}\pi, {m}\in\mathbb{{Z}}", False)]  # fmt: skip
    return *rng.choice(shapes), "sound golds"


@category
def money_and_percent(rng: random.Random, held: bool) -> Made:
    n, cents = rng.randint(1, 99), rng.choice(("25", "50", "99", "05"))
    value = f"{n},{rng.randint(100, 999)}.{cents}"
    plain = value.replace(",", "")
    shapes = [(plain, f"{value} €", True), (plain, rf"\${value}", True), (rf"{n}\%", rf"{n}\text{{ percent}}", True), (rf"\${n}", rf"{n}\text{{ cents}}", False),
              (rf"\${n}.{cents}", rf"{n}{cents}\text{{ cents}}", True), (f"x\\ge {n}", f"x >= {n}", True), (rf"{n}\%", rf"{n + 1}\%", False), (f"0.0{n % 9 + 1}", rf"{n % 9 + 1}\%", True)]  # fmt: skip
    if held:
        shapes = [(plain, f"€{value}", True), (plain, f"£{value}", True), (rf"{n}\%", rf"{n} \text{{ per cent}}", True), (rf"\${n}", f"€{n}", False),
                  (rf"{n}\text{{ cents}}", rf"{n}¢", True), (f"x\\le {n}", f"x <= {n}", True), (rf"{n}\%", rf"{n}\text{{ percentage points}}", False), (rf"\${n}", rf"{n}\text{{ dollars}}", True)]  # fmt: skip
    return *rng.choice(shapes), "money and percent"


@category
def tuples_and_sets(rng: random.Random, held: bool) -> Made:
    a, b, c = sorted(rng.sample(range(1, 40), 3))
    shapes = [(f"({a},{b})", rf"\{{{a},{b}\}}", False), (rf"\{{{a},{b}\}}", rf"\{{{b},{a}\}}", True), (f"({a},{b})", f"({b},{a})", False), (f"{a},{b}", rf"{b}\text{{ and }}{a}", True),
              (f"({a},{b})", f"[{a},{b}]", False), (f"{a},{b}", rf"{a}\text{{ or }}{b}", True), (f"{a},{b}", f"{a}", False), (f"{a}", f"{a},{b}", False),
              (rf"{c}\pm\sqrt{{{b}}}", rf"{c}+\sqrt{{{b}}},\ {c}-\sqrt{{{b}}}", True)]  # fmt: skip
    if held:
        shapes = [(rf"\{{{a},{b}\}}", f"({a},{b})", False), (rf"\{{{a},{b},{c}\}}", rf"\{{{c},{a},{b}\}}", True), (f"({a},{b},{c})", rf"\left({a}, {b}, {c}\right)", True), (f"({a},{b},{c})", f"({a},{c},{b})", False),
                  (f"({a},{b}),({c},1)", f"({c},1),({a},{b})", True), (f"({a},{b}),({c},1)", f"({b},{a}),({c},1)", False), (f"{a},{b}", f"{a};{b}", True), (rf"\pm {a}", rf"{a},-{a}", True),
                  (rf"\{{{a},{b}\}}", rf"\{{{a},{b},{c}\}}", False), (rf"\pm {a}", f"{a}", False)]  # fmt: skip
    return *rng.choice(shapes), "order and kind"


@category
def letters(rng: random.Random, held: bool) -> Made:
    low, n = rng.choice("abdfgmpqr"), rng.randint(2, 9)
    up = low.upper()
    shapes = [
        (r"\text{E}", "e", False),
        (low, up, False),
        (f"{up}+{n}", f"{low}+{n}", False),
        (f"{n}{up}", f"{n}{low}", False),
        (f"{up}{low}", f"{low}{up}", True),
        (up, rf"\text{{{up}}}", True),
    ]
    if held:
        shapes = [(f"{up}^2", f"{low}^2", False), (rf"\frac{{{up}}}{{{n}}}", rf"\frac{{{low}}}{{{n}}}", False), (f"{up}-{low}", f"{low}-{up}", False), (f"{n}{low}", rf"{low}\cdot {n}", True),
                  (rf"{low}'", low, False), (f"{low}_1", f"{low}_2", False), (f"{low}_1", f"{low}_{{1}}", True)]  # fmt: skip
    return *rng.choice(shapes), "letters"


@category
def expressions(rng: random.Random, held: bool) -> Made:
    p, q, r = (rng.choice([v for v in range(-9, 10) if v]) for _ in range(3))
    off = rng.random() < 0.4
    x = rng.choice("ntu" if held else "xy")
    if held:
        gold = f"({x}{p:+})({x}{q:+})({x}{r:+})".replace("++", "+")
        s, t, u = p + q + r, p * q + p * r + q * r, p * q * r
        answer = f"{x}^3{s:+}{x}^2{t:+}{x}{u + off:+}"
        return gold, answer, not off, "a product"
    shapes = [(f"({x}{p:+})({x}{q:+})", f"{x}^2{p + q:+}{x}{p * q + off:+}"), (f"{p}({x}{q:+})", f"{p}{x}{p * q + off:+}"),
              (rf"\frac{{{x}^2-{q * q}}}{{{x}-{abs(q)}}}", f"{x}+{abs(q) + off}"), (f"{x}^2+{abs(p)}{x}+C", f"{abs(p) + off}{x}+{x}^{{2}}+C")]  # fmt: skip
    gold, answer = rng.choice(shapes)
    return gold, answer, not off, "algebra"


@category
def words(rng: random.Random, held: bool) -> Made:
    yes, no = rng.sample(("yes", "no", "true", "false", "odd", "even"), 2)
    shapes = [(rf"\text{{{yes}}}", yes.title(), True), (yes, rf"\text{{{yes.title()}}}.", True), (rf"\text{{{yes}}}", rf"\text{{{no}}}", False), (r"\text{no solution}", r"\text{No solution}", True),
              (r"\text{no solution}", r"\varnothing", True), (r"\infty", r"-\infty", False), (r"\text{red}", r"\text{red or blue}", False)]  # fmt: skip
    if held:
        shapes = [(yes, rf"\mathrm{{{yes}}}", True), (rf"\text{{{yes}}}", rf"\text{{{yes} and {no}}}", False), (r"\infty", r"+\infty", True), (r"\infty", "\u221e", True),
                  (r"\text{parabola}", r"\textbf{Parabola}", True), (r"\text{isosceles}", r"\text{not isosceles}", False), (r"\text{undefined}", "0", False)]  # fmt: skip
    return *rng.choice(shapes), "words"


@category
def plain(rng: random.Random, held: bool) -> Made:
    """Ordinary answers, as most are."""
    a, b = rng.randint(2, 40), rng.randint(3, 40)
    r = rng.choice((2, 3, 5, 7))
    value = Fraction(a, b)
    off = rng.random() < 0.4
    shapes = [(_fraction(value), rf"\dfrac{{{a * 3}}}{{{b * 3 + off}}}"), (f"{a}", f"{a + off}"), (rf"{a}\sqrt{{{r}}}", rf"\sqrt{{{a * a * r + off}}}"), (rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a + off}}}{{{b}}}\pi"),
              (f"{a}^{{{b}}}", f"{a**b + off}"), (f"{a * b}", rf"{a}\cdot {b}" + "+1" * off)]  # fmt: skip
    if held:
        shapes = [(f"{value}", rf"\frac{{{2 * a}}}{{{2 * b + off}}}"), (rf"\frac{{{a}}}{{\sqrt{{{r}}}}}", rf"\frac{{{a + off}\sqrt{{{r}}}}}{{{r}}}"), (f"{a * b}", rf"{a} \times {b + off}"), (rf"{a}-\sqrt{{{r}}}", rf"-\sqrt{{{r}}}+{a + off}"),
                  (rf"\log_{{{r}}} {r**a}", f"{a + off}"), (f"-{a}", f"{-a - off}")]  # fmt: skip
    return *rng.choice(shapes), not off, "a value"
