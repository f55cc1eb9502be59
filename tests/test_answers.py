import time

import pytest

from intfast.grading.answers import (
    compare_quickly,
    extract,
    is_explosive,
    is_marker,
    last_boxed,
)
from intfast.grading.reasons import Reason, Status


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{5}, then \boxed{6}", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\begin{matrix}1\\2\\\end{matrix}}", r"\begin{matrix}1\\2\\\end{matrix}"),
        (r"\boxed {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ \boxed{5} and \boxed{6", "5"),
        (r"} \boxed{5} \boxed{}", "5"),
        (r"\boxed{12", None),
        (r"\boxed{}", None),
        ("boxed{5}", None),
        ("", None),
        ("Answer: 12", "12"),
        ("Answer: 1\nwait\n**Answer:** 12 \nbye", "12"),
        ("Answer: 12, so \\boxed{13}", "13"),
        ("Answer:", None),
        ("**Answer**: 12", "12"),
        ("Answer: **12**.", "12"),
        ('The answer: "12."', "12"),
        ("So the answer: $12$. ", "$12$"),
        ("Answer: .5", ".5"),
        (r"Answer: \left\{ x \right.", r"\left\{ x \right."),
        ("Answer: ...", None),
        ("the answer is 12", None),
    ],
)
def test_extract_boxed(text, answer):
    assert extract(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is 12", "12"),
        ("So the answer is 12. Noah has 13 left.\nBye", "12"),
        ("The answer is: **12**.", "12"),
        ("The answer is 12\nThe answer is\n13", "13"),
        ("Answer: 12\nThe answer is right.", "12"),
        ("The answer is 12, so \\boxed{13}", "13"),
        ("the answers are 12", None),
        ("an answer island", None),
    ],
)
def test_extract_stated(text, answer):
    assert extract(text, "stated") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("d 7 # 3 ; ans d 4  c 5", "d 4 c 5"),
        ("ans 1 ans\n2", "2"),
        ("answer 1", None),
        ("1 ans", None),
        ("", None),
    ],
)
def test_extract_tail(text, answer):
    assert extract(text, "tail:ans") == answer


def test_extraction_is_linear_on_hostile_text():
    start = time.monotonic()
    million = 1_000_000
    for piece in (
        "\\",
        "{",
        "}",
        "\\boxed{",
        "answer:",
        "\\boxed{}",
        "\\boxed ",
        " ",
        "\n",
        "answer ",
    ):
        extract(piece * (million // len(piece)), "boxed")
    assert time.monotonic() - start < 30


def test_ordinary_powers_are_not_explosive():
    for text in (
        r"2^{2^{5}}",
        "x^2y^2z^2",
        "x^{2^n}",
        "5!+4!",
        "n!!",
        "1000!",
        "10^{10}",
        "e^{x^2}",
    ):
        assert not is_explosive(text), text


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("18", "18 books", Reason.CORRECT),
        ("18", "18 more books", Reason.CORRECT),
        ("18", "18 months", Reason.CORRECT),
        ("1800", "1,800 marbles.", Reason.CORRECT),
        ("18", "17 books", Reason.WRONG),
        ("18", "$18", Reason.CORRECT),
        ("18", "$18.00", Reason.CORRECT),
        ("18", "$17", Reason.WRONG),
        ("18", "$18$", Reason.CORRECT),
        # What follows the number changes it, or is another answer.
        ("18", "18 hundred", Reason.LEFTOVER),
        ("18", "18 or 19", Reason.WRONG),
        ("18", "18 books or cards", Reason.WRONG),
        ("18", "18 squared", Reason.LEFTOVER),
        ("18", "18 x", None),
        ("18", "books 18", None),
        ("18", "$18 and $19", Reason.WRONG),
    ],
)
def test_a_number_is_read_beside_what_it_counts(gold, answer, reason):
    assert compare_quickly(gold, answer) is reason


def test_reason_decides_the_status():
    unscored = {reason.value for reason in Reason if reason.status is Status.UNSCORED}
    function = {"raised", "wrong_type", "not_finite", "out_of_range", "no_reward", "forbidden"}
    assert unscored == {"timeout", "crash", "gold_unparseable", *function}
    assert [reason for reason in Reason if reason.status is Status.CORRECT] == ["correct"]


def test_last_boxed_ignores_escaped_braces_only():
    assert last_boxed(r"\boxed{a\}b}") == r"a\}b"
    assert last_boxed(r"\boxed{a\\}b}") == r"a\\"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\fbox{7}$.", "7"),
        (r"so $\framebox{7}$.", "7"),
        (r"so $\boxed 7$.", "7"),
        (r"$\boxed -12$", "-12"),
        (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed 1,234.5$", "1,234.5"),
        (r"\boxed x$", "x"),
        (r"\boxed{5} then \boxed the rest", "5"),
        (r"\boxed{(2,3)} and \boxed{(7,1)}", "(2,3), (7,1)"),
        (r"$\boxed{k=4}$ and $\boxed{n=9}$", "k=4, n=9"),
        (r"$x = \boxed{3}$ or $x = \boxed{4}$", "3, 4"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"$\boxed{5}$, $\boxed{5}$", "5"),
        # Rival guesses: the last one counts, or both stand for one answer.
        (r"\boxed{5}, no: \boxed{6}", "6"),
        (r"\boxed{5} or maybe \boxed{6}", "6"),
        (r"\boxed{5} or \boxed{6}", "5, 6"),
        (r"\boxed{5} \boxed{6}", "6"),
        (r"\boxed{4 \boxed{5}}", "5"),
    ],
)
def test_boxes_of_other_writers_and_boxes_that_are_a_list(text, answer):
    assert extract(text, "boxed") == answer


MARKERS = r"""
proof|see the proof|Proof.|\text{See figure}|see above.|N/A|NA|n.a.|?|???|...|-|QED|answers may vary
|graph|see Figure 2|not available|no answer|TBD|null|(see solution)|Left to the reader
|to be determined|left as exercise|various|$\blacksquare$|\boxed{}
"""


def test_a_gold_that_marks_that_there_is_none_is_told_from_an_answer():
    for gold in MARKERS.strip().replace("\n", "").split("|"):
        assert is_marker(gold), gold
    answers = "0|-1|x|none|no|no solution|undefined|True|DNE|Na|17.|...5|the figure 8 knot|7 proofs"
    for gold in answers.split("|"):
        assert not is_marker(gold), gold
