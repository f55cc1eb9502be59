"""The choice of a tile with a timer that is not one: what is chosen, recorded and read back."""

import json
from dataclasses import replace

import pytest
import torch
from kernels_common import HAS_TRITON, inputs

from intfast.kernels.head.autotune import (
    MARGIN,
    ROUNDS,
    Shape,
    autotune,
    candidates,
    choose,
)
from intfast.kernels.head.tiles import ODDS_TILES

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
SHAPE = Shape(rows=4096, width=2560, vocabulary=151_936)


def timer(seconds, calls):
    def measure(tile):
        calls.append(tile)
        return seconds(tile)

    return measure


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", ["logprob", "entropy", "softcap"])
def test_candidates_start_with_the_table(arch, kind):
    tiles = candidates(arch, kind)
    assert tiles[0] == ODDS_TILES[arch][kind]
    assert len(tiles) == len(set(tiles)) >= 2


def test_the_table_wins_unless_another_is_clearly_faster():
    first, second, third = candidates(90, "logprob")[:3]
    near = 1 - MARGIN / 2
    assert choose([(first, 1.0), (second, near), (third, 2.0)]) == first
    assert choose([(first, 1.0), (second, 1 - 2 * MARGIN), (third, near)]) == second
    assert choose([(first, 1.0)]) == first


def test_a_choice_is_timed_once_and_read_from_then_on(tmp_path):
    file, calls = tmp_path / "tiles.json", []
    tiles = candidates(90, "logprob")
    fast = timer(lambda tile: 1e-3 * (0.5 if tile == tiles[1] else 1.0), calls)
    choice = autotune(SHAPE, file, device="cpu", measure=fast)
    assert choice.tile == tiles[1]
    # in turns: a round meets every candidate before the next one starts
    assert calls == tiles * ROUNDS
    assert json.loads(file.read_text())[choice.key] == choice.record()
    slow = timer(lambda tile: 1.0 if tile == tiles[1] else 1e-6, calls := [])
    assert autotune(SHAPE, file, device="cpu", measure=slow) == choice
    assert calls == []
    other = autotune(replace(SHAPE, rows=1024), file, device="cpu", measure=slow)
    assert other.tile != choice.tile and len(json.loads(file.read_text())) == 2
    assert autotune(SHAPE, file, device="cpu", measure=slow) == choice


def test_a_median_and_not_a_lucky_launch_decides(tmp_path):
    tiles, calls = candidates(90, "logprob"), []

    def seconds(tile):
        lucky = tile == tiles[1] and calls.count(tile) == 1
        return 1e-6 if lucky else 1e-3

    choice = autotune(SHAPE, tmp_path / "tiles.json", device="cpu", measure=timer(seconds, calls))
    assert choice.tile == tiles[0]


def test_nothing_is_timed_without_a_device_and_a_broken_file_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"):
        autotune(SHAPE, tmp_path / "tiles.json", device="cpu")
    file = tmp_path / "broken.json"
    for text in ("{", '{"a": 1}', "[]", '{"a": {"key": "a", "tile": {}, "seconds": []}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="recorded choices"):
            autotune(SHAPE, file, device="cpu", measure=lambda tile: 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's own tiles")
def test_the_choice_is_what_the_op_launches():
    from intfast.kernels.head.plan import Head, plan_head
    from intfast.kernels.head.tiles import INTERPRETER_TILE
    from intfast.kernels.linear_logprob import linear_logprob

    tile = replace(INTERPRETER_TILE, block_v=16)
    hidden, weight, target = inputs(5, 16, 40)
    options = {"path": "odds", "tile": tile}
    assert plan_head(hidden, weight, target, Head(**options)).tile == tile
    plain, _ = linear_logprob(hidden, weight, target, path="plain")
    torch.testing.assert_close(linear_logprob(hidden, weight, target, **options)[0], plain)
