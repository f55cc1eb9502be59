"""The decoder against transformers: logits and gradients, packed, padded and cached."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, LLAMA3_ROPE, YARN_ROPE, config_dict, hf_model
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from intfast.kernels.norm_rope import HeadNorms
from intfast.model.decoder import Architecture, Decoder, PackedAttention
from intfast.model.layer_ops import TORCH
from intfast.model.weights import slices

LENGTHS = [5, 1, 33, 50, 7, 48]
CASES = {
    "llama": ("llama", {}),
    "llama-biases-tied-llama3": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "llama-no-groups-linear": (
        "llama",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-tied": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-biases-yarn-tied": (
        "qwen3",
        {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE},
    ),
    "qwen3-window-one-kv-head": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_key_value_heads": 1,
        },
    ),
}


def decoder_of(hf, dtype=torch.float32) -> Decoder:
    """Our decoder with the weights of a Hugging Face model."""
    config = Architecture.from_hf(hf.config.to_dict())
    decoder, source = Decoder(config, dtype), hf.state_dict()
    parameters = dict(decoder.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(torch.nan)
    for name, place in slices(config).items():
        parameters[place.parameter].data[place.start : place.stop] = source[name]
    return decoder


def packed(lengths=LENGTHS, seed=0, vocab=62):
    # Token 0 is the padding token, whose embedding gets no gradient in transformers.
    token_T = torch.randint(1, vocab, (sum(lengths),), generator=generator(seed))
    return token_T, torch.cat([torch.arange(n) for n in lengths])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hf_logits(hf, token_T, lengths=LENGTHS):
    rows = [hf(part[None], use_cache=False).logits[0] for part in token_T.split(lengths)]
    return torch.cat(rows)


def assert_near(actual, expected, relative):
    """The largest error is at most `relative` of the largest expected value."""
    bound = relative * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case):
    family, changes = CASES[case]
    hf = hf_model(family, **changes)
    decoder = decoder_of(hf)
    token_T, position_T = packed()
    logits = decoder.logits(decoder(token_T, position_T, PackedAttention(LENGTHS)))
    expected = hf_logits(hf, token_T)
    assert_near(logits, expected, 2e-5)
    # Logits of order one, far from uniform: an error in any part would show.
    assert expected.std() > 1
    direction = torch.randn(logits.shape, generator=generator(1))
    logits.backward(direction)
    expected.backward(direction)
    parameters, theirs = dict(decoder.named_parameters()), dict(hf.named_parameters())
    places = slices(decoder.config)
    assert places.keys() == theirs.keys()
    for name, place in places.items():
        actual = parameters[place.parameter].grad[place.start : place.stop]
        assert theirs[name].grad.abs().max() > 0
        assert_near(actual, theirs[name].grad, 1e-4)


def test_parameters_have_the_names_of_vllm():
    names = {name for name, _ in decoder_of(hf_model("qwen2")).named_parameters()}
    layer = {f"self_attn.{n}" for n in ("qkv_proj.weight", "qkv_proj.bias", "o_proj.weight")}
    layer |= {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    top = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == top | {f"model.layers.{i}.{n}" for i in range(3) for n in layer}
    tied = decoder_of(hf_model("qwen3", tie_word_embeddings=True))
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert tied.head_weight_VD is tied.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_error_is_at_most_twice_that_of_transformers(family):
    exact = hf_model(family).to(torch.bfloat16).float()
    hf = hf_model(family).to(torch.bfloat16)
    decoder = decoder_of(hf, torch.bfloat16)
    token_T, position_T = packed()
    expected = hf_logits(exact, token_T)
    actual = decoder.logits(decoder(token_T, position_T, PackedAttention(LENGTHS)))
    theirs = hf_logits(hf, token_T)
    assert actual.dtype == torch.bfloat16
    direction = torch.randn(actual.shape, generator=generator(1))
    for logits in (expected, actual, theirs):
        logits.backward(direction.to(logits.dtype))
    parameters = dict(decoder.named_parameters())
    pairs = [(actual, theirs, expected)]
    true, half = dict(exact.named_parameters()), dict(hf.named_parameters())
    for name, place in slices(decoder.config).items():
        grad = parameters[place.parameter].grad[place.start : place.stop]
        pairs.append((grad, half[name].grad, true[name].grad))
    for ours, reference, truth in pairs:
        budget = 2 * (reference.float() - truth).abs().max() + 1e-2 * truth.abs().max()
        assert (ours.float() - truth).abs().max() <= budget


def test_packed_equals_one_by_one_and_any_order():
    decoder = decoder_of(hf_model("qwen3", use_sliding_window=True, sliding_window=20))
    token_T, position_T = packed()
    together = decoder(token_T, position_T, PackedAttention(LENGTHS)).split(LENGTHS)
    parts = list(zip(token_T.split(LENGTHS), position_T.split(LENGTHS), together, strict=True))
    for token, position, hidden in parts:
        alone = decoder(token, position, PackedAttention([len(token)]))
        assert_near(hidden, alone, 1e-5)
    token, position, hidden = (torch.cat(x) for x in zip(*parts[::-1], strict=True))
    assert_near(decoder(token, position, PackedAttention(LENGTHS[::-1])), hidden, 1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, [9, 9, 9]], ids=["ragged", "equal"])
@pytest.mark.parametrize("changed", range(3))
def test_a_sequence_never_reaches_another(lengths, changed):
    decoder = decoder_of(hf_model("mistral", sliding_window=40))
    token_T, position_T = packed(lengths)
    rows = [torch.arange(len(token_T)).split(lengths)[changed]]
    perturbed = token_T.clone()
    perturbed[rows[0]] = 62 - perturbed[rows[0]]
    others = torch.ones(len(token_T), dtype=torch.bool)
    others[rows[0]] = False
    grads, hidden = [], []
    for tokens in (token_T, perturbed):
        decoder.zero_grad()
        out = decoder(tokens, position_T, PackedAttention(lengths))
        # Gradients flow from the other sequences only, so the perturbed one must not matter.
        out[others].sum().backward()
        hidden.append(out.detach())
        grads.append([p.grad for n, p in decoder.named_parameters() if "lm_head" not in n])
    assert torch.equal(hidden[0][others], hidden[1][others])
    assert not torch.equal(hidden[0][rows[0]], hidden[1][rows[0]])
    for before, after in zip(*grads, strict=True):
        assert torch.equal(before, after)


def naive_attention(query, key, value, lengths, window):
    """The definition, one sequence and one head at a time."""
    outs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        heads = []
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            score = q[:, h] @ k[:, group].T / q.shape[-1] ** 0.5
            distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
            unseen = (distance < 0) | (distance >= (window or len(q)))
            heads.append(score.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, group])
        outs.append(torch.stack(heads, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 1, 5, 33])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, [1], [7, 7], [1, 1, 1], [64, 3], [2, 70, 69]], ids=str
)
def test_packed_attention_equals_the_definition(lengths, window):
    shapes = [(sum(lengths), heads, 8) for heads in (6, 2, 2)]
    inputs = [torch.randn(s, generator=generator(i)).double() for i, s in enumerate(shapes)]
    results = []
    for function in (naive_attention, None):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if function is None:
            out = PackedAttention(lengths)(0, *leaves, window)
        else:
            out = function(*leaves, lengths, window)
        out.backward(torch.randn(out.shape, generator=generator(9)).double())
        results.append([out, *(x.grad for x in leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_padding_inside_attention_is_bounded():
    lengths = torch.randint(1, 400, (50,), generator=generator()).tolist()
    padding = PackedAttention(lengths)._padding
    assert len(padding.into_P) <= sum(lengths) / PackedAttention.FILL
    assert len(padding.into_P) == sum(count * width for count, width in padding.blocks)
    assert torch.equal(padding.into_P[padding.out_T], torch.arange(sum(lengths)))


def test_packed_attention_checks_its_lengths():
    for wrong in ([], [3, 0]):
        with pytest.raises(ValueError, match="lengths: expected numbers >= 1"):
            PackedAttention(wrong)
    x = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="lengths sum to 5, got 4 tokens"):
        PackedAttention([2, 3])(0, x, x, x, None)


class ReferenceCache:
    """`attend` for one sequence that arrives in pieces: keeps every key and value."""

    def __init__(self, layers: int) -> None:
        self.kept = [None] * layers

    def __call__(self, layer, query_THK, key_TJK, value_TJK, window):
        new = (key_TJK, value_TJK)
        old = self.kept[layer] or tuple(x[:0] for x in new)
        key, value = self.kept[layer] = tuple(
            torch.cat(pair) for pair in zip(old, new, strict=True)
        )
        # Queries of the past are not needed: zeros stand for them.
        past = len(key) - len(query_THK)
        query = F.pad(query_THK, (0, 0, 0, 0, past, 0))
        return naive_attention(query, key, value, [len(key)], window)[past:]


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen2-window-tied", "qwen3"])
def test_cached_equals_uncached(case):
    family, changes = CASES[case]
    decoder = decoder_of(hf_model(family, **changes))
    token_T, position_T = packed([23])
    with torch.no_grad():
        whole = decoder(token_T, position_T, PackedAttention([23]))
        cache = ReferenceCache(decoder.config.num_layers)
        pieces = [
            decoder(token, position, cache)
            for token, position in zip(
                token_T.split([10, 1, 1, 7, 1, 3]),
                position_T.split([10, 1, 1, 7, 1, 3]),
                strict=True,
            )
        ]
    assert_near(torch.cat(pieces), whole, 1e-5)


def test_rows_C_keeps_the_rows_it_names():
    decoder = decoder_of(hf_model("qwen3"))
    token_T, position_T = packed()
    keep_C = torch.tensor([140, 4, 5, 38])
    attend = PackedAttention(LENGTHS)
    grads = []
    for hidden_CD in (
        decoder(token_T, position_T, attend)[keep_C],
        decoder(token_T, position_T, attend, rows_C=keep_C),
    ):
        decoder.zero_grad()
        hidden_CD.square().sum().backward()
        grads.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
        rows = hidden_CD.detach()
        assert_near(rows, decoder(token_T, position_T, attend)[keep_C], 1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_near(grads[1][name], grad, 1e-4)


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    decoder = decoder_of(hf_model("qwen3"))
    token_T, position_T = packed()
    results = []
    for checkpointing in (False, True):
        decoder.activation_checkpointing = checkpointing
        decoder.zero_grad()
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden_TD = decoder(token_T, position_T, PackedAttention(LENGTHS))
        kept = sum(sizes)
        hidden_TD.square().sum().backward()
        results.append((kept, [p.grad for p in decoder.parameters() if p.grad is not None]))
    (kept, grads), (kept_less, grads_again) = results
    assert kept_less < kept / 4
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


class Seen(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [LENGTHS, [24, 24]], ids=["padded", "equal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_selective_checkpointing_computes_no_product_and_no_attention_again(family, lengths):
    """And gives the bits of full checkpointing, of which each layer's four products are known."""
    decoder = decoder_of(hf_model(family))
    token_T, position_T = packed(lengths)
    grads, again = {}, {}
    for how in (False, True, "selective"):
        decoder.activation_checkpointing = how
        decoder.zero_grad()
        with Seen() as forward:
            hidden_TD = decoder(token_T, position_T, PackedAttention(lengths))
        with Seen() as backward:
            hidden_TD.backward(torch.ones_like(hidden_TD))
        names = forward.names
        product = [name for name in ("mm", "addmm") if names[name]]
        attention = next(name for name in names if name.startswith("_scaled_dot_product"))
        grads[how] = [p.grad for p in decoder.parameters() if p.grad is not None]
        again[how] = [sum(backward.names[n] for n in product), backward.names[attention]]
        count = names[attention]
    for how in (True, "selective"):
        assert all(torch.equal(a, b) for a, b in zip(grads[how], grads[False], strict=True))
    layers = decoder.config.num_layers
    # The gradients of a product are two; full checkpointing makes three of the four again.
    assert again[False] == [8 * layers, 0]
    assert again[True] == [11 * layers, count]
    assert again["selective"] == [8 * layers, 0]


def test_gradients_of_the_elementwise_operations():
    def random(*shape, seed):
        return torch.randn(shape, generator=generator(seed), dtype=torch.float64).requires_grad_()

    x, weight = random(5, 4, 6, seed=0), random(6, seed=1)
    angle = torch.arange(5.0, dtype=torch.float64)[:, None, None] * torch.tensor([1, 0.3, 0.1] * 2)
    cos, sin = 1.5 * angle.cos(), 1.5 * angle.sin()
    assert gradcheck(
        lambda x, w: TORCH.norm_rope(x, 1, cos, sin, HeadNorms(w, w, 1e-5)), (x, weight)
    )
    assert gradcheck(lambda x: TORCH.norm_rope(x, 1, cos, sin, None), (x,))
    flat = x.detach().flatten(1)[:, :6].requires_grad_()
    assert gradcheck(lambda x, w: TORCH.add_rms_norm(x, x, w, 1e-5), (flat, weight))


def test_kernels_must_be_known():
    with pytest.raises(ValueError, match=r"kernels: expected one of .*'fused'.*, got 'cuda'"):
        Decoder(Architecture.from_hf(config_dict("qwen3")), kernels="cuda")
    wide = Architecture.from_hf(config_dict("qwen3") | {"hidden_size": 16_384})
    with pytest.raises(ValueError, match=r"expected 'torch' or 'liger', got 'fused'.*8192"):
        Decoder(wide, kernels="fused", device="meta")
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(RuntimeError, match="install it or choose 'torch'"):
            Decoder(Architecture.from_hf(config_dict("qwen3")), kernels="liger")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", ["torch", "liger", "fused"])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3"])
def test_bf16_on_cuda_is_as_accurate_as_on_the_cpu(case, kernels):
    if kernels == "liger":
        pytest.importorskip("liger_kernel")
    family, changes = CASES[case]
    exact = decoder_of(hf_model(family, **changes).to(torch.bfloat16).float())
    on_cpu = decoder_of(hf_model(family, **changes), torch.bfloat16)
    on_cuda = Decoder(exact.config, torch.bfloat16, "cuda", kernels)
    on_cuda.load_state_dict(on_cpu.state_dict())
    token_T, position_T = packed()
    results = []
    for decoder in (exact, on_cpu, on_cuda):
        device = decoder.head_weight_VD.device
        attend = PackedAttention(LENGTHS, device)
        hidden = decoder(token_T.to(device), position_T.to(device), attend)
        hidden.float().square().sum().backward()
        grads = [p.grad for p in decoder.parameters() if p.grad is not None]
        results.append([x.detach().float().cpu() for x in (hidden, *grads)])
    for truth, reference, actual in zip(*results, strict=True):
        budget = 2 * (reference - truth).abs().max() + 1e-2 * truth.abs().max()
        assert (actual - truth).abs().max() <= budget
