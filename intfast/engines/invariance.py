"""The self-test of the engine: in which shapes does this library give a row the same bits?

For a model's own layer, head and attention, on this processor, with this number of threads: the
calls that `intfast/fixed.py` makes are compared bit for bit, row by row. What passes is used in
large calls; what does not is computed in calls of one shape. It takes less than a second, is done
once a process for each shape, and draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from intfast import fixed
from intfast.engines import cache
from intfast.fixed import BLOCK, Shapes
from intfast.model import Decoder, Linear, ModelConfig, PackedAttention

# Rows of one call of a product, where they pass and the test stays short; multiply-adds of a call.
LINEAR_ROWS, MOST_WORK = (512, 128, BLOCK), 4_000_000_000
ATTENTION_ROWS = (128, BLOCK)
# (slots summed at once, of what their number is a multiple): any width up to a chunk, or one.
CHUNKS = ((256, 16), (64, 64))
MANY = 1 << 30
HOLDS = "a sample's bits do not depend on its batch (tested here)"

_row_sizes: dict[tuple, tuple[int, ...]] = {}
_attention: dict[tuple, tuple[tuple[int, ...], int, int] | None] = {}


@torch.inference_mode()
def find(decoder: Decoder) -> Shapes:
    """The shapes for this decoder's engine; sets `row_sizes` of its linear layers."""
    head, config = decoder.head_weight_VD, decoder.config
    if head.is_cuda or head.dtype not in (torch.float32, torch.float64):
        why = "on a GPU" if head.is_cuda else f"in {head.dtype}".replace("torch.", "")
        return Shapes((), (), *CHUNKS[0], MANY, False, f"a sample's bits depend on its batch {why}")
    made = torch.Generator().manual_seed(0)
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.row_sizes = _linear(module.weight, module.bias, made)
    found = _slots(config, head.dtype, made)
    rows, chunk, slots = found or ((BLOCK,), *CHUNKS[-1])
    prompts = MANY if _prompts(config, head.dtype, made) else 1
    shapes = Shapes(rows, _linear(head, None, made), chunk, slots, prompts, True, HOLDS)
    if found and _layer(decoder, shapes, made):
        return shapes
    part = "a layer" if found else "attention"
    said = f"a sample's last bits may depend on its batch on this processor (seen in {part})"
    return shapes._replace(holds=False, said=said)


def _same(left: Tensor, right: Tensor) -> bool:
    # Weights may hold NaN; the engine reports that, not this test.
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _linear(weight: Tensor, bias: Tensor | None, made: torch.Generator) -> tuple[int, ...]:
    """Numbers of rows in which a product gives each row the bits that a block gives it."""
    key = (weight.shape, weight.dtype, bias is None, torch.get_num_threads())
    if key not in _row_sizes:
        sizes = [n for n in LINEAR_ROWS if n == BLOCK or n * weight.numel() <= MOST_WORK]
        x_TD = torch.randn(sizes[0], weight.shape[1], dtype=weight.dtype, generator=made)
        truth = fixed.linear(x_TD, weight, bias, (BLOCK,))
        equal = [n for n in sizes if _same(fixed.linear(x_TD[:n], weight, bias, (n,)), truth[:n])]
        _row_sizes[key] = tuple(equal)
    return _row_sizes[key]


def _slots(
    config: ModelConfig, dtype: torch.dtype, made: torch.Generator
) -> tuple[tuple[int, ...], int, int] | None:
    """(rows, chunk, slots) of `Shapes` in which attention gives the same bits; None for none."""
    heads, width = config.num_kv_heads, config.head_dim
    key = (heads, config.num_heads, width, dtype, torch.get_num_threads())
    if key not in _attention:
        group = config.num_heads // heads
        longest = 2 * CHUNKS[0][0] + BLOCK
        query = torch.randn(BLOCK * heads, group, width, dtype=dtype, generator=made)
        slots = torch.randn(BLOCK * heads, longest, width, dtype=dtype, generator=made)
        _attention[key] = next(
            (
                (tuple(n for n in ATTENTION_ROWS if passes(n, chunk, step)), chunk, step)
                for chunk, step in CHUNKS
                for passes in [_Passes(query, slots, heads)]
                if passes(BLOCK, chunk, step)
            ),
            None,
        )
    return _attention[key]


class _Passes:
    """Whether attention of so many rows gives each the bits that a block over more slots gives."""

    def __init__(self, query: Tensor, slots: Tensor, heads: int) -> None:
        self.query, self.slots, self.heads = query, slots, heads

    def __call__(self, rows: int, chunk: int, step: int) -> bool:
        widths = range(max(BLOCK, step), chunk + 1, step)
        longer = (*range(chunk + step, self.slots.shape[1], 5 * step),)
        times = rows // BLOCK
        slots = self.slots.repeat(times, 1, 1)
        query = self.query.repeat(times, 1, 1)
        return all(
            _same(
                self._of(query, slots, width, width, chunk),
                self._of(self.query, self.slots, width, 2 * chunk, chunk).repeat(times, 1, 1),
            )
            for width in (*widths, *longer)
        )

    def _of(self, query: Tensor, slots: Tensor, real: int, width: int, chunk: int) -> Tensor:
        width = max(real, width)
        mask = torch.zeros(len(query), 1, width, dtype=query.dtype)
        mask[..., real:] = -torch.inf
        part = slots[:, :width]
        return fixed.attention(query, part, part, mask, query.shape[-1] ** -0.5, chunk)


def _prompts(config: ModelConfig, dtype: torch.dtype, made: torch.Generator) -> bool:
    """Whether a prompt gets the same bits beside others, in attention."""
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return all(
        _same(PackedAttention([width] * 3)(0, *qkv, window)[:width], alone(0, *one, window))
        for width in (BLOCK, 7 * BLOCK)
        for window in {*config.windows}
        for alone in [PackedAttention([width])]
        for qkv in [
            [torch.randn(3 * width, n, config.head_dim, dtype=dtype, generator=made) for n in heads]
        ]
        for one in [[x[:width] for x in qkv]]
    )


def _layer(decoder: Decoder, shapes: Shapes, made: torch.Generator) -> bool:
    """Whether rows get the same bits in a step of many and, in another order, of a block."""
    config = msgspec.structs.replace(decoder.config, num_layers=1)
    dtype, num_rows = decoder.head_weight_VD.dtype, ATTENTION_ROWS[0] + BLOCK
    storage = torch.randn(
        num_rows * 2 * BLOCK * 2 * config.num_kv_heads * config.head_dim,
        dtype=dtype,
        generator=made,
    )
    x_TD = torch.randn(num_rows, config.hidden_size, dtype=dtype, generator=made)
    position_T = torch.randint(0, 2 * BLOCK, (num_rows,), generator=made)

    def run(rows: Tensor) -> Tensor:
        slots = cache.KVCache(config, num_rows, 2 * BLOCK, storage).slots[:, :, rows]
        kept = cache.KVCache(config, len(rows), 2 * BLOCK, slots.flatten())
        position = position_T[rows]
        step = cache.Step(kept, position, int(position.max()), shapes)
        rope = decoder._rope(position, dtype)
        out = decoder.model.layers[0](x_TD[rows], rope, step, None)
        return fixed.linear(decoder.model.norm(out), decoder.head_weight_VD, None, shapes.head)

    whole = run(torch.arange(num_rows))
    return all(
        _same(run(rows), whole[rows]) for rows in torch.arange(num_rows).flip(0).split(BLOCK)
    )
