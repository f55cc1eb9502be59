"""Tiny random models of the real architectures, with weights large enough for bugs to show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
SPECIAL_KEYS: dict[str, dict[str, Any]] = {
    "olmo3": {"sliding_window": 9, "num_hidden_layers": 4},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": False},
    "ministral3": {
        "rope_parameters": {
            **YARN_ROPE,
            **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
            **{"max_position_embeddings": 128, "original_max_position_embeddings": 8},
        },
    },
    "gemma3_text": {
        **{"sliding_window": 9, "sliding_window_pattern": 3, "num_hidden_layers": 4},
        **{"query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    },
    "phi3": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "granite": {
        **{"embedding_multiplier": 3.0, "attention_multiplier": 0.3},
        **{"residual_multiplier": 0.7, "logits_scaling": 0.8},
    },
}
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=().,?!:\n\\{}$"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def config_dict(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of `family` ("llama", ...); `changes` are Hugging Face keys.

    The head width is not hidden_size / heads where the family allows it.
    """
    keys: dict[str, Any] = {
        "vocab_size": 62,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family not in ("qwen2", "olmo2"):
        keys["head_dim"] = 16
    if family == "mistral":
        keys["sliding_window"] = None
    keys |= SPECIAL_KEYS.get(family, {})
    return AutoConfig.for_model(family, **{**keys, **changes}).to_dict()


def hf_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 Hugging Face model; activations, weights and biases are of order one."""
    config = AutoConfig.for_model(**config_dict(family, **changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # Gemma's norms multiply by 1 + weight.
                parameter.copy_((family != "gemma3_text") + 0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(noise)
            else:
                # A gain of 1.5 on each projection keeps the softmax away from uniform.
                parameter.copy_(noise * (1.5 / math.sqrt(parameter.shape[1])))
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token per character (58 with the special ones) in `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def make_model(
    folder: Path,
    family: str = "qwen3",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    **changes: Any,
) -> PreTrainedModel:
    """Write a random model with its tokenizer to `folder` and return it."""
    model = hf_model(family, seed=seed, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return model
