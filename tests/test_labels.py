"""Weights: what stored files call them, and what tables do."""

import pytest

from intfast.labels import Weights, in_order, label


@pytest.mark.parametrize(
    ("key", "weights", "text"),
    [
        ("base", Weights("base"), "base"),
        ("base_rl", Weights("base", rl=True), "RL"),
        ("int", Weights("int"), "InT"),
        ("int_rl@20", Weights("int", rl=True, step=20), "InT + RL, step 20"),
        ("rft_rl", Weights("rft", rl=True), "SFT on right attempts (RFT) + RL"),
        ("evaluate", Weights("evaluate"), "evaluate"),
    ],
)
def test_a_key_is_read_printed_and_labelled(key, weights, text):
    assert Weights.parse(key) == weights
    assert weights.key == key and weights.label == label(key) == text
    assert weights._replace(step=None).key == weights.stage == key.partition("@")[0]


def test_weights_sort_as_the_tables_do():
    keys = ["int_rl@20", "int", "new", "int_rl@3", "star", "int_rl", "base_rl", "base"]
    expected = ["base", "base_rl", "star", "int", "int_rl", "int_rl@3", "int_rl@20", "new"]
    assert in_order(keys) == expected
