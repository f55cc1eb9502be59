"""The self-test of the engine: in which shapes does this library give a row the same bits?

For a model's own layer, head and attention, on this processor, with this number of threads: the
calls that `model/fixed.py` makes are compared bit for bit, row by row. What passes is used in
large calls; what does not is computed in calls of one shape. It takes less than a second, is done
once a process for each shape, and draws from a generator of its own.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from intfast.engine import cache
from intfast.model import fixed
from intfast.model.decoder import Architecture, Decoder, Linear, PackedAttention
from intfast.model.fixed import BLOCK, Shapes

# Rows of one call of a product, where they pass and the test stays short; multiply-adds of a call.
SIZES, MOST_WORK = (512, 256, 128, 64, BLOCK), 4_000_000_000
# Bytes of keys in a call of attention in the test.
MOST_BYTES = 80 << 20
# (slots summed at once, of what their number is a multiple): any width up to a chunk, or one.
CHUNKS = ((256, 16), (64, 64))
MANY = 1 << 30
HOLDS = "a sample's bits do not depend on its batch (tested here)"

_row_sizes: dict[tuple, tuple[int, ...]] = {}
_attention: dict[tuple, tuple[tuple[int, ...], int, int]] = {}


@torch.inference_mode()
def find(decoder: Decoder) -> Shapes:
    """The shapes for this decoder's engine; sets `row_sizes` of its linear layers."""
    head, config = decoder.head_weight_VD, decoder.config
    if head.is_cuda or head.dtype not in (torch.float32, torch.float64):
        why = "on a GPU" if head.is_cuda else f"in {head.dtype}".replace("torch.", "")
        return Shapes((), (), *CHUNKS[0], MANY, False, f"a sample's bits depend on its batch {why}")
    made = torch.Generator().manual_seed(0)
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    for module in linears:
        module.row_sizes = _linear(module.weight, module.bias, made)
    head_sizes = _linear(head, None, made)
    rows, chunk, slots = _slots(config, head.dtype, made)
    prompts = MANY if _prompts(config, head.dtype, made) else 1
    shapes = Shapes(rows, head_sizes, chunk, slots, prompts, True, HOLDS)
    failed = {
        "a product": not all([head_sizes, *(module.row_sizes for module in linears)]),
        "attention": not rows,
        "a layer": not _layer(decoder, shapes, made),
    }
    if seen := [part for part, bad in failed.items() if bad]:
        said = f"a sample's last bits may depend on its batch on this processor (in {seen[0]})"
        return shapes._replace(holds=False, said=said)
    return shapes


def _same(left: Tensor, right: Tensor) -> bool:
    # Weights may hold NaN; the engine reports that, not this test.
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _linear(weight: Tensor, bias: Tensor | None, made: torch.Generator) -> tuple[int, ...]:
    """Numbers of rows in which a product gives each row the bits that a block gives it.

    Empty where a block itself treats its rows differently.
    """
    key = (weight.shape, weight.dtype, bias is None, torch.get_num_threads())
    if key not in _row_sizes:
        sizes = [n for n in SIZES if n == BLOCK or n * weight.numel() <= MOST_WORK]
        x_TD = torch.randn(sizes[0], weight.shape[1], dtype=weight.dtype, generator=made)
        truth = fixed.linear(x_TD, weight, bias, (BLOCK,))
        turned = fixed.linear(x_TD[:BLOCK].flip(0), weight, bias, (BLOCK,)).flip(0)
        equal = [n for n in sizes if _same(fixed.linear(x_TD[:n], weight, bias, (n,)), truth[:n])]
        _row_sizes[key] = tuple(equal) if _same(turned, truth[:BLOCK]) else ()
    return _row_sizes[key]


def _slots(
    config: Architecture, dtype: torch.dtype, made: torch.Generator
) -> tuple[tuple[int, ...], int, int]:
    """(rows, chunk, slots) of `Shapes` in which attention gives the same bits; no rows: in none."""
    heads, width = config.num_kv_heads, config.head_dim
    key = (heads, config.num_heads, width, dtype, torch.get_num_threads())
    if key not in _attention:
        longest = 2 * CHUNKS[0][0] + BLOCK
        query = torch.randn(
            BLOCK * heads, config.num_heads // heads, width, dtype=dtype, generator=made
        )
        slots = torch.randn(BLOCK * heads, longest, width, dtype=dtype, generator=made)
        sizes = [n for n in SIZES if n == BLOCK or n // BLOCK * slots.nbytes <= MOST_BYTES]
        for chunk, step in CHUNKS:
            rows = _attention_rows(query, slots, sizes, chunk, step)
            _attention[key] = rows, chunk, step
            if rows:
                break
    return _attention[key]


def _attention_rows(
    query: Tensor, slots: Tensor, sizes: list[int], chunk: int, step: int
) -> tuple[int, ...]:
    """Numbers of rows whose attention has the bits of a block that reads more slots than it needs.

    Widths up to a chunk are all those that there are, and a longer one is a chunk and such a rest.
    """

    def of(q: Tensor, part: Tensor, real: int, width: int) -> Tensor:
        part = part[:, :width]
        mask = torch.zeros(len(q), 1, width, dtype=q.dtype)
        mask[..., real:] = -torch.inf
        return fixed.attention(q, part, part, mask, q.shape[-1] ** -0.5, chunk)

    longest = slots.shape[1] // step * step
    widths = [(width, chunk) for width in range(max(BLOCK, step), chunk, step)]
    widths += [(width, longest) for width in (chunk, chunk + step, longest - step)]
    truth = {width: of(query, slots, width, wider) for width, wider in widths}

    def passes(rows: int) -> bool:
        q, many = (x.repeat(rows // BLOCK, 1, 1) for x in (query, slots))
        return all(
            torch.equal(
                of(q, many, width, width).view(-1, *one.shape),
                one.expand(rows // BLOCK, *one.shape),
            )
            for width, one in truth.items()
        )

    return tuple(n for n in sizes if passes(n)) if passes(BLOCK) else ()


def _prompts(config: Architecture, dtype: torch.dtype, made: torch.Generator) -> bool:
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
    """Whether rows get the same bits in a step of many and, in another order, of a block.

    The place in a block is tried here for attention, and all that is neither.
    """
    config = msgspec.structs.replace(decoder.config, num_layers=1)
    dtype, num_rows = decoder.head_weight_VD.dtype, 128 + BLOCK
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
        num_slots = max(BLOCK, cache.round_up(int(position.max()) + 1, shapes.slots))
        step = cache.Step(kept, position, num_slots, shapes)
        rope = decoder._ropes(position, dtype)[0]
        return decoder.model.norm(decoder.model.layers[0](x_TD[rows], rope, step, None))[1]

    whole = run(torch.arange(num_rows))
    return all(
        _same(run(rows), whole[rows]) for rows in torch.arange(num_rows).flip(0).split(BLOCK)
    )
