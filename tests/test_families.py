"""Every family of models/families.py against transformers, and through every stage of a run.

`families.VERIFIED` names these tests; `--models` prints what it says.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from engine_cases import native, request
from safetensors.torch import load_file
from small_run import TOKENIZER
from test_memory import H200, measured_peak, paper
from test_model import LENGTHS, Seen, decoder_of, hf_logits, packed
from test_train import ROOT
from tiny import config_dict, hf_model, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from intfast import train
from intfast.engine import memory, sharing
from intfast.engine.memory import GIB, Plan, Target
from intfast.kernels.norm_rope import HeadNorms
from intfast.model import families, layer_ops, weights
from intfast.model.decoder import Architecture, Decoder, PackedAttention
from intfast.model.families import FAMILIES, VERIFIED
from intfast.model.weights import slices

NEW = [name for name in FAMILIES if name not in ("llama", "mistral", "qwen2", "qwen3")]
OTHERS = {
    # Other values of what a family's table reads from config.json.
    "olmo2-biases-tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo2-groups": ("olmo2", {"hidden_size": 64, "num_key_value_heads": 1}),
    "olmo3-yarn": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {
                    **{"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0},
                    **{"original_max_position_embeddings": 32},
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            }
        },
    ),
    "smollm3-windows-tied": (
        "smollm3",
        {
            **{"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [0, 1, 1, 0]},
            "tie_word_embeddings": True,
        },
    ),
    # Without rotation the bias of keys adds the same to all scores, and has no gradient.
    "smollm3-biases": (
        "smollm3",
        {"no_rope_layers": [1, 1, 1, 1], "attention_bias": True, "mlp_bias": True},
    ),
    "ministral3-window": ("ministral3", {"sliding_window": 11}),
    "gemma3-rope-scaling": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            },
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
        },
    ),
    "phi3-whole-window": (
        "phi3",
        {"rope_parameters": {"rope_theta": 1e4}, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "glm4-without-biases": ("glm4", {"attention_bias": False}),
    "glm4-whole": ("glm4", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    "granite-biases-tied": (
        "granite",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
}
CASES = {**{name: (name, {}) for name in FAMILIES}, **OTHERS}
LOG_PROBS = 5e-5


def near(actual, expected, relative):
    return (actual - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case):
    hf = hf_model(CASES[case][0], **CASES[case][1])
    decoder = decoder_of(hf)
    token_T, position_T = packed()
    logits = decoder.logits(decoder(token_T, position_T, PackedAttention(LENGTHS)))
    expected = hf_logits(hf, token_T)
    assert expected.std() > 1
    assert (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < LOG_PROBS
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    logits.backward(direction)
    expected.backward(direction)
    parameters, theirs = dict(decoder.named_parameters()), dict(hf.named_parameters())
    places = slices(decoder.config)
    assert places.keys() == theirs.keys()
    for name, place in places.items():
        actual = parameters[place.parameter].grad[place.start : place.stop]
        assert theirs[name].grad.abs().max() > 0
        assert near(actual, theirs[name].grad, 1e-4), name


@pytest.mark.parametrize("family", NEW)
def test_bfloat16_errs_at_most_twice_as_much(family):
    exact = hf_model(family).to(torch.bfloat16).float()
    hf = hf_model(family).to(torch.bfloat16)
    token_T, position_T = packed()
    decoder = decoder_of(hf, torch.bfloat16)
    ours = decoder.logits(decoder(token_T, position_T, PackedAttention(LENGTHS)))
    truth, theirs = hf_logits(exact, token_T), hf_logits(hf, token_T)
    assert ours.dtype == torch.bfloat16
    ours.backward(torch.ones_like(ours))
    assert all(p.grad.dtype == torch.bfloat16 for p in decoder.parameters())
    budget = 2 * (theirs - truth).abs().max() + 1e-2 * truth.abs().max()
    assert (ours - truth).abs().max() <= budget


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_do_not_see_each_other(family):
    decoder = decoder_of(hf_model(family))
    token_T, position_T = packed()
    rows = torch.arange(len(token_T)).split(LENGTHS)[3]
    others = torch.ones(len(token_T), dtype=torch.bool)
    others[rows] = False
    changed = token_T.clone()
    changed[rows] = 62 - changed[rows]
    found = []
    for tokens in (token_T, changed):
        decoder.zero_grad()
        hidden_TD = decoder(tokens, position_T, PackedAttention(LENGTHS))
        hidden_TD[others].sum().backward()
        grads = [p.grad for n, p in decoder.named_parameters() if "lm_head" not in n]
        found.append([hidden_TD.detach()[others], *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_from_1_to_300_tokens(family, tmp_path):
    """Log-probs of cached decoding are transformers' without a cache, and the same bits alone."""
    hf = make_model(tmp_path, family, max_position_embeddings=512).eval()
    draw = random.Random(0)
    requests = [
        request([draw.randrange(3, 62) for _ in range(n)], [n, n + 1], max_new_tokens=300 - n)
        for n in (1, 31, 32, 160, 290)
    ]
    engine = native(tmp_path)
    found = engine.generate(requests)
    assert engine.generate(requests[4:]) == found[4:]
    lengths = set()
    for asked, group in zip(requests, found, strict=True):
        completion = group[0]
        ids = torch.tensor([[*asked.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logprob_TV = hf(ids, use_cache=False).logits[0].log_softmax(-1)
        first = len(asked.prompt_ids)
        rows = torch.arange(first - 1, ids.shape[1] - 1)
        expected = logprob_TV[rows, ids[0, first:]]
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < LOG_PROBS
        lengths |= {*range(first, ids.shape[1] + 1)}
    assert lengths == {*range(1, 301)}


@pytest.mark.parametrize("family", FAMILIES)
def test_export_bit_for_bit(family, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    hf = make_model(source, family, dtype=torch.bfloat16)
    decoder, _ = weights.load(source, torch.bfloat16)
    weights.save(decoder, source, out)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in hf.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_has_the_same_bits(family):
    """And "selective" computes neither a product nor attention again."""
    decoder = decoder_of(hf_model(family))
    token_T, position_T = packed([24, 24])
    grads, products = {}, {}
    for how in (False, True, "selective"):
        decoder.activation_checkpointing = how
        decoder.zero_grad()
        hidden_TD = decoder(token_T, position_T, PackedAttention([24, 24]))
        with Seen() as backward:
            hidden_TD.backward(torch.ones_like(hidden_TD))
        grads[how] = [p.grad for p in decoder.parameters() if p.grad is not None]
        products[how] = backward.names["mm"] + backward.names["addmm"]
    for how in (True, "selective"):
        assert all(torch.equal(a, b) for a, b in zip(grads[how], grads[False], strict=True))
    assert products["selective"] == products[False] == 8 * decoder.config.num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_plan_holds_what_is_measured(family):
    """Of activations, in sequences so short that the masks of windows do not count."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    architecture = Architecture.from_hf(config_dict(family, **shape))
    lengths = [64] * 16
    for how in (False, "selective"):
        decoder = Decoder(architecture)
        decoder.activation_checkpointing = how
        for parameter in decoder.parameters():
            parameter.data.normal_(0, 0.02)
        token_T, position_T = packed(lengths)

        def work(decoder=decoder, token_T=token_T, position_T=position_T):
            hidden_TD = decoder(token_T, position_T, PackedAttention(lengths))
            hidden_TD.square().sum().backward()

        work()
        decoder.zero_grad(set_to_none=True)
        config = paper("model.dtype=float32", f"model.activation_checkpointing={json.dumps(how)}")
        made = Plan(config, architecture, Target("cpu", "native", GIB, GIB))
        made = made.changed("batch.max_tokens", sum(lengths))
        estimate = made.micro_batch() + memory.num_parameters(architecture) * 4
        assert 0.95 * measured_peak(work) <= estimate <= 1.4 * measured_peak(work), how
    assert Plan(paper(), architecture, H200).fits()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_of_the_short_quickstart(family, tmp_path):
    """A random model, whose export transformers loads with the bits of the run's weights."""
    # Qwen2's tokenizer class adds tokens of its own.
    size = len(TOKENIZER) + 8
    make_model(tmp_path / "base", family, vocab_size=size, max_position_embeddings=512)
    TOKENIZER.save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    settings = [
        *(f"run={run}", f"model.path={tmp_path / 'base'}", "rollout.cache_gib=0.2"),
        *("sampling.max_new_tokens=8", "data.train_limit=4", "data.test_limit=2"),
        *("attempts.samples=2", "intervene.continuations=2", "intervene.wave=2"),
        *("sft.data=reference", "sft.epochs=1", "rl.steps=1", "rl.group_size=2"),
        *("rl.problems_per_step=2", "rl.from_base=false", "evaluate.samples=2", "evaluate.ks=[1]"),
    ]
    assert train.main([str(ROOT / "configs/quickstart_short.toml"), *settings]) == 0
    export = next(path.parent for path in sorted(run.rglob("config.json")))
    loaded, before = (weights.load(folder)[0] for folder in (export, tmp_path / "base"))
    table = "model.embed_tokens.weight"
    assert not torch.equal(loaded.get_parameter(table), before.get_parameter(table))
    theirs = AutoModelForCausalLM.from_pretrained(export).state_dict()
    ours = dict(loaded.named_parameters())
    for name, place in slices(loaded.config).items():
        assert torch.equal(ours[place.parameter][place.start : place.stop], theirs[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_read_or_without_effect_or_refused(family):
    """Of the family's config class, with another value than it has."""
    config = config_dict(family) | {"architectures": [FAMILIES[family].architecture]}
    if "use_sliding_window" in config:
        types = ["sliding_attention", *config["layer_types"][1:]]
        config |= {"use_sliding_window": True, "sliding_window": 7, "layer_types": types}
    before, without_effect = Architecture.from_hf(config), set()
    for key, value in config.items():
        if key in families.HARMLESS or key.startswith("_"):
            continue
        other = {bool: not value, float: 0.25}.get(type(value), "another")
        if type(value) is int:
            other = 2 * value
        if isinstance(value, list):
            other = value[::-1]
        if isinstance(value, dict):
            other = json.loads(json.dumps(value).replace("default", "unheard-of"))
            other |= {"unheard-of": 1}
        try:
            if Architecture.from_hf(config | {key: other}) == before:
                without_effect.add(key)
        except ValueError as error:
            assert "config.json" in str(error)
    # Read only where others, which are given here, leave something open.
    open_only = {"max_window_layers", "no_rope_layer_interval", "sliding_window_pattern"}
    assert without_effect <= open_only


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_key_is_refused_by_name_unless_it_is_none(family):
    config = config_dict(family)
    Architecture.from_hf(config | {"gated_attention": None, "rope_interleaved": False})
    for value in (True, False, 0.5, "yes", [1]):
        with pytest.raises(ValueError, match=f"gated_attention = .* not supported for {family}"):
            Architecture.from_hf(config | {"gated_attention": value})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(family):
    written = {
        **{"model_type": family, "vocab_size": 62, "hidden_size": 64, "intermediate_size": 80},
        **{"num_hidden_layers": 30, "num_attention_heads": 4, "num_key_value_heads": 2},
        "max_position_embeddings": 128,
    }
    if family == "ministral3":
        written["rope_parameters"] = AutoConfig.for_model("ministral3").rope_parameters
    full = AutoConfig.for_model(**json.loads(json.dumps(written))).to_dict()
    assert Architecture.from_hf(written) == Architecture.from_hf(full)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_on_other_tensors_is_the_same(family, tmp_path):
    make_model(tmp_path, family)
    loaded, _ = weights.load(tmp_path)
    adopted = sharing.adopt(loaded, loaded.config, torch.float32)
    token_T, position_T = packed()
    hidden = [d(token_T, position_T, PackedAttention(LENGTHS)) for d in (adopted, loaded)]
    assert torch.equal(*hidden)


REFUSED = {
    "rope_type = 'yarn' is not supported for phi3": (
        "phi3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    ),
    "longrope": ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}),
    "llama_4_scaling_beta = 0.1 is not supported for mistral": (
        "mistral",
        {"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
    ),
    "expected full_attention and sliding_attention for olmo3, got rope_theta": (
        "olmo3",
        {"rope_parameters": {"rope_theta": 1e4}},
    ),
    "no_rope_layers must name 4 layers": ("smollm3", {"no_rope_layers": [1]}),
    "use_bidirectional_attention = True": ("gemma3_text", {"use_bidirectional_attention": True}),
    "final_logit_softcapping = 30.0": ("gemma3_text", {"final_logit_softcapping": 30.0}),
    "hidden_activation = 'silu'": ("gemma3_text", {"hidden_activation": "silu"}),
    "resid_pdrop = 0.1": ("phi3", {"resid_pdrop": 0.1}),
    "logits_scaling: expected a number above 0, got '2'": ("granite", {"logits_scaling": "2"}),
    "sliding_window: expected a number above 0, got '9'": ("phi3", {"sliding_window": "9"}),
    "odd number of rotated places": (
        "glm4",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.45}},
    ),
    "model_type 'qwen3_5_text'": ("qwen3", {"model_type": "qwen3_5_text"}),
    "attention_bias = True is not supported for qwen2": ("qwen2", {"attention_bias": True}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_the_table_is_refused_by_name(message):
    family, changes = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf(config_dict(family) | changes)


def test_what_no_kernel_knows_is_plain_and_said():
    said = {f: layer_ops.plain_ops(Architecture.from_hf(config_dict(f))) for f in FAMILIES}
    assert {name for name, text in said.items() if not text} == (
        {*FAMILIES} - {"olmo2", "olmo3", "gemma3_text", "phi3", "glm4", "ministral3"}
    )
    assert said["olmo2"] == "plain norm_rope (a norm over all heads)"
    assert "plain swiglu (gelu_pytorch_tanh gate)" in said["gemma3_text"]
    fused = layer_ops.layer_ops("fused", Architecture.from_hf(config_dict("olmo2")))
    assert fused.add_rms_norm is layer_ops.FUSED.add_rms_norm
    assert fused.norm_rope is not layer_ops.FUSED.norm_rope


def test_the_general_rotation_is_the_usual_one_where_nothing_is_special():
    config = Architecture.from_hf(config_dict("qwen3"))
    cos, sin = config.ropes[0].angles(torch.arange(5), config.frequencies()[0][0], 1.0)
    qkv = torch.randn(5, 8, 16)
    norms = HeadNorms(torch.randn(16), torch.randn(16), 1e-6)
    ours = layer_ops._norm_rope(config, qkv, 2, cos, sin, norms)
    usual = layer_ops.TORCH.norm_rope(qkv, 2, cos, sin, norms)
    assert all(torch.equal(a, b) for a, b in zip(ours, usual, strict=True))


def test_the_list_of_models_says_what_is_tested(capsys):
    """Each line of VERIFIED is a test here that runs on each of the families it is said of."""
    assert train.main(["--models"]) == 0
    shown = capsys.readouterr().out
    for words, name in VERIFIED.items():
        [mark] = [m for m in globals()[name].pytestmark if m.name == "parametrize"]
        assert {*FAMILIES} <= {*mark.args[1]}, name
        assert words in shown
    for name, family in FAMILIES.items():
        assert name in shown and family.architecture in shown
