"""What a Hugging Face config.json says of a decoder, and what of it is not implemented.

Values that the config leaves out follow the rules of each family in transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from intfast.model.families import DEFAULTS, FAMILIES, REQUIRED, Family, check_keys

ARCHITECTURES = {name: family.architecture for name, family in FAMILIES.items()}
# No model is larger, and a table of a billion layers would be built before the files are looked at.
_LARGEST = {"num_hidden_layers": 1024, "num_attention_heads": 4096}
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
    """The share of a head that is rotated, from its beginning."""
    llama_4_scaling_beta: float = 0.0
    """How queries grow with the logarithm of the position, in whole trained lengths."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        found = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        # Ministral 3's repeats it.
        found.pop("max_position_embeddings", None)
        length = "original_max_position_embeddings"
        defaults = {
            "rope_type": found.pop("type", "default"),
            "rope_theta": hf.get("rope_theta") or 10000.0,
            "partial_rotary_factor": hf.get("partial_rotary_factor") or 1.0,
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
        return rope

    def frequencies(self, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
        """Inverse frequencies (K/2,) fp32 on the CPU, and the factor on cosine and sine."""
        rotated = self.rotated(head_dim)
        inverse, scale = self._frequencies(rotated, max_positions)
        # What is not rotated comes last in each half: layer_ops.py puts it there.
        return F.pad(inverse, (0, (head_dim - rotated) // 2)), scale

    def rotated(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def angles(self, position_T: Tensor, inverse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines, scaled, (T, 1, K) fp32, or (T, 2, K): for queries and for keys."""
        # fp32: a position of 100,000 times a small frequency needs all its digits.
        angle_T1K = (position_T[:, None, None].float() * inverse).repeat(1, 1, 2)
        cos, sin = angle_T1K.cos() * scale, angle_T1K.sin() * scale
        if not self.llama_4_scaling_beta:
            return cos, sin
        lengths_T = (position_T / self.original_max_position_embeddings).floor()
        grown = (1 + self.llama_4_scaling_beta * lengths_T.log1p())[:, None, None]
        return torch.cat([cos * grown, cos], 1), torch.cat([sin * grown, sin], 1)

    def _frequencies(self, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
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
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    windows: tuple[int | None, ...]
    """Per layer: how many tokens a token sees, itself included; None for all before it."""
    ropes: tuple[Rope, ...]
    """Per layer."""
    norms: tuple[str | None, ...]
    """Names of those before and after attention, before and after the feed-forward."""
    norm_offset: bool
    qk_norm: Literal["", "head", "whole"]
    activation: str
    interleaved: bool
    """Whether neighbours of a head are rotated together, instead of its halves."""
    fused: tuple[str, ...]
    attention_scale: float | None = None
    """Of scores; None: 1 / sqrt(K)."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Architecture:
        """Read a config.json; raise ValueError naming the key for anything not implemented."""
        name = _check_supported(hf)
        family = FAMILIES[name]
        defaults = DEFAULTS | family.defaults
        hf = {**defaults, **hf}
        hf["rope_theta"] = hf["rope_theta"] or defaults["rope_theta"]
        heads = hf["num_attention_heads"]
        kv_heads = hf["num_key_value_heads"] or heads
        head_dim = hf["head_dim"] or defaults["head_dim"] or hf["hidden_size"] // heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"config.json: num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({kv_heads}), and head_dim ({head_dim}) even"
            )
        biases = {
            key: bool(hf[said] if isinstance(said := getattr(family, key), str) else said)
            for key in ("qkv_bias", "o_bias", "mlp_bias")
        }
        sliding = _sliding(hf, family)
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=hf["rms_norm_eps"],
            max_positions=hf["max_position_embeddings"],
            tied=bool(hf["tie_word_embeddings"]),
            windows=_windows(hf, family, sliding),
            ropes=_ropes(hf, name, sliding, head_dim),
            norms=family.norms,
            norm_offset=family.norm_offset,
            qk_norm=family.qk_norm,
            activation=family.activation[1],
            interleaved=family.interleaved,
            fused=family.fused,
            **biases,
            **family.scales(hf),
        )

    @property
    def rotations(self) -> tuple[Rope, ...]:
        """The different ones of `ropes`."""
        return tuple(dict.fromkeys(self.ropes))

    def frequencies(self) -> tuple[Tensor, list[float]]:
        """Of each of `rotations`: inverse frequencies (K/2,), stacked, and the factor of angles."""
        found = [rope.frequencies(self.head_dim, self.max_positions) for rope in self.rotations]
        # Queries and keys both have the root of what their products are to have.
        scale = 1.0
        if self.attention_scale is not None:
            scale = (self.attention_scale * self.head_dim**0.5) ** 0.5
        return torch.stack([inverse for inverse, _ in found]), [scale * own for _, own in found]


def _check_supported(hf: Mapping[str, Any]) -> str:
    """The family; ValueError if this is another kind of model or one with other options."""
    name = hf.get("model_type")
    named = hf.get("architectures") or [ARCHITECTURES.get(name)]
    if name not in ARCHITECTURES or ARCHITECTURES[name] not in named:
        raise ValueError(
            f"config.json: model_type {name!r} with architectures {named} is not supported; "
            f"supported: {', '.join(ARCHITECTURES.values())}"
        )
    required = [key for key in REQUIRED if key not in FAMILIES[name].defaults]
    if missing := [key for key in required if hf.get(key) is None]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    for key in (*REQUIRED, "head_dim"):
        size = hf.get(key)
        if size is not None and not (type(size) is int and 1 <= size <= _LARGEST.get(key, 1 << 24)):
            raise ValueError(
                f"config.json: {key}: expected a whole number from 1 to "
                f"{_LARGEST.get(key, 1 << 24):,}, got {size!r}"
            )
    check_keys(hf, name)
    return name


def _sliding(hf: Mapping[str, Any], family: Family) -> list[bool]:
    """Of each layer, by the rules of the family in transformers."""
    layers = hf["num_hidden_layers"]
    listed = hf.get("no_rope_layers")
    if listed is not None and not (isinstance(listed, list) and len(listed) >= layers):
        raise ValueError(f"config.json: no_rope_layers must name {layers} layers, got {listed!r}")
    if family.slides is None:
        return [False] * layers
    types = hf.get("layer_types")
    if types is None:
        return [family.slides(hf, i) for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ValueError(
            "config.json: layer_types must name sliding_attention or full_attention for each of "
            f"the {layers} layers, got {types}"
        )
    return [kind == "sliding_attention" for kind in types]


def _windows(hf: Mapping[str, Any], family: Family, sliding: list[bool]) -> tuple[int | None, ...]:
    is_on = "use_sliding_window" not in family.defaults or hf["use_sliding_window"]
    window = hf.get("sliding_window") if is_on else None
    return tuple(window if slides else None for slides in sliding)


def _ropes(
    hf: Mapping[str, Any], name: str, sliding: list[bool], head_dim: int
) -> tuple[Rope, ...]:
    """The rotation of each layer."""
    family = FAMILIES[name]
    if family.local_theta is None:
        partial = hf["partial_rotary_factor"] or family.partial_rotary
        both = [Rope.from_hf({**hf, "partial_rotary_factor": partial})] * 2
    else:
        # One for full attention, one for layers with a window; scaling of old is the former's.
        nested = dict(hf["rope_parameters"] or {})
        full = {"rope_theta": hf["rope_theta"]} | (nested.pop("full_attention", None) or {})
        local = {"rope_theta": hf.get("rope_local_base_freq") or family.local_theta}
        parts = [full | (hf["rope_scaling"] or {}), local | (nested.pop("sliding_attention", {}))]
        if nested:
            raise ValueError(
                "config.json, rope_parameters: expected full_attention and sliding_attention for "
                f"{name}, got {', '.join(nested)}"
            )
        both = [Rope.from_hf({**hf, "rope_scaling": part}) for part in parts]
    for rope in both:
        partial, beta = rope.partial_rotary_factor, rope.llama_4_scaling_beta
        is_other, rotated = rope.rope_type != "default", rope.rotated(head_dim)
        faults = {
            f"partial_rotary_factor = {partial}": partial != 1.0 and not family.partial_rotary,
            f"rope_type = {rope.rope_type!r}": is_other and family.partial_rotary,
            f"llama_4_scaling_beta = {beta}": beta and not family.grows,
            f"an odd number of rotated places ({rotated})": rotated % 2,
        }
        for fault in (said for said, is_so in faults.items() if is_so):
            raise ValueError(f"config.json, rope_parameters: {fault} is not supported for {name}")
    still = Rope(rope_theta=1.0, rope_type="default", partial_rotary_factor=0.0)
    turns = [family.rotates(hf, i) for i in range(len(sliding))]
    return tuple(both[s] if turned else still for s, turned in zip(sliding, turns, strict=True))
