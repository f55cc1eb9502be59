"""What a Hugging Face config.json says of a decoder, and what of it is not implemented.

Values that the config leaves out follow the rules of each family in transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec
import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
)
# No model is larger, and a table of a billion layers would be built before the files are looked at.
_LARGEST = {"num_hidden_layers": 1024, "num_attention_heads": 4096}
# Keys that change the computation, with the values that this project implements.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1.0),
    "dual_chunk_attention_config": (None,),
    "attention_dropout": (None, 0.0),
}
RopeType = Literal["default", "linear", "llama3", "yarn"]
ROPE_TYPES = get_args(RopeType)


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary embedding settings, under the names that Hugging Face gives them."""

    rope_theta: float
    rope_type: RopeType
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
        length = "original_max_position_embeddings"
        defaults = {
            "rope_type": found.pop("type", "default"),
            "rope_theta": hf.get("rope_theta") or 10000.0,
            length: hf["max_position_embeddings"],
        }
        if hf.get(length) is not None:
            found[length] = hf[length]
        given = {key: value for key, value in found.items() if value is not None}
        try:
            rope = msgspec.convert(defaults | given, cls)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"config.json, rope_parameters {found}: {error}; supported rope types: "
                f"{', '.join(ROPE_TYPES)}"
            ) from error
        needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
        for key in needed.get(rope.rope_type, []):
            if getattr(rope, key) is None:
                raise ValueError(f"config.json, rope_parameters: {rope.rope_type} needs {key}")
        if rope.partial_rotary_factor != 1.0:
            raise ValueError(
                "config.json, rope_parameters: partial_rotary_factor = "
                f"{rope.partial_rotary_factor} is not supported; only 1.0 is"
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
        if low == high:
            high += 0.001
        ramp = torch.arange(head_dim // 2, dtype=torch.float32).sub(low).div(high - low).clamp(0, 1)
        keep = 1 - ramp
        inverse = 1.0 / (factor * wave) * (1 - keep) + 1.0 / wave * keep
        scaling = self.attention_factor
        if scaling is None and self.mscale and self.mscale_all_dim:
            scaling = magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return inverse, magnitude() if scaling is None else scaling


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
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
    def from_hf(cls, hf: Mapping[str, Any]) -> Architecture:
        """Read a config.json; raise ValueError naming the key for anything not implemented."""
        family = _check_supported(hf)
        heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or heads
        head_dim = hf.get("head_dim") or (128 if family == "qwen3" else hf["hidden_size"] // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"config.json: num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({kv_heads}), and head_dim ({head_dim}) even"
            )
        bias = bool(hf.get("attention_bias")) and family in ("llama", "qwen3")
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_positions=hf["max_position_embeddings"],
            rope=Rope.from_hf(hf),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=family == "llama" and bool(hf.get("mlp_bias")),
            qk_norm=family == "qwen3",
            tied=bool(hf.get("tie_word_embeddings")),
            windows=_windows(hf, family),
        )


def _check_supported(hf: Mapping[str, Any]) -> str:
    """The family; ValueError if this is another kind of model or one with other options."""
    family = hf.get("model_type")
    named = hf.get("architectures") or [ARCHITECTURES.get(family)]
    if family not in ARCHITECTURES or ARCHITECTURES[family] not in named:
        raise ValueError(
            f"config.json: model_type {family!r} with architectures {named} is not supported; "
            f"supported: {', '.join(ARCHITECTURES.values())}"
        )
    required = _REQUIRED if family == "llama" else (*_REQUIRED, "num_key_value_heads")
    if missing := [key for key in required if hf.get(key) is None]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    for key in (*required, "num_key_value_heads", "head_dim"):
        size = hf.get(key)
        if size is not None and not (type(size) is int and 1 <= size <= _LARGEST.get(key, 1 << 24)):
            raise ValueError(
                f"config.json: {key}: expected a whole number from 1 to "
                f"{_LARGEST.get(key, 1 << 24):,}, got {size!r}"
            )
    for key, allowed in _ALLOWED.items():
        if key in hf and hf[key] not in allowed:
            raise ValueError(
                f"config.json: {key} = {hf[key]!r} is not supported; it may be "
                f"{' or '.join(map(repr, allowed))}"
            )
    return family


def _windows(hf: Mapping[str, Any], family: str) -> tuple[int | None, ...]:
    """The sliding window of each layer, by the rules of the family in transformers."""
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    window = hf.get("sliding_window", 4096)
    if family in ("llama", "mistral"):
        # transformers' Llama and Mistral ignore these keys; other software does not.
        ignored = {"layer_types": types}
        if family == "llama":
            ignored["sliding_window"] = hf.get("sliding_window")
        for key, value in ignored.items():
            if value is not None:
                raise ValueError(f"config.json: {key} = {value!r} is not supported for {family}")
        return (window if family == "mistral" else None,) * layers
    if not hf.get("use_sliding_window"):
        window = None
    if types is None:
        first = hf.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ValueError(
            "config.json: layer_types must name sliding_attention or full_attention for each of "
            f"the {layers} layers, got {types}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
