"""Rows of the loss head whose odds overflow, done again relative to their own largest logit."""

from __future__ import annotations

import triton
import triton.language as tl

from .rowmath import cap, cap_slope, finish


@triton.jit
def _raw_logits(x_ptr, w_ptr, row, cols, V, D, stride_xc, stride_wv, BLOCK_D: tl.constexpr):
    """One row's raw logits of some columns, by a matrix-vector product."""
    z = tl.zeros(cols.shape, tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * stride_xc + inner, mask=inner < D, other=0.0)
        w_at = w_ptr + cols.to(tl.int64)[:, None] * stride_wv + inner[None, :]
        w = tl.load(w_at, mask=(cols < V)[:, None] & (inner < D)[None, :], other=0.0)
        z += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    return z


@triton.jit
def _largest(
    x_ptr,
    w_ptr,
    row,
    V,
    D,
    stride_xc,
    stride_wv,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One row's largest logit."""
    top = float("-inf")
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        raw = _raw_logits(x_ptr, w_ptr, row, cols, V, D, stride_xc, stride_wv, BLOCK_D)
        z = tl.where(cols < V, cap(raw, scale, softcap, SOFTCAP), float("-inf"))
        top = tl.maximum(top, tl.max(z, 0))
    return top


@triton.jit
def row_top(
    x_ptr,
    w_ptr,
    stats_ptr,
    top_ptr,
    num_rows,
    V,
    D,
    stride_xc,
    stride_wv,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Of a dealt head, the own largest logit of the rows that `rereference` is asked for."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(stats_ptr + num_rows + row) < 0:
        top = _largest(
            x_ptr, w_ptr, row, V, D, stride_xc, stride_wv, scale, softcap, BLOCK_V, BLOCK_D, SOFTCAP
        )
        tl.store(top_ptr + row, top)


@triton.jit
def rereference(
    x_ptr,
    w_ptr,
    e_ptr,
    target_ptr,
    stats_ptr,
    top_ptr,
    logprob_ptr,
    entropy_ptr,
    num_rows,
    V,
    D,
    stride_xc,
    stride_wv,
    stride_ec,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DEALT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(stats_ptr + num_rows + row) < 0:
        target = tl.load(target_ptr + row)
        logit = tl.load(stats_ptr + row)
        if DEALT:
            top = tl.load(top_ptr + row)
        else:
            top = _largest(
                x_ptr, w_ptr, row, V, D, stride_xc, stride_wv, scale, softcap, BLOCK_V, BLOCK_D,
                SOFTCAP,
            )  # fmt: skip
        r = 0.0
        k = 0.0
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            raw = _raw_logits(x_ptr, w_ptr, row, cols, V, D, stride_xc, stride_wv, BLOCK_D)
            z = cap(raw, scale, softcap, SOFTCAP)
            u = z - top
            e = tl.where((cols < V) & (cols != target), tl.exp(u), 0.0)
            r += tl.sum(e, 0)
            k += tl.sum(e * u, 0)
            if STORE:
                out = (e * cap_slope(z, scale, softcap, SOFTCAP)).to(e_ptr.dtype.element_ty)
                tl.store(e_ptr + row * stride_ec + cols, out, mask=cols < V)
        shift = top - logit
        tl.store(stats_ptr + num_rows + row, shift)
        tl.store(stats_ptr + 2 * num_rows + row, r)
        tl.store(stats_ptr + 3 * num_rows + row, k)
        logprob, entropy = finish(shift, r, k, True)
        tl.store(logprob_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        # Of a dealt head the sums are shares, and what follows from them comes later.
        if STORE and not DEALT:
            # Threads of the loop above wrote a 0 into this column.
            tl.debug_barrier()
            own = -r * cap_slope(logit, scale, softcap, SOFTCAP)
            tl.store(e_ptr + row * stride_ec + target, own.to(e_ptr.dtype.element_ty))
