"""The decoder: Llama, Mistral, Qwen2 and Qwen3 (dense), packed or cached, up to the hidden states.

One forward serves training and generation; they differ only in the `attend` object that is passed
in. Parameters have the fused shapes and the names that vLLM gives them. Shapes as in records.py;
C is the number of rows kept in the last layer, P the padded rows inside attention.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from intfast import fixed
from intfast.architecture import ARCHITECTURES, ModelConfig

__all__ = ["ARCHITECTURES", "Attend", "Decoder", "ModelConfig", "PackedAttention"]

# Grouped heads always worked; torch 2.12 began to ask for a word.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Attend(Protocol):
    """Attention of one layer: the only thing in which packed and cached forward differ."""

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """Causal attention output (T, H, K), scaled by 1/sqrt(K); query and key are rotated.

        window: how many tokens a token sees, itself included; None for all before it
        """


class _Reorder(torch.autograd.Function):
    """x[index], with a gather as its gradient too: adding at an index is slow on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, holes: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, holes)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, holes = ctx.saved_tensors
        return grad.index_select(0, inverse).index_fill_(0, holes, 0), None, None, None


class _Padding(NamedTuple):
    """Sequences of similar length share a block (S, L); rows of all blocks end to end."""

    blocks: list[tuple[int, int]]
    into_P: Tensor
    out_T: Tensor
    holes: Tensor
    """The padded rows; their gradient is zero."""


class PackedAttention:
    """Causal attention within each of the packed sequences, which never see each other.

    16-bit tensors on CUDA go to the variable-length kernel. Otherwise sequences are padded on the
    right inside attention only: padding comes after every real query, which is causal.
    """

    # A sequence shares a block with a longest one that it fills to this part.
    FILL = 0.75

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """lengths: tokens of each sequence, in packed order, each >= 1."""
        self.lengths = [int(n) for n in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: expected numbers >= 1, at least one, got {self.lengths}")
        self.num_tokens, self.longest = sum(self.lengths), max(self.lengths)
        self.device = torch.device(device)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """See Attend."""
        if len(query_THK) != self.num_tokens:
            raise ValueError(
                f"attention: lengths sum to {self.num_tokens}, got {len(query_THK)} tokens"
            )
        qkv = (query_THK, key_TJK, value_TJK)
        if query_THK.is_cuda and query_THK.dtype in (torch.bfloat16, torch.float16):
            left = -1 if window is None else window - 1
            starts, longest = self._starts, self.longest
            return varlen_attn(
                *qkv, starts, starts, longest, longest, window_size=(left, 0), **_GROUPED
            )
        if min(self.lengths) == self.longest:
            return self._block(*qkv, (len(self.lengths), self.longest), window)
        blocks, into_P, out_T, holes = self._padding
        padded = [_Reorder.apply(x, into_P, out_T, holes[:0]) for x in qkv]
        sizes = [count * width for count, width in blocks]
        parts = zip(*(x.split(sizes) for x in padded), blocks, strict=True)
        out_PHK = torch.cat([self._block(*part, window) for part in parts])
        return _Reorder.apply(out_PHK, out_T, into_P, holes)

    @cached_property
    def _starts(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @cached_property
    def _padding(self) -> _Padding:
        blocks: list[tuple[int, int]] = []
        order = sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])
        for s in order:
            if not blocks or self.lengths[s] < self.FILL * blocks[-1][1]:
                blocks.append((0, self.lengths[s]))
            blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1])
        counts, widths = torch.tensor(blocks).T
        width_S = widths.repeat_interleave(counts)
        length_S = torch.tensor(self.lengths)
        row_P = torch.arange(int(width_S.sum()))
        first_P = (width_S.cumsum(0) - width_S).repeat_interleave(width_S)
        sequence_P = torch.tensor(order).repeat_interleave(width_S)
        last_P = length_S[sequence_P] - 1
        # Padding repeats the sequence's own last token: nothing of another gets in.
        into_P = (row_P - first_P).minimum(last_P) + (length_S.cumsum(0) - length_S)[sequence_P]
        real_P = row_P - first_P <= last_P
        out_T = torch.empty(self.num_tokens, dtype=torch.int64)
        out_T[into_P[real_P]] = row_P[real_P]
        return _Padding(blocks, *(x.to(self.device) for x in (into_P, out_T, row_P[~real_P])))

    def _block(
        self, query: Tensor, key: Tensor, value: Tensor, size: tuple[int, int], window: int | None
    ) -> Tensor:
        q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in (query, key, value))
        mask = None if window is None or window >= size[1] else self._mask(size[1], window)
        out_SHLK = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out_SHLK.transpose(1, 2).flatten(0, 1)

    def _mask(self, length: int, window: int) -> Tensor:
        if (length, window) not in self._masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.device)
            self._masks[length, window] = seen.tril().triu(1 - window)
        return self._masks[length, window]


class _Normalise(torch.autograd.Function):
    """RMSNorm with half the passes over memory that autograd makes of the formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = (wide * scale).to(x.dtype)
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


class Linear(nn.Module):
    """x @ weight.T + bias. Unlike nn.Linear, does not spend time on an initialisation."""

    def __init__(self, num_in: int, num_out: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, **factory))
        self.bias = nn.Parameter(torch.empty(num_out, **factory)) if bias else None
        self.row_sizes: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(..., num_in) to (..., num_out)."""
        return fixed.linear(x, self.weight, self.bias, self.row_sizes)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to x's dtype, then times weight."""

    def __init__(self, size: int, eps: float, ops: _Ops, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        if torch.is_inference_mode_enabled():
            return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
        return self.ops.normalise(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections, normalisation and rotation of queries and keys around `attend`."""

    def __init__(self, config: ModelConfig, layer: int, ops: _Ops, **factory: Any) -> None:
        super().__init__()
        c = config
        self.layer, self.window, self.ops = layer, c.windows[layer], ops
        self.heads, self.head_dim = (c.num_heads, c.num_kv_heads, c.num_kv_heads), c.head_dim
        self.qkv_proj = Linear(c.hidden_size, sum(self.heads) * c.head_dim, c.qkv_bias, **factory)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, c.o_bias, **factory)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, ops, **factory) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, ops, **factory) if c.qk_norm else None

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, keep_C: Tensor | None
    ) -> Tensor:
        """(C, D), or (T, D) when keep_C is None."""
        qkv = self.qkv_proj(x_TD).unflatten(1, (-1, self.head_dim))
        query, key, value = qkv.split(self.heads, 1)
        if torch.is_inference_mode_enabled():
            query, key = self._prepared(qkv[:, : -self.heads[2]], rope).split(self.heads[:2], 1)
        else:
            if self.q_norm is not None:
                query, key = self.q_norm(query), self.k_norm(key)
            query, key = self.ops.rotate(query, key, *rope)
        out = attend(self.layer, query, key, value, self.window).flatten(1)
        return self.o_proj(out if keep_C is None else out[keep_C])

    def _prepared(self, query_key: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Queries and keys, normalised and rotated together: half the calls of a decode step."""
        if self.q_norm is not None:
            pairs = zip((self.q_norm, self.k_norm), self.heads[:2], strict=True)
            weight = torch.cat([norm.weight.expand(num, -1) for norm, num in pairs])
            query_key = F.rms_norm(query_key, weight.shape[1:], None, self.q_norm.eps) * weight
        return _rotated(query_key, *rope, 1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, ops: _Ops, **factory: Any) -> None:
        super().__init__()
        c = config
        self.ops = ops
        self.gate_up_proj = Linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias, **factory)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, **factory)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        return self.down_proj(self.ops.gate(*self.gate_up_proj(x_TD).chunk(2, -1)))


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int, ops: _Ops, **factory: Any) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = RMSNorm(size, eps, ops, **factory)
        self.self_attn = Attention(config, layer, ops, **factory)
        self.post_attention_layernorm = RMSNorm(size, eps, ops, **factory)
        self.mlp = MLP(config, ops, **factory)

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, keep_C: Tensor | None
    ) -> Tensor:
        """(C, D), or (T, D) when keep_C is None."""
        out = self.self_attn(self.input_layernorm(x_TD), rope, attend, keep_C)
        x = (x_TD if keep_C is None else x_TD[keep_C]) + out
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A decoder-only transformer up to its final norm, and its output head.

    Parameters are uninitialised: `intfast.weights.load` builds and fills a decoder. With
    `activation_checkpointing = True` each layer is computed again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
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
        table_VD = torch.empty(config.vocab_size, config.hidden_size, **factory)
        self.model.embed_tokens.weight = nn.Parameter(table_VD)
        layers = [Layer(config, i, ops, **factory) for i in range(config.num_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps, ops, **factory)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, **factory)
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
        self, token_T: Tensor, position_T: Tensor, attend: Attend, last_only: Tensor | None = None
    ) -> Tensor:
        """Hidden states (T, D) after the final norm.

        token_T     (T,) int64, sequences end to end
        position_T  (T,) int64, position of each token in its sequence
        last_only   (C,) int64: the rows to compute in the last layer and to return, in this order
        """
        x = F.embedding(token_T, self.model.embed_tokens.weight)
        rope = self._rope(position_T, x.dtype)
        for i, layer in enumerate(self.model.layers):
            keep_C = last_only if i == self.config.num_layers - 1 else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, keep_C, use_reentrant=False)
            else:
                x = layer(x, rope, attend, keep_C)
        return self.model.norm(x)

    def _rope(self, position_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle_T1K = (position_T[:, None, None].float() * self._inverse_frequency).repeat(1, 1, 2)
        cos, sin = angle_T1K.cos() * self._rope_scale, angle_T1K.sin() * self._rope_scale
        return cos.to(dtype), sin.to(dtype)
