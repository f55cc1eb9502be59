"""The elementwise work of a layer as three functions: plain torch, our kernels, or Liger's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from intfast.kernels.add_rms_norm import MAX_WIDTH, add_rms_norm
from intfast.kernels.norm_rope import HeadNorms, norm_rope
from intfast.kernels.swiglu import swiglu

Kernels = Literal["torch", "liger", "fused"]


class LayerOps(NamedTuple):
    """As the ops of these names in kernels/ are called."""

    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    norm_rope: Callable[
        [Tensor, int, Tensor, Tensor, HeadNorms | None], tuple[Tensor, Tensor, Tensor]
    ]
    swiglu: Callable[[Tensor], Tensor]


TORCH = LayerOps(*(partial(op, path="plain") for op in (add_rms_norm, norm_rope, swiglu)))
FUSED = LayerOps(add_rms_norm, norm_rope, swiglu)
"""Triton on CUDA, plain torch elsewhere."""


def layer_ops(kernels: Kernels, hidden_size: int) -> LayerOps:
    """Of `model.kernels`. Raises ValueError where they do not fit, RuntimeError without Liger."""
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels: expected one of {get_args(Kernels)}, got {kernels!r}")
    if kernels == "fused" and hidden_size > MAX_WIDTH:
        raise ValueError(
            f"kernels: expected 'torch' or 'liger', got 'fused', which is made for a hidden size "
            f"up to {MAX_WIDTH}, with a model of {hidden_size}"
        )
    if kernels == "liger":
        return _liger()
    return {"torch": TORCH, "fused": FUSED}[kernels]


def _liger() -> LayerOps:
    if importlib.util.find_spec("liger_kernel") is None:
        raise RuntimeError(
            "kernels 'liger' needs the package liger-kernel: install it or choose 'torch'"
        )
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # 0.0: no offset on the weight; False: leave the incoming gradient alone.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def add_normalise(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float):
        stream = x if delta is None else x + delta
        return stream, normalise(stream, weight, eps)

    def rotate(qkv: Tensor, num_kv: int, cos: Tensor, sin: Tensor, norms: HeadNorms | None):
        query, key, value = qkv.split((qkv.shape[1] - 2 * num_kv, num_kv, num_kv), 1)
        if norms is not None:
            query = normalise(query, norms.query_K, norms.eps)
            key = normalise(key, norms.key_K, norms.eps)
        q, k = (x.transpose(0, 1)[None] for x in (query, key))
        q, k = LigerRopeFunction.apply(q, k, cos.transpose(0, 1), sin.transpose(0, 1))
        return q[0].transpose(0, 1), k[0].transpose(0, 1), value

    def gate(gate_up: Tensor) -> Tensor:
        return LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))

    def unless_generating(ours: Callable, plain: Callable) -> Callable:
        # Without a gradient torch alone takes as few calls.
        return lambda *args: (plain if torch.is_inference_mode_enabled() else ours)(*args)

    pairs = zip((add_normalise, rotate, gate), TORCH, strict=True)
    return LayerOps(*(unless_generating(*pair) for pair in pairs))
