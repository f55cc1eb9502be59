"""The families of decoders that the one forward of decoder.py serves: what sets each apart.

`Family.defaults` is also the list of keys that a family reads beyond those that all read. A key of
config.json that is neither read nor known to be without effect is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

HF = Mapping[str, Any]

_BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _always(hf: HF, layer: int) -> bool:
    return True


def _late(hf: HF, layer: int) -> bool:
    return layer >= hf["max_window_layers"]


def _all_but_each(nth: int, key: str = "") -> Callable[[HF, int], bool]:
    return lambda hf, layer: (layer + 1) % (hf.get(key) or nth) != 0


def _has_rope(hf: HF, layer: int) -> bool:
    listed = hf["no_rope_layers"]
    return bool(listed[layer]) if listed else _all_but_each(4, "no_rope_layer_interval")(hf, layer)


class Family(NamedTuple):
    """How a family differs from Llama without biases."""

    architecture: str
    """transformers' class, as config.json names it."""
    defaults: dict[str, Any]
    """Of transformers, for what config.json leaves out; None for heads: as many as queries have."""
    norms: tuple[str | None, ...] = _BEFORE
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
    rotates: Callable[[HF, int], bool] = _always
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


_QWEN = {
    **{"use_sliding_window": False, "sliding_window": 4096},
    **{"max_window_layers": 28, "layer_types": None},
}
_LLAMA = {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False}
_OLMO = {"num_key_value_heads": None, "attention_bias": False, "rms_norm_eps": 1e-5}
_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA, **_BIASES, mlp_bias="mlp_bias"),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}, slides=_always),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True, slides=_late),
    "qwen3": Family(
        "Qwen3ForCausalLM", _QWEN | {"attention_bias": False, "head_dim": 128}, qk_norm="head",
        **_BIASES, slides=_late
    ),
    "olmo2": Family("Olmo2ForCausalLM", _OLMO, norms=_AFTER, qk_norm="whole", **_BIASES),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _OLMO | {"rope_theta": 500_000.0, "sliding_window": 4096, "layer_types": None},
        norms=_AFTER, qk_norm="whole", **_BIASES, slides=_all_but_each(4), local_theta=500_000.0
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _QWEN | {"sliding_window": None, "attention_bias": False, "mlp_bias": False}
        | {"tie_word_embeddings": True, "rope_theta": 2_000_000.0}
        | {"no_rope_layers": None, "no_rope_layer_interval": 4},
        **_BIASES, mlp_bias="mlp_bias", rotates=_has_rope,
        slides=lambda hf, layer: not _has_rope(hf, layer)
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM", {"sliding_window": None, "head_dim": 128, "rms_norm_eps": 1e-5},
        slides=_always, grows=True
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256}
        | {"rope_theta": 1_000_000.0, "rope_local_base_freq": None, "query_pre_attn_scalar": 256}
        | {"sliding_window": 4096, "sliding_window_pattern": 6, "layer_types": None},
        norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm"), qk_norm="head", norm_offset=True, **_BIASES,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        slides=_all_but_each(6, "sliding_window_pattern"), local_theta=10_000.0,
        scales=lambda hf: {
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "embedding_scale": hf["hidden_size"] ** 0.5
        }
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"num_key_value_heads": None, "rms_norm_eps": 1e-5, "sliding_window": None}
        | {"original_max_position_embeddings": 4096},
        slides=_always, partial_rotary=1.0, fused=("qkv_proj", "gate_up_proj")
    ),
    "glm4": Family(
        "Glm4ForCausalLM", {"attention_bias": True, "head_dim": 128, "rms_norm_eps": 1.5625e-7},
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm",
        "post_mlp_layernorm"), qkv_bias="attention_bias", partial_rotary=0.5, interleaved=True,
        fused=("gate_up_proj",)
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _LLAMA | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0}
        | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
        **_BIASES, mlp_bias="mlp_bias",
        scales=lambda hf: {
            "attention_scale": hf["attention_multiplier"],
            "embedding_scale": hf["embedding_multiplier"],
            "residual_scale": hf["residual_multiplier"],
            "logit_scale": 1 / hf["logits_scaling"]
        }
    )
}  # fmt: skip
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
# What families that do not read it have in their files, switched off.
OFF = {
    *("attention_bias", "mlp_bias", "use_sliding_window", "use_mrope", "rope_interleaved"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "use_bidirectional_attention"),
}


def check_keys(hf: HF, name: str) -> None:
    """Raise ValueError for the first key that is not read and may change the computation."""
    family = FAMILIES[name]
    read = {*REQUIRED, *DEFAULTS, *family.defaults, family.activation[0], *HARMLESS}
    for key, value in hf.items():
        is_off = value is None or (key in OFF and not value)
        if key not in read and not key.startswith("_") and not is_off:
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
        is_wanted = type(default) in (int, float) or key == "sliding_window"
        if is_wanted and value is not None and not is_number:
            raise ValueError(f"config.json: {key}: expected a number above 0, got {value!r}")


VERIFIED = {
    "logits and gradients": "test_logits_and_gradients",
    "packed sequences apart": "test_packed_sequences_do_not_see_each_other",
    "cached decoding from 1 to 300 tokens": "test_decoding_from_1_to_300_tokens",
    "export bit for bit": "test_export_bit_for_bit",
    "checkpointing": "test_checkpointing_has_the_same_bits",
    "memory plan": "test_the_memory_plan_holds_what_is_measured",
    "every stage of a run": "test_every_stage_of_the_short_quickstart",
    "every key of its config": "test_every_key_is_read_or_without_effect_or_refused",
}
"""What tests/test_families.py verifies of every family against transformers, and by which test."""


def listed() -> str:
    """The families, and what was verified of each: `python -m intfast.train --models`."""
    width = max(map(len, FAMILIES))
    lines = [f"  {name:{width}}  {family.architecture}" for name, family in FAMILIES.items()]
    checks = [f"  {what}" for what in VERIFIED]
    said = "model_type and class in transformers; other kinds of models are refused:"
    return "\n".join([said, *lines, "", "Verified of each, on tiny random models:", *checks])
