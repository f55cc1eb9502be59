"""A micro-batch's 16-bit gradient, added to its fp32 sum; the squares of the sum on the way.

Gradients of many micro-batches must add up in fp32, and clipping needs the norm of what they add
up to. Each block of the sum leaves its squares behind, so that the norm costs no pass over the
gradients of its own: those of the last micro-batch are the squares of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head.plan import expect
from .launch import Path, jit, takes_triton, tl


@jit
def _add_a_block(grad_ptr, total_ptr, square_ptr, N, BLOCK: tl.constexpr, FRESH: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    total = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if not FRESH:
        total += tl.load(total_ptr + at, mask=inside, other=0.0)
    tl.store(total_ptr + at, total, mask=inside)
    tl.store(square_ptr + program, tl.sum(total * total, 0))


@torch.no_grad()
def add_gradient(
    grad: Tensor, total: Tensor | None = None, *, path: Path = "auto"
) -> tuple[Tensor, Tensor | None]:
    """(total, square_B): `total + grad`, and sums of squares that add up to its squared norm.

    grad       any floating type and shape
    total      contiguous fp32 of that shape, written in place; None starts a new one
    path       as of `adamw`
    returns    square_B (blocks,) fp32, to be added up in fp64; None on the plain path, where a
               pass of their own costs less than one for every micro-batch
    raises     ValueError on a shape, dtype, device, stride or name that does not fit
    """
    if total is not None:
        expect("total", total, grad.shape, torch.float32, grad.device)
        if not total.is_contiguous():
            raise ValueError("total: expected contiguous memory, got a strided view")
    if not takes_triton(path, grad):
        return (grad.float() if total is None else total.add_(grad)), None
    fresh, grad = total is None, grad.contiguous()
    if fresh:
        total = torch.empty_like(grad, dtype=torch.float32)
    return total, _triton(grad, total, fresh)


def _triton(grad: Tensor, total: Tensor, fresh: bool) -> Tensor:
    """Write `total`; the squares."""
    block = 2048 if grad.is_cuda else 64
    square_B = total.new_empty(-(-grad.numel() // block))
    if grad.numel():
        _add_a_block[(len(square_B),)](
            grad, total, square_B, grad.numel(), BLOCK=block, FRESH=fresh, num_warps=8
        )
    return square_B
