"""Reading config.json: the values of transformers, and a refusal by key for the rest."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, LLAMA3_ROPE, YARN_ROPE, config_dict, hf_model
from transformers import AutoConfig

from intfast.model.architecture import Architecture, Rope

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    "llama3": LLAMA3_ROPE,
    "yarn": YARN_ROPE,
    "yarn-attention-factor": {**YARN_ROPE, "attention_factor": 1.7},
    "yarn-mscale": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn-not-truncated": {**YARN_ROPE, "truncate": False, "beta_fast": 2.0, "beta_slow": 0.1},
    "yarn-late": {**YARN_ROPE, "beta_slow": 1e-4},
    "yarn-one-step": {**YARN_ROPE, "beta_fast": 40.0, "beta_slow": 30.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rope_frequencies_are_those_of_transformers_bit_for_bit(rope):
    hf = hf_model("llama", rope_parameters=ROPES[rope])
    config = Architecture.from_hf(hf.config.to_dict())
    inverse, scale = config.ropes[0].frequencies(config.head_dim, config.max_positions)
    assert torch.equal(inverse, hf.model.rotary_emb.inv_freq)
    assert scale == hf.model.rotary_emb.attention_scaling


def test_rope_settings_of_older_configs_read_the_same():
    new = {"rope_parameters": YARN_ROPE, "max_position_embeddings": 128}
    old = dict(YARN_ROPE)
    theta, kind = old.pop("rope_theta"), old.pop("rope_type")
    before = {"rope_theta": theta, "rope_scaling": {"type": kind, **old}}
    before["max_position_embeddings"] = 128
    assert Rope.from_hf(before) == Rope.from_hf(new)
    moved = {**new, "rope_parameters": {**YARN_ROPE, "original_max_position_embeddings": 64}}
    moved["original_max_position_embeddings"] = 32
    assert Rope.from_hf(moved) == Rope.from_hf(new)
    plain = Rope.from_hf({"max_position_embeddings": 128, "rope_scaling": None})
    assert (plain.rope_type, plain.rope_theta) == ("default", 10000.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_filled_as_in_transformers(family):
    written = {
        "model_type": family,
        "vocab_size": 62,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    for changes in ({}, {"use_sliding_window": True} if "qwen" in family else {}):
        settings = {**written, **changes}
        full = AutoConfig.for_model(**settings).to_dict()
        assert Architecture.from_hf(settings) == Architecture.from_hf(full)


REFUSED = {
    "model_type 'gpt2'.*supported: LlamaForCausalLM, Mistral": {"model_type": "gpt2"},
    "LlamaForSequenceClassification": {"architectures": ["LlamaForSequenceClassification"]},
    "missing vocab_size": {"vocab_size": None},
    "hidden_act = 'gelu'": {"hidden_act": "gelu"},
    "quantization_config": {"quantization_config": {"quant_method": "awq"}},
    "attn_logit_softcapping = 50.0": {"attn_logit_softcapping": 50.0},
    "partial_rotary_factor = 0.5": {"partial_rotary_factor": 0.5},
    "rope_parameters: partial_rotary_factor = 0.5": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "'dynamic'.*supported rope types: default, linear, llama3, yarn": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}
    },
    "mrope_section": {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 3]}},
    "llama3 needs low_freq_factor": {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
    "attention_dropout = 0.1": {"attention_dropout": 0.1},
    "num_attention_heads \\(4\\) must be a multiple of num_key_value_heads \\(3\\)": {
        "num_key_value_heads": 3
    },
    "sliding_window = 7 is not supported for llama": {"sliding_window": 7},
    "layer_types": {"layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_config_that_is_not_implemented_is_refused_by_key(message):
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf({**config_dict("llama"), **REFUSED[message]})


def test_layer_types_must_fit_the_layers():
    for types in (["full_attention"] * 2, ["chunked_attention"] * 3):
        with pytest.raises(ValueError, match="layer_types must name"):
            Architecture.from_hf({**config_dict("qwen3"), "layer_types": types})
