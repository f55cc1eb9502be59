"""Pieces of text per token, and the choice of examples; the log-probs are in test_learn.py."""

import pytest

from benchmarks.quickstart_task import task
from intfast.study.analysis import pieces, spread
from intfast.tokens import decode

TEXTS = [
    "First, x = 1.\n\nThen y = 2.",
    "naïve 数 \U0001f600 step\n\n🇩🇪 flags",
    "数\U0001f600",
    " leading",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(bpe, text):
    ids = bpe.encode(text, add_special_tokens=False)
    found = pieces(bpe, ids)
    assert len(found) == len(ids) and "".join(found) == decode(bpe, ids) == text


def test_a_character_of_several_tokens_is_with_its_last_one(bpe):
    ids = bpe.encode("\U0001f680", add_special_tokens=False)
    assert len(ids) > 1
    assert pieces(bpe, ids) == [""] * (len(ids) - 1) + ["\U0001f680"]


def test_half_a_character_at_the_end_is_shown_as_such(bpe):
    ids = bpe.encode("a\U0001f680", add_special_tokens=False)[:-1]
    assert "".join(pieces(bpe, ids)) == decode(bpe, ids)
    assert pieces(bpe, ids)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_spaces_that_the_tokenizer_adds_are_in_the_pieces():
    tokenizer = task.build_tokenizer()
    ids = tokenizer.encode("m 15 ; l 1", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)
    assert pieces(tokenizer, ids)[1] == " 15"


def test_examples_are_spread_over_all():
    assert spread(5, 2) == [0, 2]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(1000, 4) == [0, 250, 500, 750]
    assert spread(4, 0) == spread(0, 4) == []
