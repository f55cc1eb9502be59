"""The families of decoders that the one forward of decoder.py serves: what sets each apart.

`defaults` is also the list of keys that a family reads beyond those that all read. A key of
config.json that is neither read nor known to be without effect is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

HF = Mapping[str, Any]

BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")


class Family(NamedTuple):
    """How a family differs from Llama without biases."""

    architecture: str
    """transformers' class, as config.json names it."""
    defaults: dict[str, Any]
    """Of transformers, for what config.json leaves out; None for heads: as many as queries have."""
    norms: tuple[str | None, ...] = BEFORE
    """Names of the norms before and after attention, before and after the feed-forward."""
    qk_norm: Literal["", "head", "whole"] = ""
    """Of queries and keys: none, of each head, or of all heads at once."""
    norm_offset: bool = False
    """Whether norms multiply by 1 + weight."""
    qkv_bias: bool | str = False
    """Or the key that says."""
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Of the gate: the key, and the value that it may have."""
    slides: Callable[[HF, int], bool] | None = None
    """Whether a layer has the window, where `layer_types` does not say; None: no windows."""
    rotates: Callable[[HF, int], bool] = lambda hf, layer: True
    partial_rotary: float | None = None
    """The share of a head that is rotated, by default; None: the whole."""
    interleaved: bool = False
    """Whether neighbours are rotated together, instead of the halves of a head."""
    grows: bool = False
    """Whether queries may grow with the position (llama_4_scaling_beta)."""
    local_theta: float | None = None
    """Of layers with a window, where they have a rotation of their own."""
    scales: Callable[[HF], dict[str, float]] = lambda hf: {}
    """Fields of Architecture: scales of scores, embedding, residual branches and logits."""
    fused: tuple[str, ...] = ()
    """Products that the files hold fused, too."""
    serves: str = ""
    """Why vLLM's tensors cannot be shared; "" where they can."""


_NO_TABLE = "vLLM serves it through transformers' own modules, which have other tensors"


def _all_but_each(nth: int, key: str = "") -> Callable[[HF, int], bool]:
    return lambda hf, layer: (layer + 1) % (hf.get(key) or nth) != 0


def _has_rope(hf: HF, layer: int) -> bool:
    listed = hf["no_rope_layers"]
    return bool(listed[layer]) if listed else _all_but_each(4, "no_rope_layer_interval")(hf, layer)


_QWEN_WINDOWS = {
    **{"use_sliding_window": False, "sliding_window": 4096},
    **{"max_window_layers": 28, "layer_types": None},
}
_BOTH_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
        **_BOTH_BIASES,
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        "MistralForCausalLM", {"sliding_window": 4096}, slides=lambda hf, layer: True
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _QWEN_WINDOWS,
        qkv_bias=True,
        slides=lambda hf, layer: layer >= hf["max_window_layers"],
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN_WINDOWS | {"attention_bias": False, "head_dim": 128},
        qk_norm="head",
        **_BOTH_BIASES,
        slides=lambda hf, layer: layer >= hf["max_window_layers"],
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"num_key_value_heads": None, "attention_bias": False, "rms_norm_eps": 1e-5},
        norms=AFTER,
        qk_norm="whole",
        **_BOTH_BIASES,
        serves=_NO_TABLE,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"num_key_value_heads": None, "attention_bias": False, "rms_norm_eps": 1e-5}
        | {"rope_theta": 500_000.0, "sliding_window": 4096, "layer_types": None},
        norms=AFTER,
        qk_norm="whole",
        **_BOTH_BIASES,
        slides=_all_but_each(4),
        local_theta=500_000.0,
        serves=_NO_TABLE,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
        | {"mlp_bias": False, "max_window_layers": 28}
        | {"attention_bias": False, "tie_word_embeddings": True, "rope_theta": 2_000_000.0}
        | {"no_rope_layers": None, "no_rope_layer_interval": 4},
        **_BOTH_BIASES,
        mlp_bias="mlp_bias",
        slides=lambda hf, layer: not _has_rope(hf, layer),
        rotates=_has_rope,
        serves=_NO_TABLE,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {"sliding_window": None, "head_dim": 128, "rms_norm_eps": 1e-5},
        slides=lambda hf, layer: True,
        grows=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256}
        | {"rope_theta": 1_000_000.0, "rope_local_base_freq": None, "query_pre_attn_scalar": 256}
        | {"sliding_window": 4096, "sliding_window_pattern": 6, "layer_types": None},
        norms=(
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        qk_norm="head",
        norm_offset=True,
        **_BOTH_BIASES,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        slides=_all_but_each(6, "sliding_window_pattern"),
        local_theta=10_000.0,
        scales=lambda hf: {
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "embedding_scale": hf["hidden_size"] ** 0.5,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"num_key_value_heads": None, "rms_norm_eps": 1e-5, "sliding_window": None}
        | {"original_max_position_embeddings": 4096},
        slides=lambda hf, layer: True,
        partial_rotary=1.0,
        fused=("qkv_proj", "gate_up_proj"),
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        {"attention_bias": True, "head_dim": 128, "rms_norm_eps": 0.00000015625},
        norms=(
            *("input_layernorm", "post_self_attn_layernorm"),
            *("post_attention_layernorm", "post_mlp_layernorm"),
        ),
        qkv_bias="attention_bias",
        partial_rotary=0.5,
        interleaved=True,
        fused=("gate_up_proj",),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False}
        | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0}
        | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
        **_BOTH_BIASES,
        mlp_bias="mlp_bias",
        scales=lambda hf: {
            "attention_scale": hf["attention_multiplier"],
            "embedding_scale": hf["embedding_multiplier"],
            "residual_scale": hf["residual_multiplier"],
            "logit_scale": 1 / hf["logits_scaling"],
        },
    ),
}
REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
# What every family reads, and what the values are where config.json leaves them out.
DEFAULTS = {
    **{"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    **{"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None},
    **{"original_max_position_embeddings": None, "partial_rotary_factor": None},
}
# Of writing, training and sampling software: nothing of the forward depends on them.
HARMLESS = {
    *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("transformers.js_config", "auto_map", "name_or_path", "attn_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class"),
    *("initializer_range", "use_cache", "cache_implementation", "pretraining_tp"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_llama_config", "problem_type"),
    *("id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states"),
    *("temperature", "top_k", "top_p", "do_sample", "max_length", "repetition_penalty"),
    *("gradient_checkpointing", "task_specific_params", "unsloth_fixed", "unsloth_version"),
}
# Switches that are off, numbers that are absent: whatever a key means, it means nothing then.
INERT = (None, False, 0, "", [], {})


def check_keys(hf: HF, name: str) -> None:
    """Raise ValueError for the first key that is not read and may change the computation."""
    family = FAMILIES[name]
    read = {*REQUIRED, *DEFAULTS, *family.defaults, family.activation[0], *HARMLESS}
    for key, value in hf.items():
        if key not in read and not key.startswith("_") and value not in INERT:
            raise ValueError(
                f"config.json: {key} = {value!r} is not supported for {name}: it is unknown here "
                "and may change the computation; take a model without it, or remove the key if "
                "it is known to have no effect on this model"
            )
    key, allowed = family.activation
    if hf.get(key, allowed) != allowed:
        raise ValueError(
            f"config.json: {key} = {hf[key]!r} is not supported for {name}; it may be {allowed!r}"
        )
    for key, default in (DEFAULTS | family.defaults).items():
        value = hf.get(key)
        is_number = type(value) in (int, float) and (value > 0 or key == "max_window_layers")
        if type(default) in (int, float) and value is not None and not is_number:
            raise ValueError(f"config.json: {key}: expected a number above 0, got {value!r}")
