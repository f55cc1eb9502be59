"""A micro-batch's 16-bit gradient, added to its fp32 sum; the squares of the sum on the way.

Gradients of many micro-batches must add up in fp32, and clipping needs the norm of what they add
up to. Each block of the sum leaves its squares behind, so that the norm costs no pass over the
gradients of its own: those of the last micro-batch are the squares of the whole.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .adamw import StepPath
from .head.plan import HAS_TRITON, expect, needs_triton

if HAS_TRITON:
    import triton.language as tl
    from triton import cdiv, jit
else:
    # The kernel below stays a function that nothing calls.
    def jit(function):
        return function


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
    grad: Tensor, total: Tensor | None = None, *, path: StepPath = "auto"
) -> tuple[Tensor, Tensor | None]:
    """(total, square_B): `total + grad`, and sums of squares that add up to its squared norm.

    grad       any floating type and shape
    total      contiguous fp32 of that shape, written in place; None starts a new one
    path       as of `adamw`
    returns    square_B (blocks,) fp32, to be added up in fp64; None on the plain path, where a
               pass of their own costs less than one for every micro-batch
    raises     ValueError on a shape, dtype, device, stride or name that does not fit
    """
    if path not in get_args(StepPath):
        raise ValueError(f"path: expected one of {get_args(StepPath)}, got {path!r}")
    if total is not None:
        expect("total", total, grad.shape, torch.float32, grad.device)
        if not total.is_contiguous():
            raise ValueError("total: expected contiguous memory, got a strided view")
    if path == "plain" or (path == "auto" and not grad.is_cuda):
        return (grad.float() if total is None else total.add_(grad)), None
    needs_triton(path, grad.device)
    fresh, grad = total is None, grad.contiguous()
    if fresh:
        total = torch.empty_like(grad, dtype=torch.float32)
    block = 2048 if grad.is_cuda else 64
    square_B = total.new_empty(cdiv(grad.numel(), block))
    if grad.numel():
        _add_a_block[(len(square_B),)](
            grad, total, square_B, grad.numel(), BLOCK=block, FRESH=fresh, num_warps=8
        )
    return total, square_B
