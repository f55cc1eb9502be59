"""The decoder: Llama, Mistral, Qwen2 and Qwen3 (dense), packed or cached, up to the hidden states.

One forward serves training and generation: they differ in the `attend` object that is passed in,
and without a gradient the same sums take fewer calls. Parameters have the fused shapes and names
that vLLM gives them. Shapes as in records.py; C is the number of rows kept in the last layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intfast.model import fixed
from intfast.model.architecture import ARCHITECTURES, Architecture
from intfast.model.attention import Attend, PackedAttention

__all__ = ["ARCHITECTURES", "Architecture", "Attend", "Decoder", "PackedAttention"]


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


class _Rotate(torch.autograd.Function):
    """Rotary embedding of (T, heads, K); the gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1K, sin_T1K)
        return _rotated(x, cos_T1K, sin_T1K, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos_T1K: Tensor, sin_T1K: Tensor, sign: int) -> Tensor:
    # Half by half, in place: a concatenation of the rotated halves would copy everything again.
    out = x * cos_T1K
    # Both halves of a head turn by the same angles.
    sin = sin_T1K.chunk(2, -1)[0]
    for half, other, direction in zip(out.chunk(2, -1), x.chunk(2, -1)[::-1], (-1, 1), strict=True):
        half.addcmul_(other, sin, value=sign * direction)
    return out


class _Ops(NamedTuple):
    """The three elementwise operations of a layer, in plain torch or as Liger's Triton kernels."""

    normalise: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor, Tensor], Tensor]


def _torch_ops() -> _Ops:
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)

    return _Ops(_Normalise.apply, rotate, lambda gate, up: F.silu(gate) * up)


def _liger_ops() -> _Ops:
    if importlib.util.find_spec("liger_kernel") is None:
        raise RuntimeError(
            "kernels 'liger' needs the package liger-kernel: install it or choose 'torch'"
        )
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # 0.0: no offset on the weight; False: leave the incoming gradient alone.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.transpose(0, 1)[None] for x in (query, key))
        q, k = LigerRopeFunction.apply(q, k, cos.transpose(0, 1), sin.transpose(0, 1))
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return _Ops(normalise, rotate, LigerSiLUMulFunction.apply)


class Linear(nn.Linear):
    """nn.Linear without the time for an initialisation: weights are loaded."""

    row_sizes: tuple[int, ...] = ()
    """Of the calls that generation makes; see fixed.py. Empty: one call."""

    def reset_parameters(self) -> None:
        """Leave the parameters as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., num_in) to (..., num_out)."""
        if not self.row_sizes or len(x) in self.row_sizes or not torch.is_inference_mode_enabled():
            return F.linear(x, self.weight, self.bias)
        return fixed.linear(x, self.weight, self.bias, self.row_sizes)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to x's dtype, then times weight."""

    def __init__(self, size: int, eps: float, ops: _Ops, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        # One call instead of three: a decode step of a small model is mostly calls.
        if torch.is_inference_mode_enabled():
            return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
        return self.ops.normalise(x, self.weight, self.eps)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: Architecture, layer: int, ops: _Ops, **factory: Any) -> None:
        super().__init__()
        c, size = config, config.hidden_size
        self.layer, self.window, self.ops = layer, c.windows[layer], ops
        self.heads, self.head_dim = (c.num_heads, c.num_kv_heads, c.num_kv_heads), c.head_dim
        self.input_layernorm = RMSNorm(size, c.norm_eps, ops, **factory)
        # Modules for the sake of the parameters' names, which are vLLM's.
        attn = self.self_attn = nn.Module()
        attn.qkv_proj = Linear(size, sum(self.heads) * c.head_dim, c.qkv_bias, **factory)
        attn.o_proj = Linear(c.num_heads * c.head_dim, size, c.o_bias, **factory)
        attn.q_norm = RMSNorm(c.head_dim, c.norm_eps, ops, **factory) if c.qk_norm else None
        attn.k_norm = RMSNorm(c.head_dim, c.norm_eps, ops, **factory) if c.qk_norm else None
        self.post_attention_layernorm = RMSNorm(size, c.norm_eps, ops, **factory)
        mlp = self.mlp = nn.Module()
        mlp.gate_up_proj = Linear(size, 2 * c.intermediate_size, c.mlp_bias, **factory)
        mlp.down_proj = Linear(c.intermediate_size, size, c.mlp_bias, **factory)

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, keep_C: Tensor | None
    ) -> Tensor:
        """(C, D), or (T, D) when keep_C is None."""
        attn, mlp = self.self_attn, self.mlp
        qkv = attn.qkv_proj(self.input_layernorm(x_TD)).unflatten(1, (-1, self.head_dim))
        # One product for queries, keys and values: its rows are vLLM's, in its order.
        query, key, value = qkv.split(self.heads, 1)
        if torch.is_inference_mode_enabled():
            query, key = self._prepared(qkv[:, : -self.heads[2]], rope).split(self.heads[:2], 1)
        else:
            if attn.q_norm is not None:
                query, key = attn.q_norm(query), attn.k_norm(key)
            query, key = self.ops.rotate(query, key, *rope)
        out = attend(self.layer, query, key, value, self.window).flatten(1)
        # Keys and values were needed of every token; what comes now, only of the rows asked for.
        if keep_C is not None:
            out, x_TD = out[keep_C], x_TD[keep_C]
        x = x_TD + attn.o_proj(out)
        gate_up = mlp.gate_up_proj(self.post_attention_layernorm(x))
        return x + mlp.down_proj(self.ops.gate(*gate_up.chunk(2, -1)))

    def _prepared(self, query_key: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Queries and keys, normalised and rotated together: half the calls of a decode step."""
        attn = self.self_attn
        if attn.q_norm is not None:
            pairs = zip((attn.q_norm, attn.k_norm), self.heads[:2], strict=True)
            weight = torch.cat([norm.weight.expand(num, -1) for norm, num in pairs])
            query_key = F.rms_norm(query_key, weight.shape[1:], None, attn.q_norm.eps) * weight
        return _rotated(query_key, *rope, 1)


class Decoder(nn.Module):
    """A decoder-only transformer up to its final norm, and its output head.

    Parameters are uninitialised: `intfast.model.weights.load` builds and fills a decoder. With
    `activation_checkpointing = True` each layer is computed again in the backward pass.
    """

    def __init__(
        self,
        config: Architecture,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: Literal["torch", "liger"] = "torch",
    ) -> None:
        """kernels: "liger" needs the package liger_kernel and a CUDA device."""
        super().__init__()
        if kernels not in ("torch", "liger"):
            raise ValueError(f"kernels: expected 'torch' or 'liger', got {kernels!r}")
        ops = _liger_ops() if kernels == "liger" else _torch_ops()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        # Uninitialised: the weights are loaded, or vLLM's own tensors take their place.
        table_VD = torch.empty(config.vocab_size, config.hidden_size, **factory)
        self.model.embed_tokens.weight = nn.Parameter(table_VD)
        layers = [Layer(config, i, ops, **factory) for i in range(config.num_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps, ops, **factory)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, **factory)
        # Not a parameter and not in the checkpoint: it follows from the config.
        inverse, self._rope_scale = config.rope.frequencies(config.head_dim, config.max_positions)
        self.register_buffer("_inverse_frequency", inverse.to(device), persistent=False)

    @property
    def head_weight_VD(self) -> Tensor:
        """The output head (V, D): a parameter of its own, or the embedding table when tied."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V) of final hidden states, in their dtype."""
        return F.linear(hidden_TD, self.head_weight_VD)

    def forward(
        self, token_T: Tensor, position_T: Tensor, attend: Attend, rows_C: Tensor | None = None
    ) -> Tensor:
        """Hidden states (T, D) after the final norm.

        token_T     (T,) int64, sequences end to end
        position_T  (T,) int64, position of each token in its sequence
        rows_C   (C,) int64: the rows to compute in the last layer and to return, in this order
        """
        # One stream of tokens for all sequences: nothing here knows where one ends, `attend` does.
        x = F.embedding(token_T, self.model.embed_tokens.weight)
        rope = self._rope(position_T, x.dtype)
        for i, layer in enumerate(self.model.layers):
            # Only the last layer may drop rows: those before it give keys and values to all.
            keep_C = rows_C if i == self.config.num_layers - 1 else None
            # The unit is a layer: its input is kept, the rest computed again backward.
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, keep_C, use_reentrant=False)
            else:
                x = layer(x, rope, attend, keep_C)
        return self.model.norm(x)

    def _rope(self, position_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # fp32: a position of 100,000 times a small frequency needs all its digits.
        angle_T1K = (position_T[:, None, None].float() * self._inverse_frequency).repeat(1, 1, 2)
        cos, sin = angle_T1K.cos() * self._rope_scale, angle_T1K.sin() * self._rope_scale
        return cos.to(dtype), sin.to(dtype)
