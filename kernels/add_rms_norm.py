"""The residual stream and its RMSNorm in one pass.

    stream = x + delta            rounded to x's type
    normed = stream / sqrt(mean(stream^2) + eps) * weight

Bytes of a row of D numbers of 2 bytes: forward 8 D (x and delta read, both results written),
backward 8 D (both gradients and the stream read, one gradient written: it is that of x and of
delta). Without delta the forward reads x and writes `normed`, 4 D; `stream` is x itself, so that
the backward still adds both gradients in its one pass. The weight's gradient is summed in two
stages, by program and then over the programs: no atomics, the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import layer_plain
from .head.plan import NAMESPACE, expect
from .launch import Path, jit, power_of_two, programs, takes_triton, tl, unit_stride

MAX_WIDTH = 8192
"""Of the Triton path: a row is held in registers."""


@jit
def _add_and_normalise(
    x_ptr,
    delta_ptr,
    w_ptr,
    stream_ptr,
    normed_ptr,
    scale_ptr,
    D,
    stride_x,
    stride_delta,
    eps,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    x = tl.load(x_ptr + row * stride_x + cols, mask=inside, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * stride_delta + cols, mask=inside, other=0.0)
        # What is normalised is the stream as others read it: rounded.
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(stream_ptr + row * D + cols, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    normed = (x * scale * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row * D + cols, normed, mask=inside)
    tl.store(scale_ptr + row, scale)


@jit
def _gradients(
    dnormed_ptr,
    dstream_ptr,
    stream_ptr,
    scale_ptr,
    w_ptr,
    dx_ptr,
    partial_ptr,
    T,
    D,
    rows_each,
    stride_dnormed,
    stride_dstream,
    stride_stream,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(w_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, rows_each):
        row = program * rows_each + step
        inside = cols < tl.where(row < T, D, 0)
        x = tl.load(stream_ptr + row * stride_stream + cols, mask=inside, other=0.0)
        grad = tl.load(dnormed_ptr + row * stride_dnormed + cols, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < T, other=0.0)
        normal = x.to(tl.float32) * scale
        dweight += grad * normal
        grad = grad * weight
        # The part along x has no effect on the normalised row.
        along = tl.sum(grad * normal, 0) / D
        dx = (grad - normal * along) * scale
        if ADD:
            held = tl.load(dstream_ptr + row * stride_dstream + cols, mask=inside, other=0.0)
            dx += held.to(tl.float32)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * D + cols, dweight, mask=cols < D)


def _launch(width: int) -> dict[str, int]:
    block = power_of_two(width)
    # 16 numbers a thread.
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 512))}


@torch.library.custom_op(f"{NAMESPACE}::add_rms_norm", mutates_args=())
def _forward(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    add = delta_TD is not None
    x_TD, delta_TD = unit_stride(x_TD), unit_stride(delta_TD) if add else x_TD
    stream_TD, normed_TD, scale_T = _forward_fake(x_TD, delta_TD if add else None, weight_D, eps)
    num_rows, width = x_TD.shape
    if num_rows:
        _add_and_normalise[(num_rows,)](
            x_TD, delta_TD, weight_D.contiguous(), stream_TD, normed_TD, scale_T, width,
            x_TD.stride(0), delta_TD.stride(0), eps, ADD=add, **_launch(width),
        )  # fmt: skip
    return stream_TD, normed_TD, scale_T


@_forward.register_fake
def _forward_fake(x_TD, delta_TD, weight_D, eps):
    # Without delta the stream is x, which an operator must not return.
    stream_TD = x_TD.new_empty(0 if delta_TD is None else len(x_TD), x_TD.shape[1])
    return stream_TD, x_TD.new_empty(x_TD.shape), x_TD.new_empty(len(x_TD), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::add_rms_norm_gradient", mutates_args=())
def _backward(
    dnormed_TD: Tensor,
    dstream_TD: Tensor | None,
    stream_TD: Tensor,
    scale_T: Tensor,
    weight_D: Tensor,
) -> tuple[Tensor, Tensor]:
    add = dstream_TD is not None
    dnormed_TD, stream_TD = unit_stride(dnormed_TD), unit_stride(stream_TD)
    dstream_TD = unit_stride(dstream_TD) if add else dnormed_TD
    num_rows, width = stream_TD.shape
    dx_TD = stream_TD.new_empty(stream_TD.shape)
    count = programs(num_rows, stream_TD.device, 2)
    partial_PD = scale_T.new_empty(count, width)
    if num_rows:
        rows_each = -(-num_rows // count)
        _gradients[(count,)](
            dnormed_TD, dstream_TD, stream_TD, scale_T, weight_D.contiguous(), dx_TD, partial_PD,
            num_rows, width, rows_each, dnormed_TD.stride(0), dstream_TD.stride(0),
            stream_TD.stride(0), ADD=add, **_launch(width),
        )  # fmt: skip
    return dx_TD, partial_PD.sum(0).to(weight_D.dtype)


@_backward.register_fake
def _backward_fake(dnormed_TD, dstream_TD, stream_TD, scale_T, weight_D):
    return stream_TD.new_empty(stream_TD.shape), weight_D.new_empty(weight_D.shape)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float):
        ctx.set_materialize_grads(False)
        stream, normed, scale = _forward(x, delta, weight, eps)
        if delta is None:
            stream = x
        ctx.save_for_backward(stream, scale, weight)
        ctx.added = delta is not None
        return stream, normed

    @staticmethod
    def backward(ctx: Any, dstream: Tensor | None, dnormed: Tensor | None):
        if dnormed is None:
            return dstream, dstream if ctx.added else None, None, None
        dx, dweight = _backward(dnormed, dstream, *ctx.saved_tensors)
        return dx, dx if ctx.added else None, dweight, None


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, *, path: Path = "auto"
) -> tuple[Tensor, Tensor]:
    """(stream_TD, normed_TD): the sum, and its RMSNorm times the weight; all differentiable.

    x_TD, delta_TD   (T, D) of one type: bf16, fp16, fp32, or fp64 on the plain path; any strides.
                     Without delta the stream is x
    weight_D         (D,) of that type
    path             "plain" is torch alone and rounds the normalised row before the product with
                     the weight; "triton" rounds once, and is made for D up to MAX_WIDTH; "auto" is
                     "triton" on CUDA
    raises           ValueError on a shape, dtype, device, width or name that does not fit
    """
    if not takes_triton(path, x_TD):
        return layer_plain.add_rms_norm(x_TD, delta_TD, weight_D, eps)
    if x_TD.ndim != 2 or x_TD.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"x: expected (T, D) with D up to {MAX_WIDTH}, got {tuple(x_TD.shape)}; flatten the "
            "batch, or use path='plain'"
        )
    expect("weight", weight_D, x_TD.shape[1:], x_TD.dtype, x_TD.device)
    if delta_TD is not None:
        expect("delta", delta_TD, x_TD.shape, x_TD.dtype, x_TD.device)
    return _AddRmsNorm.apply(x_TD, delta_TD, weight_D, eps)
