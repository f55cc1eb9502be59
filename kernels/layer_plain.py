"""The plain path of a layer's ops: torch alone, any floating type, each step rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import generates


class _Normalise(torch.autograd.Function):
    """RMSNorm with half the passes over memory that autograd makes of the formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # fp32 inside, whatever the weights are: squares of bfloat16 lose the small ones.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = (wide * scale).to(x.dtype)
        # The normalised input gives the gradient back; the input itself need not be kept.
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        grad, normal, wide = (x.to(scale.dtype) for x in (grad, normal, weight))
        product = grad * normal
        # The mean over a row of grad * weight * normal: the part along x, which has no effect.
        along = (product @ wide).div_(len(wide)).unsqueeze_(-1)
        grad_x = torch.mul(grad, wide).addcmul_(normal, along, value=-1).mul_(scale)
        grad_weight = product.flatten(0, -2).sum(0)
        return grad_x.to(weight.dtype), grad_weight.to(weight.dtype), None


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # One call instead of three: a decode step of a small model is mostly calls.
    if generates():
        return F.rms_norm(x, weight.shape, None, eps) * weight
    return _Normalise.apply(x, weight, eps)


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm.add_rms_norm`."""
    stream_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return stream_TD, _normalise(stream_TD, weight_D, eps)


class _Rotate(torch.autograd.Function):
    """Rotary embedding of (T, heads, K); the gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1K, sin_T1K)
        return _rotated(x, cos_T1K, sin_T1K, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def rotate(x: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotary embedding of (T, heads, K): the halves of each head, by equal angles."""
    return _Rotate.apply(x, cos_T1K, sin_T1K)


def _rotated(x: Tensor, cos_T1K: Tensor, sin_T1K: Tensor, sign: int) -> Tensor:
    # Half by half, in place: a concatenation of the rotated halves would copy everything again.
    out = x * cos_T1K
    # Both halves of a head turn by the same angles.
    sin = sin_T1K.chunk(2, -1)[0]
    for half, other, direction in zip(out.chunk(2, -1), x.chunk(2, -1)[::-1], (-1, 1), strict=True):
        half.addcmul_(other, sin, value=sign * direction)
    return out


def norm_rope(
    qkv_TNK: Tensor,
    num_kv: int,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `norm_rope.norm_rope`."""
    heads = (qkv_TNK.shape[1] - 2 * num_kv, num_kv)
    query, key, value = qkv_TNK.split((*heads, num_kv), 1)
    if generates():
        # Queries and keys together: half the calls of a decode step.
        both = qkv_TNK[:, :-num_kv]
        if norms is not None:
            pairs = zip(norms[:2], heads, strict=True)
            weight = torch.cat([weight_K.expand(num, -1) for weight_K, num in pairs])
            both = F.rms_norm(both, weight.shape[1:], None, norms[2]) * weight
        return *_rotated(both, cos_T1K, sin_T1K, 1).split(heads, 1), value
    if norms is not None:
        query, key = (_normalise(x, w, norms[2]) for x, w in ((query, norms[0]), (key, norms[1])))
    return rotate(query, cos_T1K, sin_T1K), rotate(key, cos_T1K, sin_T1K), value


def swiglu(gate_up_TE: Tensor) -> Tensor:
    """See `swiglu.swiglu`."""
    gate_TI, up_TI = gate_up_TE.chunk(2, -1)
    return F.silu(gate_TI) * up_TI
