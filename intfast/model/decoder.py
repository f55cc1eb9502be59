"""The decoder: the dense families of families.py, packed or cached, up to the hidden states.

One forward serves training and generation: they differ in the `attend` object that is passed in,
and without a gradient the same sums take fewer calls. Parameters have the fused shapes and names
that vLLM gives them. Shapes as in records.py; C is the number of rows kept in the last layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intfast.kernels.norm_rope import HeadNorms
from intfast.model import checkpointing, linear
from intfast.model.architecture import ARCHITECTURES, Architecture
from intfast.model.attention import Attend, PackedAttention
from intfast.model.layer_ops import Kernels, LayerOps, in_place_of_norm, layer_ops
from intfast.model.linear import Embedding, Linear
from intfast.model.shards import Shards

__all__ = ["ARCHITECTURES", "Architecture", "Attend", "Decoder", "PackedAttention"]


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, then times weight; on the way, what was computed joins the stream."""

    def __init__(self, size: int, eps: float, ops: LayerOps, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps, self.ops = eps, ops

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + delta, and that normalised), each (T, D)."""
        return self.ops.add_rms_norm(x_TD, delta_TD, self.weight, self.eps)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: Architecture, layer: int, ops: LayerOps, **factory: Any) -> None:
        super().__init__()
        c, size = config, config.hidden_size
        self.layer, self.window, self.ops = layer, c.windows[layer], ops
        self.num_kv, self.head_dim = c.num_kv_heads, c.head_dim
        self.rotation = c.rotations.index(c.ropes[layer])

        def norm(place: int) -> nn.Module | None:
            name, own = c.norms[place], RMSNorm(size, c.norm_eps, ops, **factory)
            self.add_module(name or f"place_{place}", own if name else in_place_of_norm(c, place))
            return getattr(self, name or f"place_{place}")

        before_attn = norm(0)
        # Modules for the sake of the parameters' names, which are vLLM's.
        attn = self.self_attn = nn.Module()
        num_heads = c.num_heads + 2 * c.num_kv_heads
        attn.qkv_proj = Linear(size, num_heads * c.head_dim, c.qkv_bias, **factory)
        attn.o_proj = Linear(c.num_heads * c.head_dim, size, c.o_bias, **factory)
        for name, heads in (("q_norm", c.num_heads), ("k_norm", c.num_kv_heads)):
            width = c.head_dim * (heads if c.qk_norm == "whole" else 1)
            setattr(attn, name, RMSNorm(width, c.norm_eps, ops, **factory) if c.qk_norm else None)
        after_attn, before_mlp = norm(1), norm(2)
        mlp = self.mlp = nn.Module()
        mlp.gate_up_proj = Linear(size, 2 * c.intermediate_size, c.mlp_bias, **factory)
        mlp.down_proj = Linear(c.intermediate_size, size, c.mlp_bias, **factory)
        # A tuple, so that torch does not name them a second time.
        self.norms = (before_attn, after_attn, before_mlp, norm(3))

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, keep_C: Tensor | None
    ) -> Tensor:
        """(C, D), or (T, D) when keep_C is None."""
        attn, mlp = self.self_attn, self.mlp
        before_attn, after_attn, before_mlp, after_mlp = self.norms
        x_TD, normed_TD = before_attn(x_TD)
        # One product for queries, keys and values: its rows are vLLM's, in its order.
        qkv_TNK = attn.qkv_proj(normed_TD).unflatten(1, (-1, self.head_dim))
        q_norm, k_norm = attn.q_norm, attn.k_norm
        # Looked up in each call: vLLM's tensors may have taken the place of the weights.
        norms = q_norm and HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps)
        qkv = self.ops.norm_rope(qkv_TNK, self.num_kv, *rope, norms)
        out = attend(self.layer, *qkv, self.window).flatten(1)
        # Keys and values were needed of every token; what comes now, only of the rows asked for.
        if keep_C is not None:
            out, x_TD = out[keep_C], x_TD[keep_C]
        # The sum and its norm are one pass over memory where the kernels have one.
        out = attn.o_proj(out)
        x, normed = before_mlp(x_TD, out if after_attn is None else after_attn(out)[1])
        out = mlp.down_proj(self.ops.swiglu(mlp.gate_up_proj(normed)))
        return x + (out if after_mlp is None else after_mlp(out)[1])


class Decoder(nn.Module):
    """A decoder-only transformer up to its final norm, and its output head.

    Parameters are uninitialised: `intfast.model.weights.load` builds and fills a decoder.
    `activation_checkpointing` says what of each layer is computed again in the backward pass.
    """

    def __init__(
        self,
        config: Architecture,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: Kernels = "torch",
        shards: Shards | None = None,
    ) -> None:
        """kernels: see `layer_ops`; "liger" needs the package liger_kernel and a CUDA device.

        shards: what this rank holds, where several hold the model together
        """
        super().__init__()
        ops = layer_ops(kernels, config)
        factory = {"dtype": dtype, "device": device}
        # All sizes below are those of this rank; what is asked from outside, of the whole model.
        self.config, self.shards, own = config, shards, config if shards is None else shards.own
        self.head_options = {} if shards is None else {"vocabulary": shards.vocabulary}
        self.activation_checkpointing: checkpointing.Checkpointing = False
        self.model = nn.Module()
        # Uninitialised: the weights are loaded, or vLLM's own tensors take their place.
        self.model.embed_tokens = Embedding(own.vocab_size, config.hidden_size, **factory)
        layers = [Layer(own, i, ops, **factory) for i in range(config.num_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps, ops, **factory)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, own.vocab_size, False, **factory)
        if shards is not None:
            linear.divide(self.model, shards)
        # Not a parameter and not in the checkpoint: it follows from the config.
        inverse, scales = config.frequencies()
        self._rotations = [*zip(config.rotations, scales, strict=True)]
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
        x = self.model.embed_tokens(token_T)
        if self.config.embedding_scale != 1:
            # Rounded to the weights' type, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        ropes = self._ropes(position_T, x.dtype)
        for i, layer in enumerate(self.model.layers):
            # Only the last layer may drop rows: those before it give keys and values to all.
            keep_C = rows_C if i == self.config.num_layers - 1 else None
            # The unit of activation checkpointing is a layer.
            run = checkpointing.wrapped(layer, self.activation_checkpointing)
            x = run(x, ropes[layer.rotation], attend, keep_C)
        hidden, scale = self.model.norm(x)[1], self.config.logit_scale
        return hidden if scale == 1 else hidden * scale

    def _ropes(self, position_T: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Cosines and sines, of each of the config's rotations."""
        pairs = zip(self._rotations, self._inverse_frequency, strict=True)
        found = (rope.angles(position_T, inverse, scale) for (rope, scale), inverse in pairs)
        return [(cos.to(dtype), sin.to(dtype)) for cos, sin in found]
