"""Queries and keys of a fused projection: RMSNorm of each head and rotary embedding in one pass.

    head = head / sqrt(mean(head^2) + eps) * weight        where the family has such norms
    (low, high) = (low cos - high sin, high cos + low sin)  of the halves of each head

Read where they lie, written as one block that attention takes as two views; values are never
touched. The backward writes the gradients of queries, keys and values into the one buffer that the
projection's backward takes. Bytes of a token with H + J heads of queries and keys and J of values,
K numbers of 2 bytes each: forward 4 (H + J) K, backward 6 (H + J) K + 4 J K, or without norms
4 (H + 2 J) K; the angles, K numbers, come on top. The weights' gradients are summed as in
add_rms_norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layer_plain
from .head.plan import NAMESPACE, expect
from .launch import Path, jit, power_of_two, programs, takes_triton, tl, unit_stride


class HeadNorms(NamedTuple):
    """The norms of a family that has them."""

    query_K: Tensor
    key_K: Tensor
    eps: float


@jit
def _turn(
    x_ptr,
    weight_ptr,
    out_ptr,
    first,
    last,
    stride_x,
    cos,
    sin,
    eps,
    SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """One token's heads first..last, which are of one kind."""
    HALF: tl.constexpr = SIZE // 2
    low_at = tl.arange(0, BLOCK_K)
    in_half = low_at < HALF
    if NORM:
        weight_low = tl.load(weight_ptr + low_at, mask=in_half, other=0.0).to(tl.float32)
        weight_high = tl.load(weight_ptr + low_at + HALF, mask=in_half, other=0.0).to(tl.float32)
    for start in range(first, last, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        inside = (head < last)[:, None] & in_half[None, :]
        at = x_ptr + head[:, None] * stride_x + low_at[None, :]
        low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
            scale = tl.rsqrt(square / SIZE + eps)[:, None]
            low = low * scale * weight_low[None, :]
            high = high * scale * weight_high[None, :]
        to = out_ptr + head[:, None] * SIZE + low_at[None, :]
        dtype = out_ptr.dtype.element_ty
        tl.store(to, (low * cos[None, :] - high * sin[None, :]).to(dtype), mask=inside)
        tl.store(to + HALF, (high * cos[None, :] + low * sin[None, :]).to(dtype), mask=inside)


@jit
def _forward_of_a_token(
    both_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    out_ptr,
    H,
    J,
    stride_token,
    stride_head,
    stride_cos,
    stride_sin,
    eps,
    SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low_at = tl.arange(0, BLOCK_K)
    in_half = low_at < SIZE // 2
    cos = tl.load(cos_ptr + row * stride_cos + low_at, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * stride_sin + low_at, mask=in_half, other=0.0).to(tl.float32)
    x_ptr = both_ptr + row * stride_token
    out_ptr += row * ((H + J) * SIZE)
    _turn(
        x_ptr, query_weight_ptr, out_ptr, 0, H, stride_head, cos, sin, eps,
        SIZE, BLOCK_H, BLOCK_K, NORM,
    )  # fmt: skip
    _turn(
        x_ptr, key_weight_ptr, out_ptr, H, H + J, stride_head, cos, sin, eps,
        SIZE, BLOCK_H, BLOCK_K, NORM,
    )  # fmt: skip


@jit
def _turn_back(
    grad_ptr,
    x_ptr,
    weight_ptr,
    out_ptr,
    first,
    last,
    stride_grad,
    stride_x,
    cos,
    sin,
    live,
    eps,
    SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """One token's gradient of heads first..last; returns that of both halves of their weight."""
    HALF: tl.constexpr = SIZE // 2
    low_at = tl.arange(0, BLOCK_K)
    in_half = low_at < HALF
    dweight_low = tl.zeros((BLOCK_K,), tl.float32)
    dweight_high = tl.zeros((BLOCK_K,), tl.float32)
    if NORM:
        weight_low = tl.load(weight_ptr + low_at, mask=in_half, other=0.0).to(tl.float32)
        weight_high = tl.load(weight_ptr + low_at + HALF, mask=in_half, other=0.0).to(tl.float32)
    for start in range(first, last, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        used = head < tl.where(live, last, 0)
        inside = used[:, None] & in_half[None, :]
        at = grad_ptr + (head - first)[:, None] * stride_grad + low_at[None, :]
        turned_low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        turned_high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        low = turned_low * cos[None, :] + turned_high * sin[None, :]
        high = turned_high * cos[None, :] - turned_low * sin[None, :]
        if NORM:
            at = x_ptr + head[:, None] * stride_x + low_at[None, :]
            x_low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            x_high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
            square = tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)
            # What lies outside is read as zero, whose scale may be infinite.
            scale = tl.where(used, tl.rsqrt(square / SIZE + eps), 0.0)[:, None]
            x_low, x_high = x_low * scale, x_high * scale
            dweight_low += tl.sum(low * x_low, 0)
            dweight_high += tl.sum(high * x_high, 0)
            low, high = low * weight_low[None, :], high * weight_high[None, :]
            along = ((tl.sum(low * x_low, 1) + tl.sum(high * x_high, 1)) / SIZE)[:, None]
            low, high = (low - x_low * along) * scale, (high - x_high * along) * scale
        to = out_ptr + head[:, None] * SIZE + low_at[None, :]
        tl.store(to, low.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(to + HALF, high.to(out_ptr.dtype.element_ty), mask=inside)
    return dweight_low, dweight_high


@jit
def _gradients_of_tokens(
    dquery_ptr,
    dkey_ptr,
    dvalue_ptr,
    both_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    dqkv_ptr,
    partial_ptr,
    T,
    H,
    J,
    rows_each,
    stride_dquery,
    stride_dquery_head,
    stride_dkey,
    stride_dkey_head,
    stride_dvalue,
    stride_dvalue_head,
    stride_token,
    stride_head,
    stride_cos,
    stride_sin,
    eps,
    SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = SIZE // 2
    low_at = tl.arange(0, BLOCK_K)
    in_half = low_at < HALF
    query_low = tl.zeros((BLOCK_K,), tl.float32)
    query_high = tl.zeros((BLOCK_K,), tl.float32)
    key_low = tl.zeros((BLOCK_K,), tl.float32)
    key_high = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(0, rows_each):
        row = program * rows_each + step
        live = row < T
        mask = low_at < tl.where(live, HALF, 0)
        cos = tl.load(cos_ptr + row * stride_cos + low_at, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * stride_sin + low_at, mask=mask, other=0.0).to(tl.float32)
        x_ptr = both_ptr + row * stride_token
        out_ptr = dqkv_ptr + row * ((H + 2 * J) * SIZE)
        low, high = _turn_back(
            dquery_ptr + row * stride_dquery, x_ptr, query_weight_ptr, out_ptr, 0, H,
            stride_dquery_head, stride_head, cos, sin, live, eps, SIZE, BLOCK_H, BLOCK_K, NORM,
        )  # fmt: skip
        query_low += low
        query_high += high
        low, high = _turn_back(
            dkey_ptr + row * stride_dkey, x_ptr, key_weight_ptr, out_ptr, H, H + J,
            stride_dkey_head, stride_head, cos, sin, live, eps, SIZE, BLOCK_H, BLOCK_K, NORM,
        )  # fmt: skip
        key_low += low
        key_high += high
        # Values pass unchanged.
        for start in range(0, J, BLOCK_H):
            head = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
            inside = (head < tl.where(live, J, 0))[:, None] & in_half[None, :]
            at = dvalue_ptr + row * stride_dvalue + head[:, None] * stride_dvalue_head
            at += low_at[None, :]
            to = out_ptr + (head + H + J)[:, None] * SIZE + low_at[None, :]
            tl.store(to, tl.load(at, mask=inside, other=0.0), mask=inside)
            tl.store(to + HALF, tl.load(at + HALF, mask=inside, other=0.0), mask=inside)
    if NORM:
        to = partial_ptr + program * (2 * SIZE) + low_at
        tl.store(to, query_low, mask=in_half)
        tl.store(to + HALF, query_high, mask=in_half)
        tl.store(to + SIZE, key_low, mask=in_half)
        tl.store(to + SIZE + HALF, key_high, mask=in_half)


def _blocks(size: int, norm: bool) -> dict[str, int | bool]:
    block_k = power_of_two(size // 2)
    # 512 numbers of each half at once: 4 a thread.
    return {
        "SIZE": size, "BLOCK_H": max(1, 512 // block_k), "BLOCK_K": block_k, "NORM": norm,
        "num_warps": 4,
    }  # fmt: skip


# both_TNK are queries and keys without the values; the angles are those of half a head.
@torch.library.custom_op(f"{NAMESPACE}::norm_rope", mutates_args=())
def _forward(
    both_TNK: Tensor,
    num_kv: int,
    cos_TK: Tensor,
    sin_TK: Tensor,
    query_K: Tensor | None,
    key_K: Tensor | None,
    eps: float,
) -> Tensor:
    both_TNK, cos_TK, sin_TK = map(unit_stride, (both_TNK, cos_TK, sin_TK))
    out_TNK = both_TNK.new_empty(both_TNK.shape)
    num_rows, num_heads, size = out_TNK.shape
    if num_rows:
        norm = query_K is not None
        weights = (query_K.contiguous(), key_K.contiguous()) if norm else (both_TNK, both_TNK)
        _forward_of_a_token[(num_rows,)](
            both_TNK, cos_TK, sin_TK, *weights, out_TNK, num_heads - num_kv, num_kv,
            *both_TNK.stride()[:2], cos_TK.stride(0), sin_TK.stride(0), eps, **_blocks(size, norm),
        )  # fmt: skip
    return out_TNK


@_forward.register_fake
def _forward_fake(both_TNK, num_kv, cos_TK, sin_TK, query_K, key_K, eps):
    return both_TNK.new_empty(both_TNK.shape)


@torch.library.custom_op(f"{NAMESPACE}::norm_rope_gradient", mutates_args=())
def _backward(
    dquery_THK: Tensor,
    dkey_TJK: Tensor,
    dvalue_TJK: Tensor,
    both_TNK: Tensor | None,
    cos_TK: Tensor,
    sin_TK: Tensor,
    query_K: Tensor | None,
    key_K: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    norm = query_K is not None
    grads = [unit_stride(x) for x in (dquery_THK, dkey_TJK, dvalue_TJK)]
    both_TNK = unit_stride(both_TNK) if norm else grads[0]
    cos_TK, sin_TK = unit_stride(cos_TK), unit_stride(sin_TK)
    num_rows, num_queries, size = dquery_THK.shape
    num_kv = dkey_TJK.shape[1]
    dqkv_TNK = dquery_THK.new_empty(num_rows, num_queries + 2 * num_kv, size)
    count = programs(num_rows, dquery_THK.device, 4)
    shape = (count, 2, size) if norm else (0, 2, size)
    partial_P2K = dquery_THK.new_empty(shape, dtype=torch.float32)
    if num_rows:
        weights = (query_K.contiguous(), key_K.contiguous()) if norm else (both_TNK, both_TNK)
        _gradients_of_tokens[(count,)](
            *grads, both_TNK, cos_TK, sin_TK, *weights, dqkv_TNK, partial_P2K, num_rows,
            num_queries, num_kv, -(-num_rows // count),
            *(stride for grad in grads for stride in grad.stride()[:2]), *both_TNK.stride()[:2],
            cos_TK.stride(0), sin_TK.stride(0), eps, **_blocks(size, norm),
        )  # fmt: skip
    return dqkv_TNK, partial_P2K.sum(0).to(dquery_THK.dtype)


@_backward.register_fake
def _backward_fake(dquery_THK, dkey_TJK, dvalue_TJK, both_TNK, cos_TK, sin_TK, query_K, key_K, eps):
    num_rows, num_queries, size = dquery_THK.shape
    num_heads = num_queries + 2 * dkey_TJK.shape[1]
    return dquery_THK.new_empty(num_rows, num_heads, size), dquery_THK.new_empty(2, size)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, num_kv, cos, sin, query_K, key_K, eps: float):
        # What is read, and no more: half of the angles, which are the same for both halves.
        cos, sin = (x[:, 0, : x.shape[2] // 2] for x in (cos, sin))
        both = qkv[:, :-num_kv]
        out = _forward(both, num_kv, cos, sin, query_K, key_K, eps)
        # Without norms the gradient is a rotation back: the projection need not be kept.
        ctx.save_for_backward(None if query_K is None else both, cos, sin, query_K, key_K)
        ctx.eps = eps
        return out[:, :-num_kv], out[:, -num_kv:], qkv[:, -num_kv:]

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor):
        # Read once: under checkpointing a second look would compute the forward again.
        held = ctx.saved_tensors
        dqkv, dweights = _backward(dquery, dkey, dvalue, *held, ctx.eps)
        dweights = (None, None) if held[0] is None else dweights.unbind()
        return dqkv, None, None, None, *dweights, None


def norm_rope(
    qkv_TNK: Tensor,
    num_kv: int,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
    norms: HeadNorms | None = None,
    *,
    path: Path = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(query_THK, key_TJK, value_TJK) for attention; differentiable, but for the angles.

    qkv_TNK          (T, H + 2 J, K) bf16, fp16, fp32, or fp64 on the plain path: heads of queries,
                     of keys, of values; any strides. K is even
    num_kv           J
    cos_T1K, sin_T1K (T, 1, K) of that type; the halves along K are equal
    norms            the weights (K,) of that type, and eps; None: rotation alone
    returns          values as a view of qkv; the others may be views of one block
    path             "plain" is torch alone and rounds after each step; "triton" rounds once; "auto"
                     is "triton" on CUDA
    raises           ValueError on a shape, dtype, device or name that does not fit
    """
    if not takes_triton(path, qkv_TNK):
        return layer_plain.norm_rope(qkv_TNK, num_kv, cos_T1K, sin_T1K, norms)
    if qkv_TNK.ndim != 3 or not 0 < 2 * num_kv < qkv_TNK.shape[1] or qkv_TNK.shape[2] % 2:
        raise ValueError(
            f"qkv: expected (T, H + 2 J, K) with J = num_kv = {num_kv} and K even, got "
            f"{tuple(qkv_TNK.shape)}; unflatten the projection into heads"
        )
    num_rows, _, size = qkv_TNK.shape
    for name, angle in (("cos", cos_T1K), ("sin", sin_T1K)):
        expect(name, angle, (num_rows, 1, size), qkv_TNK.dtype, qkv_TNK.device)
    for weight_K in norms[:2] if norms else ():
        expect("norms", weight_K, (size,), qkv_TNK.dtype, qkv_TNK.device)
    query_K, key_K, eps = norms or (None, None, 0.0)
    return _NormRope.apply(qkv_TNK, num_kv, cos_T1K, sin_T1K, query_K, key_K, eps)
