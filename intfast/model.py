"""The decoder: Llama, Mistral, Qwen2 and Qwen3 (dense), packed or cached, up to the hidden states.

One forward serves training and generation; they differ only in the `attend` object that is passed
in. Parameters have the fused shapes and the names that vLLM gives them. Shapes as in records.py;
P is the number of padded rows, C the number of kept rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Hugging Face config keys that change the computation in a way this file does not implement,
# with the values that switch them off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1.0),
    "dual_chunk_attention_config": (None,),
    "attention_dropout": (None, 0.0),
}


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary embedding settings, under the names that Hugging Face gives them."""

    rope_theta: float
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        found = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        kind = found.pop("type", "default")
        found.setdefault("rope_type", kind)
        if found.get("rope_theta") is None:
            found["rope_theta"] = hf.get("rope_theta") or 10000.0
        original = found.get("original_max_position_embeddings")
        original = hf.get("original_max_position_embeddings") or original
        found["original_max_position_embeddings"] = original or hf["max_position_embeddings"]
        try:
            rope = msgspec.convert({k: v for k, v in found.items() if v is not None}, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"config.json, rope_parameters: not supported: {error}") from error
        needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
        for key in needed.get(rope.rope_type, []):
            if getattr(rope, key) is None:
                raise ValueError(f"config.json, rope_parameters: {rope.rope_type} needs {key}")
        if rope.partial_rotary_factor != 1.0:
            raise ValueError(
                "config.json, rope_parameters: partial_rotary_factor must be 1.0, "
                f"got {rope.partial_rotary_factor}"
            )
        return rope

    def frequencies(self, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
        """Inverse frequencies (K/2,) fp32 on the CPU, and the factor on cosine and sine."""
        wave = self.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        inverse = 1.0 / wave
        if self.rope_type == "linear":
            return inverse / self.factor, 1.0
        if self.rope_type == "llama3":
            return self._llama3(inverse), 1.0
        if self.rope_type == "yarn":
            return self._yarn(wave, head_dim, max_positions)
        return inverse, 1.0

    def _llama3(self, inverse: Tensor) -> Tensor:
        trained = self.original_max_position_embeddings
        low, high = self.low_freq_factor, self.high_freq_factor
        length = 2 * math.pi / inverse
        smooth = (trained / length - low) / (high - low)
        between = (1 - smooth) * inverse / self.factor + smooth * inverse
        scaled = torch.where(length > trained / low, inverse / self.factor, between)
        return torch.where(length < trained / high, inverse, scaled)

    def _yarn(self, wave: Tensor, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
        trained = self.original_max_position_embeddings
        factor = self.factor or max_positions / trained

        def magnitude(scale: float = 1.0) -> float:
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

        def index_of(rotations: float) -> float:
            turns = math.log(trained / (rotations * 2 * math.pi))
            return head_dim * turns / (2 * math.log(self.rope_theta))

        low, high = index_of(self.beta_fast or 32), index_of(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # The width of the ramp when both ends coincide, as in the paper's implementation.
        high = high + 0.001 if low == high else high
        ramp = torch.arange(head_dim // 2, dtype=torch.float32).sub(low).div(high - low).clamp(0, 1)
        keep = 1 - ramp
        inverse = 1.0 / (factor * wave) * (1 - keep) + 1.0 / wave * keep
        scaling = self.attention_factor
        if scaling is None and self.mscale and self.mscale_all_dim:
            scaling = magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return inverse, magnitude() if scaling is None else scaling


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the decoder needs to know of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]
    """Per layer: how many tokens a token sees, itself included; None for all before it."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json; raise ValueError naming the key for anything not implemented."""
        family = _check_supported(hf)
        heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({kv_heads})"
            )
        default_head_dim = 128 if family == "qwen3" else hf["hidden_size"] // heads
        bias = bool(hf.get("attention_bias"))
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hf.get("head_dim") or default_head_dim,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_positions=hf["max_position_embeddings"],
            rope=Rope.from_hf(hf),
            qkv_bias=family == "qwen2" or (bias and family != "mistral"),
            o_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=family == "llama" and bool(hf.get("mlp_bias")),
            qk_norm=family == "qwen3",
            tied=bool(hf.get("tie_word_embeddings", False)),
            windows=_windows(hf, family),
        )


def _check_supported(hf: Mapping[str, Any]) -> str:
    family = hf.get("model_type")
    named = hf.get("architectures") or [ARCHITECTURES.get(family)]
    if family not in ARCHITECTURES or ARCHITECTURES[family] not in named:
        raise ValueError(
            f"config.json: model_type {family!r} with architectures {named} is not supported; "
            f"supported: {', '.join(ARCHITECTURES.values())}"
        )
    required = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    required += "max_position_embeddings" + (" num_key_value_heads" if family != "llama" else "")
    if missing := [key for key in required.split() if hf.get(key) is None]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    for key, off in _REFUSED.items():
        if hf.get(key) not in off:
            raise ValueError(f"config.json: {key} = {hf[key]!r} is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act must be silu, got {hf['hidden_act']!r}")
    return family


def _windows(hf: Mapping[str, Any], family: str) -> tuple[int | None, ...]:
    """The sliding window of each layer, by the rules of the family in transformers."""
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    if family in ("llama", "mistral"):
        # transformers' Llama and Mistral ignore layer_types; other software does not.
        if types is not None:
            raise ValueError(f"config.json: layer_types is not supported for {family}")
        return (hf.get("sliding_window", 4096) if family == "mistral" else None,) * layers
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    if types is None:
        first = hf.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ValueError(
            f"config.json: layer_types must name sliding_attention or full_attention for each of "
            f"{layers} layers, got {types}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class Attend(Protocol):
    """Attention of one layer: the only thing in which packed and cached forward differ."""

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """Causal attention output (T, H, K), scaled by 1/sqrt(K); query and key are rotated."""


class _Reorder(torch.autograd.Function):
    """Rows in another order, as a gather in both directions (index_add is slow on the CPU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, holes: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, holes)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, holes = ctx.saved_tensors
        return grad.index_select(0, inverse).index_fill_(0, holes, 0), None, None, None


class PackedAttention:
    """Causal attention within each of the packed sequences, which never see each other.

    bf16 on CUDA goes to the variable-length kernel. Otherwise sequences are padded on the right
    inside attention only: a padded key comes after every real query, so the causal rule hides it.
    """

    # Sequences share a padded block while the shortest has this share of the longest's length.
    FILL = 0.75

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """lengths: tokens of each sequence, in packed order, each >= 1."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must hold at least one number, all >= 1, got {lengths}")
        self.lengths = [int(n) for n in lengths]
        self.num_tokens = sum(self.lengths)
        self.longest = max(self.lengths)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            starts = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
            self.starts = starts.to(self.device)
        self.dense = min(self.lengths) == self.longest
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._plan()

    def _plan(self) -> None:
        """Blocks (S, L) of similar length and the row indices into and out of them."""
        order = sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])
        starts = [0]
        for n in self.lengths:
            starts.append(starts[-1] + n)
        self.blocks: list[tuple[int, int]] = []
        into, out = [], torch.empty(self.num_tokens, dtype=torch.int64)
        holes, row = [], 0
        for s in order:
            n = self.lengths[s]
            if not self.blocks or n < self.FILL * self.blocks[-1][1]:
                self.blocks.append((0, n))
            count, width = self.blocks[-1]
            self.blocks[-1] = (count + 1, width)
            # Padding repeats the sequence's own last token: nothing of another gets in.
            into.append(torch.arange(width).clamp_(max=n - 1) + starts[s])
            out[starts[s] : starts[s] + n] = torch.arange(row, row + n)
            holes.append(torch.arange(row + n, row + width))
            row += width
        self.into_P = torch.cat(into).to(self.device)
        self.out_T = out.to(self.device)
        self.holes = torch.cat(holes).to(self.device)
        self.no_holes = self.holes.new_empty(0)

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """See Attend."""
        if query_THK.is_cuda and query_THK.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(query_THK, key_TJK, value_TJK, window)
        qkv = (query_THK, key_TJK, value_TJK)
        if self.dense:
            return self._block(*qkv, (len(self.lengths), self.longest), window)
        padded = [_Reorder.apply(x, self.into_P, self.out_T, self.no_holes) for x in qkv]
        sizes = [count * width for count, width in self.blocks]
        parts = zip(*(x.split(sizes) for x in padded), self.blocks, strict=True)
        out_PHK = torch.cat([self._block(*part, window) for part in parts])
        return _Reorder.apply(out_PHK, self.out_T, self.into_P, self.holes)

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

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if window is None else window - 1
        return varlen_attn(
            query,
            key,
            value,
            self.starts,
            self.starts,
            self.longest,
            self.longest,
            window_size=(left, 0),
            enable_gqa=True,
        )


class Linear(nn.Module):
    """x @ weight.T + bias. Unlike nn.Linear, does not spend time on an initialisation."""

    def __init__(self, num_in: int, num_out: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, **factory))
        self.bias = nn.Parameter(torch.empty(num_out, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Normalise(torch.autograd.Function):
    """RMSNorm with half the passes over memory that autograd makes of the formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        grad, normal, wide = grad.float(), normal.float(), weight.float()
        product = grad * normal
        # mean over the row of (grad * weight * normal): the part along x, which is taken out.
        along = (product @ wide).div_(wide.shape[0]).unsqueeze_(-1)
        grad_x = torch.mul(grad, wide).addcmul_(normal, along, value=-1).mul_(scale)
        grad_weight = product.flatten(0, -2).sum(0)
        return grad_x.to(weight.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to x's dtype, then times weight."""

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Normalise.apply(x, self.weight, self.eps)


class _Rotate(torch.autograd.Function):
    """Rotary embedding of (T, heads, K); the gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1K, sin_T1K)
        return _rotated(x, cos_T1K, sin_T1K, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """cos has width K, sin K/2: both halves of a head turn by the same angles."""
    out = x * cos
    first, second = x.chunk(2, -1)
    out_first, out_second = out.chunk(2, -1)
    out_first.addcmul_(second, sin, value=-sign)
    out_second.addcmul_(first, sin, value=sign)
    return out


class Attention(nn.Module):
    """Projections, normalisation and rotation of queries and keys around `attend`."""

    def __init__(self, config: ModelConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        c = config
        self.layer, self.window = layer, c.windows[layer]
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv_proj = Linear(c.hidden_size, rows, c.qkv_bias, **factory)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, c.o_bias, **factory)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, **factory) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, **factory) if c.qk_norm else None

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, keep_C: Tensor | None
    ) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv_proj(x_TD).unflatten(1, (-1, self.head_dim))
        if self.q_norm is None:
            rotated, value = qkv.split((heads + kv_heads, kv_heads), 1)
        else:
            query, key, value = qkv.split((heads, kv_heads, kv_heads), 1)
            rotated = torch.cat((self.q_norm(query), self.k_norm(key)), 1)
        query, key = _Rotate.apply(rotated, *rope).split((heads, kv_heads), 1)
        out = attend(self.layer, query, key, value, self.window).flatten(1)
        return self.o_proj(out if keep_C is None else out[keep_C])


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, **factory: Any) -> None:
        super().__init__()
        c = config
        self.gate_up_proj = Linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias, **factory)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, **factory)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_TD).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        self.self_attn = Attention(config, layer, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        self.mlp = MLP(config, **factory)

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, keep_C: Tensor | None
    ) -> Tensor:
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
    ) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.activation_checkpointing = False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        table = torch.empty(config.vocab_size, config.hidden_size, **factory)
        self.model.embed_tokens.weight = nn.Parameter(table)
        layers = [Layer(config, i, **factory) for i in range(config.num_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
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
        last_only   (C,) int64 rows to compute in the last layer and to return, in this order
        """
        x = F.embedding(token_T, self.model.embed_tokens.weight)
        rope = self._rope(position_T, x.dtype)
        for i, layer in enumerate(self.model.layers):
            keep = last_only if i == self.config.num_layers - 1 else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, keep, use_reentrant=False)
            else:
                x = layer(x, rope, attend, keep)
        return self.model.norm(x)

    def _rope(self, position_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle_T1K = position_T[:, None, None].float() * self._inverse_frequency
        cos, sin = angle_T1K.cos() * self._rope_scale, angle_T1K.sin() * self._rope_scale
        return cos.repeat(1, 1, 2).to(dtype), sin.to(dtype)
