"""Twins on the CPU of the operators of a layer's ops, by the definitions in kernels/truth.py.

Of `fake_twins.py`: a call's arguments come by name.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from intfast.kernels import truth


def _add_rms_norm(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    x, delta = call.x_TD, call.delta_TD
    stream = x if delta is None else x + delta
    _, normed = truth.add_rms_norm(stream.float(), None, call.weight_D.float(), call.eps)
    scale = (stream.float().square().mean(1) + call.eps).rsqrt()
    # Without delta the operator gives no stream: it must not return its own input.
    return stream if delta is not None else x.new_empty(0, x.shape[1]), normed.to(x.dtype), scale


def _add_rms_norm_gradient(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    scale, grad = call.scale_T[:, None], call.dnormed_TD.float()
    normal = call.stream_TD.float() * scale
    dweight = (grad * normal).sum(0)
    grad = grad * call.weight_D.float()
    dx = (grad - normal * (grad * normal).mean(1, keepdim=True)) * scale
    if call.dstream_TD is not None:
        dx = dx + call.dstream_TD.float()
    return dx.to(call.stream_TD.dtype), dweight.to(call.weight_D.dtype)


def _turned(call: SimpleNamespace, both: Tensor, weights: list[Tensor], num_kv: int) -> Tensor:
    # The definition takes values as well: keys stand for them.
    qkv = torch.cat((both, both[:, -num_kv:]), 1)
    angles = (x.float()[:, None].repeat(1, 1, 2) for x in (call.cos_TK, call.sin_TK))
    norms = (*weights, call.eps) if weights else None
    return torch.cat(truth.norm_rope(qkv, num_kv, *angles, norms)[:2], 1)


def _weights(call: SimpleNamespace) -> list[Tensor]:
    return [] if call.query_K is None else [call.query_K.float(), call.key_K.float()]


def _norm_rope(call: SimpleNamespace) -> Tensor:
    out = _turned(call, call.both_TNK.float(), _weights(call), call.num_kv)
    return out.to(call.both_TNK.dtype)


def _norm_rope_gradient(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    upstream = torch.cat((call.dquery_THK, call.dkey_TJK), 1)
    both = torch.zeros_like(upstream) if call.both_TNK is None else call.both_TNK
    leaves = [x.requires_grad_() for x in (both.float().clone(), *_weights(call))]
    with torch.enable_grad():
        out = _turned(call, leaves[0], leaves[1:], call.dkey_TJK.shape[1])
        grad, *dweights = torch.autograd.grad(out, leaves, upstream.float())
    dqkv = torch.cat((grad.to(upstream.dtype), call.dvalue_TJK), 1)
    made = torch.stack(dweights) if dweights else grad.new_zeros(2, grad.shape[2])
    return dqkv, made.to(upstream.dtype)


def _swiglu(call: SimpleNamespace) -> Tensor:
    return truth.swiglu(call.gate_up_TE.float()).to(call.gate_up_TE.dtype)


def _swiglu_gradient(call: SimpleNamespace) -> Tensor:
    leaf = call.gate_up_TE.float().clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(truth.swiglu(leaf), leaf, call.dout_TI.float())
    return grad.to(call.gate_up_TE.dtype)


TWINS = {
    "add_rms_norm": _add_rms_norm,
    "add_rms_norm_gradient": _add_rms_norm_gradient,
    "norm_rope": _norm_rope,
    "norm_rope_gradient": _norm_rope_gradient,
    "swiglu": _swiglu,
    "swiglu_gradient": _swiglu_gradient,
}
