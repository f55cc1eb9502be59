"""SwiGLU of a fused projection: silu(gate) * up, gate and up read where they lie.

Bytes of a row of I numbers of 2 bytes: forward 6 I (both halves read, the product written),
backward 10 I (its gradient and both halves read, both gradients written into the one buffer that
the projection's backward takes). Nothing is copied and nothing concatenated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import layer_plain
from .head.plan import NAMESPACE
from .launch import Path, jit, power_of_two, takes_triton, tl, unit_stride


@jit
def _gate(gate_up_ptr, out_ptr, width, stride_in, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    at = gate_up_ptr + row * stride_in + cols
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + cols, out, mask=inside)


@jit
def _gate_gradient(
    dout_ptr, gate_up_ptr, dgate_up_ptr, width, stride_dout, stride_in, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    at = gate_up_ptr + row * stride_in + cols
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dout_ptr + row * stride_dout + cols, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    # In this order: grad * gate may leave fp32 where the share is zero.
    dup = grad * (gate * share)
    dgate = grad * up * share * (1.0 + gate * (1.0 - share))
    to = dgate_up_ptr + row * (2 * width) + cols
    tl.store(to, dgate.to(dgate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(to + width, dup.to(dgate_up_ptr.dtype.element_ty), mask=inside)


def _grid(num_rows: int, width: int, device: torch.device) -> tuple[tuple[int, int], int]:
    block = min(power_of_two(width), 2048 if device.type == "cuda" else 16)
    return (num_rows, -(-width // block)), block


@torch.library.custom_op(f"{NAMESPACE}::swiglu", mutates_args=())
def _forward(gate_up_TE: Tensor) -> Tensor:
    gate_up_TE, out_TI = unit_stride(gate_up_TE), _forward_fake(gate_up_TE)
    if out_TI.numel():
        grid, block = _grid(*out_TI.shape, out_TI.device)
        _gate[grid](gate_up_TE, out_TI, out_TI.shape[1], gate_up_TE.stride(0), BLOCK=block)
    return out_TI


@_forward.register_fake
def _forward_fake(gate_up_TE):
    return gate_up_TE.new_empty(gate_up_TE.shape[0], gate_up_TE.shape[1] // 2)


@torch.library.custom_op(f"{NAMESPACE}::swiglu_gradient", mutates_args=())
def _backward(dout_TI: Tensor, gate_up_TE: Tensor) -> Tensor:
    dout_TI, gate_up_TE = unit_stride(dout_TI), unit_stride(gate_up_TE)
    dgate_up_TE = gate_up_TE.new_empty(gate_up_TE.shape)
    if dout_TI.numel():
        grid, block = _grid(*dout_TI.shape, dout_TI.device)
        _gate_gradient[grid](
            dout_TI, gate_up_TE, dgate_up_TE, dout_TI.shape[1], dout_TI.stride(0),
            gate_up_TE.stride(0), BLOCK=block,
        )  # fmt: skip
    return dgate_up_TE


@_backward.register_fake
def _backward_fake(dout_TI, gate_up_TE):
    return gate_up_TE.new_empty(gate_up_TE.shape)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward(grad, *ctx.saved_tensors)


def swiglu(gate_up_TE: Tensor, *, path: Path = "auto") -> Tensor:
    """silu(gate) * up (T, I) of the two halves of (T, 2 I); differentiable.

    gate_up_TE   (T, 2 I) bf16, fp16, fp32, or fp64 on the plain path; any strides
    path         "plain" is torch alone and rounds silu(gate); "triton" rounds once; "auto" is
                 "triton" on CUDA
    raises       ValueError on a shape, dtype, device or name that does not fit
    """
    if gate_up_TE.ndim != 2 or gate_up_TE.shape[1] % 2:
        raise ValueError(
            f"gate_up: expected (T, 2 I), got {tuple(gate_up_TE.shape)}; flatten the batch, and "
            "give gate and up as the two halves of one projection"
        )
    if takes_triton(path, gate_up_TE):
        return _Swiglu.apply(gate_up_TE)
    return layer_plain.swiglu(gate_up_TE)
