"""Packing: the shift, the order, the counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from intfast.batch import pack, split
from intfast.config import BatchConfig
from intfast.records import Example


def example(token_ids, weights, **streams) -> Example:
    return Example(token_ids=list(token_ids), weights=list(weights), **streams)


def many(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 30, (count,), generator=generator).tolist()
    return [
        example(
            range(100 * i, 100 * i + n),
            [0.0] + [1.0 + i] * (n - 1),
            advantages=[float(i)] * n,
            sampler_logprobs=[-float(t) for t in range(n)],
        )
        for i, n in enumerate(lengths)
    ]


def test_shift_exhaustively_on_short_sequences():
    # Spec: token t (t >= 1) of weight w != 0 is predicted by the row that holds token t - 1.
    for length in range(1, 6):
        for mask in itertools.product((0.0, 2.0), repeat=length):
            tokens = list(range(10, 10 + length))
            trained = [t for t in range(1, length) if mask[t]]
            item = example(
                tokens,
                mask,
                advantages=[t + 0.5 for t in range(length)],
                sampler_logprobs=[-t - 0.25 for t in range(length)],
            )
            if not trained:
                with pytest.raises(ValueError, match="expected a token with a weight"):
                    pack([item], BatchConfig())
                continue
            (batch,) = pack([item], BatchConfig()).batches
            assert batch.token_ids_T.tolist() == tokens[: trained[-1]]
            assert batch.position_ids_T.tolist() == list(range(trained[-1]))
            assert batch.token_ids_T[batch.rows_N].tolist() == [tokens[t - 1] for t in trained]
            assert batch.target_N.tolist() == [tokens[t] for t in trained]
            assert batch.weight_N.tolist() == [2.0] * len(trained)
            assert batch.advantage_N.tolist() == [t + 0.5 for t in trained]
            assert batch.sampler_logprob_N.tolist() == [-t - 0.25 for t in trained]
            assert batch.sequence_N.tolist() == [0] * len(trained)


def test_first_fit_decreasing_by_hand():
    # rows = tokens - 1: 3, 6, 2, 5, 4 into bins of 8
    lengths = (4, 7, 3, 6, 5)
    items = [example(range(n), [0.0] + [1.0] * (n - 1)) for n in lengths]
    packed = pack(items, BatchConfig(max_tokens=8))
    assert [batch.examples_S for batch in packed.batches] == [(1, 2), (3, 0), (4,)]
    assert [batch.lengths for batch in packed.batches] == [(6, 2), (5, 3), (4,)]


def test_every_example_is_packed_once_and_whole():
    items = many(23)
    packed = pack(items, BatchConfig(max_tokens=37))
    seen = []
    for batch in packed.batches:
        assert sum(batch.lengths) == len(batch.token_ids_T) <= 37
        assert (batch.rows_N.diff() > 0).all()
        start = 0
        for sequence, (index, rows) in enumerate(zip(batch.examples_S, batch.lengths, strict=True)):
            tokens = items[index].token_ids
            own = batch.sequence_N == sequence
            assert batch.token_ids_T[start : start + rows].tolist() == tokens[:-1]
            assert batch.rows_N[own].tolist() == list(range(start, start + rows))
            assert batch.target_N[own].tolist() == tokens[1:]
            assert batch.sampler_logprob_N[own].tolist() == items[index].sampler_logprobs[1:]
            assert set(batch.advantage_N[own].tolist()) == {float(index)}
            seen.append(index)
            start += rows
    assert sorted(seen) == list(range(23))
    assert packed.num_sequences == 23
    assert packed.num_tokens == packed.num_loss_tokens == sum(len(i.token_ids) - 1 for i in items)
    assert packed.weight_sum == sum(sum(i.weights) for i in items)


def test_counts_span_all_batches_and_leave_out_weightless_examples():
    items = [
        example([1, 2, 3, 4], [0, 0, 0.5, 0]),
        example([1, 2], [1, 0]),
        example([5, 6, 7], [0, 0.25, 0.25]),
    ]
    packed = pack(items, BatchConfig(max_tokens=2))
    assert len(packed.batches) == 2
    assert (packed.num_tokens, packed.num_loss_tokens, packed.num_sequences) == (4, 3, 2)
    assert packed.weight_sum == 1.0
    assert sorted(i for batch in packed.batches for i in batch.examples_S) == [0, 2]


def test_packing_is_deterministic_and_independent_of_global_randomness():
    first = pack(many(15), BatchConfig(max_tokens=40))
    torch.manual_seed(99)
    again = pack(many(15), BatchConfig(max_tokens=40))
    for left, right in zip(first.batches, again.batches, strict=True):
        assert left.examples_S == right.examples_S
        assert torch.equal(left.token_ids_T, right.token_ids_T)


def test_sequence_above_the_budget():
    items = [example(range(9), [0.0] + [1.0] * 8), example(range(4), [0, 1, 1, 1])]
    with pytest.raises(ValueError, match=r"sequence of 8 tokens.*max_tokens=7.*too_long='alone'"):
        pack(items, BatchConfig(max_tokens=7))
    packed = pack(items, BatchConfig(max_tokens=7, too_long="alone"))
    assert [batch.examples_S for batch in packed.batches] == [(0,), (1,)]
    # What cannot reach the loss does not count against the budget.
    tail = example(range(50), [0, 1, 1] + [0.0] * 47)
    assert pack([tail], BatchConfig(max_tokens=2)).num_tokens == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0, 1]}, "expected one per token"),
        ({"weights": [0, 1, -1]}, "expected finite numbers >= 0"),
        ({"weights": [0, 1, math.nan]}, "expected finite numbers >= 0"),
        ({"advantages": [0, 0, math.inf]}, "got inf at token 2"),
        ({"sampler_logprobs": [0, math.nan, 0]}, "got nan at token 1"),
        ({"advantages": None}, "expected in all examples or in none"),
    ],
)
def test_faulty_streams_are_refused(change, message):
    good = {"advantages": [0, 1, 1], "sampler_logprobs": [0, -1, -1]}
    other = example([1, 2, 3], [0, 1, 1], **good)
    fields = {"weights": [0, 1, 1], **good, **change}
    faulty = Example(token_ids=[1, 2, 3], **fields)
    with pytest.raises(ValueError, match=message):
        pack([other, faulty], BatchConfig())


def test_nan_at_weightless_tokens_does_not_enter():
    item = example(
        [1, 2, 3, 4],
        [0, 0, 1, 0],
        advantages=[math.nan, math.nan, 0.5, math.nan],
        sampler_logprobs=[math.nan, math.nan, -0.5, math.inf],
    )
    (batch,) = pack([item], BatchConfig()).batches
    assert batch.advantage_N.tolist() == [0.5]
    assert batch.sampler_logprob_N.tolist() == [-0.5]


def test_to_moves_every_tensor():
    (batch,) = pack(many(2), BatchConfig()).batches
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(value.is_meta for value in tensors)
    assert moved.lengths == batch.lengths


def test_split_deals_each_example_once():
    items = many(11)
    parts = split(items, 3, seed=5)
    assert [len(part) for part in parts] == [4, 4, 3]
    firsts = sorted(item.token_ids[0] for part in parts for item in part)
    assert firsts == [100 * i for i in range(11)]
    assert split(items, 3, seed=5) == parts
    assert split(items, 3, seed=6) != parts
    assert split(items, 1, seed=5) == [items]
    with pytest.raises(ValueError, match=r"expected 1\.\.11"):
        split(items, 12, seed=0)
