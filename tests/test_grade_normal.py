"""The tables that answers are read with: every row does what it says, in linear time."""

import re
import time
from fractions import Fraction

import pytest

from intfast.grading import units
from intfast.grading.answers import compare_quickly, extract, is_marker
from intfast.grading.normal import TABLE, normalise, number
from intfast.leak import leaks


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[2])
def test_every_row_of_the_table_makes_of_its_example_what_it_says(row):
    pattern, replacement, example, becomes = row
    assert re.sub(pattern, replacement, example) == becomes != example


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("\uff15", "5"),
        ("5\xb2", "5^{2}"),
        ("x\xb3\u2074", "x^{34}"),
        ("x\u2081\u2082", "x_{12}"),
        ("3\u221a5", r"3\sqrt{5}"),
        ("\u221a(x+1)", r"\sqrt{x+1}"),
        ("2\xbd", r"2\frac{1}{2}"),
        ("48\u202f600", "48,600"),
        (r"1\,234\;567", "1,234,567"),
        ("x\u22603", r"x\ne 3"),
        ("\U0001d7d5", "7"),
        ("17\u200b", "17\u200b"),
        (r"\text{ 5 cm}", r"5\text{cm}"),
        ("12 books", r"12\text{books}"),
        ("12 xy", "12 xy"),
        ("a \\cdot b", r"a\cdot b"),
        (r"\text{(D) }40", "(D)40"),
    ],
)
def test_one_spelling(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", Fraction(2469, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("0.(45)", Fraction(5, 11)),
        ("-2 1/3", Fraction(-7, 3)),
        (r"3\frac{1}{7}", Fraction(22, 7)),
        ("22/7", Fraction(22, 7)),
        ("2.5E3", Fraction(2500)),
        ("1/0", None),
        (r"2\frac{3}{2}", None),
        ("1,23", None),
        ("7" * 5000, None),
        (r"\frac{" + "1" * 5000 + "}{3}", None),
    ],
)
def test_numbers_are_exact_and_of_any_length(text, value):
    assert number(text) == value


def test_units_have_their_dimension_and_exact_factor():
    def ratio(one, two):
        found = units.parse(one), units.parse(two)
        assert found[0].powers == found[1].powers, (one, two)
        return found[0].factor / found[1].factor

    assert ratio("hours", "minutes") == 60
    assert ratio("kg", "g") == 1000
    assert ratio("km/h", "m/s") == Fraction(5, 18)
    assert ratio(r"\text{m}^2", "square cm") == 10_000
    assert ratio("L", "cubic centimeters") == 1000
    assert ratio("miles per hour", "mph") == 1
    assert ratio("Mg", "mg") == 10**9
    assert ratio("red apples", "apples") == 1
    for one, two in (
        ("kg", "m"),
        ("apples", "pears"),
        ("m", "m^2"),
        ("dollars", "euros"),
        ("pens per box", "caps per box"),
    ):
        assert units.parse(one).powers != units.parse(two).powers
    refused = (
        "million|dozen|or more|squared|factorial|is wrong|minus|thirds|apple|at most|each|square"
    )
    assert [word for word in refused.split("|") if units.parse(word)] == []
    assert units.parse("apple", is_one=True) is not None


SHAPES = (
    *(
        "\\",
        "{",
        "}",
        "(",
        "$",
        "^",
        " ",
        "\n",
        "~",
        "1",
        "a",
        "=",
        "%",
        "'",
        "\xbd",
        "\xb2",
        "\u221a",
    ),
    *(
        "\\boxed{",
        "\\boxed{1} and ",
        "\\boxed 1,",
        "\\text{",
        "\\frac{",
        "\\, ",
        "\\$1",
        "1,",
        "1 ",
    ),
    *(
        "111,",
        "1e",
        "1 aa ",
        "answer is ",
        "answer:",
        "\\times 10^",
        "\\overline{1}",
        "sqrt(",
        "\\\\[",
    ),
)


@pytest.mark.parametrize(
    "reader",
    [
        lambda text: extract(text, "stated"),
        lambda text: leaks(text, "12"),
        lambda text: leaks(text, r"\frac{1}{2}"),
        lambda text: compare_quickly("12", text),
        lambda text: compare_quickly(text, "12"),
        is_marker,
        number,
    ],
)
def test_hostile_texts_are_read_in_linear_time(reader):
    for shape in SHAPES:
        text = shape * (200_000 // len(shape))
        start = time.process_time()
        reader(text)
        assert time.process_time() - start < 0.4, shape


def test_the_longest_answers_are_taken_apart_in_no_time():
    for shape in SHAPES:
        text = shape * (300 // len(shape))
        start = time.process_time()
        compare_quickly("12", text)
        compare_quickly("(1,2)", text)
        assert time.process_time() - start < 0.1, shape
