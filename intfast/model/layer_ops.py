"""The elementwise work of a layer as three functions: plain torch, our kernels, or Liger's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intfast.kernels import layer_plain
from intfast.kernels.add_rms_norm import MAX_WIDTH, add_rms_norm
from intfast.kernels.norm_rope import HeadNorms, norm_rope
from intfast.kernels.swiglu import swiglu
from intfast.model.architecture import Architecture

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


def layer_ops(kernels: Kernels, config: Architecture) -> LayerOps:
    """Of `model.kernels`, but plain where a family has what kernels do not know (`plain_ops`).

    Raises ValueError where they do not fit, RuntimeError without Liger.
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels: expected one of {get_args(Kernels)}, got {kernels!r}")
    if kernels == "fused" and config.hidden_size > MAX_WIDTH:
        raise ValueError(
            f"kernels: expected 'torch' or 'liger', got 'fused', which is made for a hidden size "
            f"up to {MAX_WIDTH}, with a model of {config.hidden_size}"
        )
    ops = liger() if kernels == "liger" else {"torch": TORCH, "fused": FUSED}[kernels]
    return ops._replace(**{name: op for name, (_, op) in _unknown(config).items()})


class Scaled(nn.Module):
    """In the place of a norm that a family does not have."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + delta, and that scaled), each (T, D)."""
        stream_TD = x_TD if delta_TD is None else x_TD + delta_TD
        return stream_TD, stream_TD if self.scale == 1 else stream_TD * self.scale


def in_place_of_norm(config: Architecture, place: int) -> nn.Module | None:
    """What a layer has at a place of `Architecture.norms` without a name; None: nothing to do."""
    if place in (0, 2):
        return Scaled(1.0)
    return Scaled(config.residual_scale) if config.residual_scale != 1 else None


def plain_ops(config: Architecture) -> str:
    """What of a layer is plain torch whatever the kernels, and why; "" where nothing is."""
    return ", ".join(f"plain {name} ({why})" for name, (why, _) in _unknown(config).items())


def _unknown(config: Architecture) -> dict[str, tuple[str, Callable]]:
    """The ops that no kernel has for this family: why, and the plain op."""
    rotated = {rope.rotated(config.head_dim) for rope in config.ropes} - {0}
    heads = {
        "norms of 1 + weight": config.norm_offset,
        "a norm over all heads": config.qk_norm == "whole",
        "a part of each head rotated": rotated != {config.head_dim},
        "neighbours rotated together": config.interleaved,
        "queries that grow": any(rope.llama_4_scaling_beta for rope in config.ropes),
    }
    found: dict[str, tuple[str, Callable]] = {}
    if config.norm_offset:
        found["add_rms_norm"] = "norms of 1 + weight", _add_offset_norm
    if why := [said for said, is_so in heads.items() if is_so]:
        found["norm_rope"] = " and ".join(why), partial(_norm_rope, config)
    if config.activation != "silu":
        found["swiglu"] = f"{config.activation} gate", _geglu
    return found


def _wide(weight: Tensor) -> Tensor:
    """1 + weight in fp32 at least: bfloat16 has few digits beside 1."""
    return 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))


def _add_offset_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float):
    stream, normed = layer_plain.add_rms_norm(x, delta, _wide(weight), eps)
    return stream, normed.to(x.dtype)


def _norm_rope(config: Architecture, qkv, num_kv, cos, sin, norms: HeadNorms | None):
    """`norm_rope` of any family; angles may be (T, 2, K), for queries and for keys."""
    query, key, value = qkv.split((qkv.shape[1] - 2 * num_kv, num_kv, num_kv), 1)
    norm = _add_offset_norm if config.norm_offset else TORCH.add_rms_norm
    rotated = max(rope.rotated(config.head_dim) for rope in config.rotations)
    turned = []
    for i, (x, place) in enumerate(((query, slice(0, 1)), (key, slice(-1, None)))):
        if norms is not None:
            rows = x.flatten(1) if config.qk_norm == "whole" else x
            x = norm(rows, None, norms[i], norms.eps)[1].view_as(x)
        if config.interleaved or rotated < config.head_dim:
            x = _halves(x, rotated, config.interleaved)
        turned.append(layer_plain.rotate(x, cos[:, place], sin[:, place]))
    return *turned, value


def _halves(x: Tensor, rotated: int, interleaved: bool) -> Tensor:
    """What is rotated together, half a head apart; what is not, at the end of each half.

    The order within a head is free where queries and keys have the same.
    """
    turned, still = x.split((rotated, x.shape[-1] - rotated), -1)
    pairs = turned.unflatten(-1, (-1, 2)).mT if interleaved else turned.unflatten(-1, (2, -1))
    return torch.cat((pairs, still.unflatten(-1, (2, -1))), -1).flatten(-2)


def _geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def liger() -> LayerOps:
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
