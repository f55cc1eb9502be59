"""Row products and attention in calls of few shapes.

A matrix library may sum in another order for another shape, and only for another shape, thread
count or place in memory modulo a cache line. So work of any size is cut here into calls whose
shapes are known beforehand, and `engine/invariance.py` checks, for these shapes, that a row
gets the same bits in each of them. T is rows, N items of a batched product, G rows of an item,
K their width, L slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The least rows of a call, and what tokens and slots are padded to: two AVX-512 vectors of fp32.
BLOCK = 32


class Shapes(NamedTuple):
    """The shapes in which an engine computes, and whether bits are the same in all of them."""

    rows: tuple[int, ...]
    """Rows of one call of attention; empty: as many as there are."""
    head: tuple[int, ...]
    """Rows of one product with the output head."""
    chunk: int
    """Slots that are summed at once."""
    slots: int
    """Of what the number of slots is a multiple."""
    prompts: int
    """Prompts of one forward, at most."""
    holds: bool
    """Whether a sample's bits do not depend on what else is in the batch."""
    said: str


def cut(rows: int, sizes: tuple[int, ...]) -> list[slice]:
    """Rows in parts of these sizes, large ones first; the rest is one part. No sizes: one part."""
    parts, start = [], 0
    for size in sizes:
        while rows - start >= size:
            parts.append(slice(start, start + size))
            start += size
    return [*parts, slice(start, rows)] if start < rows or not parts else parts


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """`F.linear`, without gradient, in calls of these numbers of rows."""
    if not sizes or len(x_TD) in sizes:
        return F.linear(x_TD, weight, bias)
    out = x_TD.new_empty(len(x_TD), len(weight))
    for part in cut(len(x_TD), sizes):
        if bias is None:
            torch.mm(x_TD[part], weight.T, out=out[part])
        else:
            torch.addmm(bias, x_TD[part], weight.T, out=out[part])
    return out


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, chunk: int
) -> Tensor:
    """softmax(scale * query @ key.T + mask) @ value of (N, G, K), (N, L, K) twice and (N, 1, L).

    Slots are taken `chunk` at a time and summed in order, from operands of one layout, so that
    slots of probability 0 at the end change nothing.
    """
    num_slots = key.shape[1]
    parts = [slice(i, i + chunk) for i in range(0, num_slots, chunk)]
    scores = [
        torch.baddbmm(mask[..., part], query, key[:, part].transpose(1, 2), alpha=scale)
        for part in parts
    ]
    prob = (scores[0] if len(parts) == 1 else torch.cat(scores, -1)).softmax(-1)
    out = torch.bmm(prob[..., parts[0]].contiguous(), value[:, parts[0]])
    for part in parts[1:]:
        # Rows of a longer row of slots lie apart, which is another shape to a library.
        out.baddbmm_(prob[..., part].contiguous(), value[:, part])
    return out


def attention_of_rows(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: int,
    scale: float,
    chunk: int,
    sizes: tuple[int, ...],
) -> Tensor:
    """`attention` of rows with `heads` items each, in calls of these numbers of rows."""
    num_items = len(operands[0])
    if not sizes or num_items in [size * heads for size in sizes]:
        return attention(*operands, scale, chunk)
    outs = []
    for part in cut(num_items, tuple(size * heads for size in sizes)):
        missing = sizes[-1] * heads - (part.stop - part.start)
        four = (x[part] for x in operands)
        if missing > 0:
            four = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in four)
        out = attention(*four, scale, chunk)
        outs.append(out[:-missing] if missing > 0 else out)
    return torch.cat(outs)
