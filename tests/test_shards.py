"""Tensor parallel: the map of shards, and a decoder of shards against the whole one."""

import copy

import pytest
import torch
from rank_threads import together
from tiny import config_dict

from intfast.batch import pack
from intfast.config import BatchConfig
from intfast.loss import row_logprob, sft_loss
from intfast.model import linear, shards, weights
from intfast.model.architecture import Architecture
from intfast.model.decoder import Decoder
from intfast.model.shards import Shards
from intfast.ranks import Ranks
from intfast.records import Example

FAMILIES = {
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
}
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 150}


def hf_of(name):
    family, changes = FAMILIES[name]
    return config_dict(family, **{**SIZES, **changes})


def filled(name):
    """A whole decoder of random weights, in which no norm and no bias is trivial."""
    decoder = Decoder(Architecture.from_hf(hf_of(name)), torch.float64)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=made, dtype=torch.float64)
            is_norm = parameter.ndim == 1 and "norm" in key
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.2 * noise)
    return decoder


def sharded(whole, rank, **options):
    """The shard of a rank, with the weights of the whole decoder."""
    own = Shards(whole.config, rank)
    decoder = Decoder(whole.config, whole.head_weight_VD.dtype, shards=own, **options)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            parameter.copy_(own.cut(key, whole.get_parameter(key)))
    return decoder


def batches():
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 149, (n,), generator=draw).tolist() for n in (30, 9, 21)]
    made = [Example(token_ids=x, weights=[0.0] * 3 + [1.0] * (len(x) - 3)) for x in ids]
    return pack(made, BatchConfig(max_tokens=40)).batches


def trained(decoder):
    """(log-probs, gradients by name) of a decoder, partial ones of shards added up."""
    logprobs = []
    for batch in batches():
        hidden_ND = decoder(*batch.inputs())
        head_VD, options = decoder.head_weight_VD, decoder.head_options
        sft_loss(hidden_ND, head_VD, batch, **options)[0].backward()
        logprobs.append(row_logprob(hidden_ND.detach(), head_VD, batch, **options))
    grads = {key: p.grad for key, p in decoder.named_parameters()}
    for key in grads if decoder.shards else ():
        if shards.is_partial(key):
            decoder.shards.ranks.tp_sum(grads[key])
    return torch.cat(logprobs), grads


def distance(name, num, change=lambda decoder: None):
    """How far log-probs and gradients of shards are from those of the whole decoder."""
    whole = filled(name)
    logprobs, grads = trained(whole)

    def work(rank):
        decoder = sharded(whole, rank)
        change(decoder)
        found, mine = trained(decoder)
        gaps = {"log-probs": float((found - logprobs).abs().max())}
        for key, grad in mine.items():
            expected = decoder.shards.cut(key, grads[key])
            gaps[key] = float((grad - expected).abs().max() / grads[key].abs().max())
        return max(gaps.values()), max(gaps, key=gaps.get)

    return max(together(num, work))


# --- the map -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num", [1, 2, 4])
def test_whole_to_shards_and_back(name, num):
    whole = filled(name)
    for key, parameter in whole.named_parameters():
        found = [shards.pieces(whole.config, key, rank, num) for rank in range(num)]
        # Every element exactly once, or all of them on every rank.
        assert bool(found[0]) == shards.is_dealt(key), key
        count = torch.zeros(parameter.shape)
        for p in (piece for pieces in found for piece in pieces):
            count.narrow(p.dim, p.start, p.stop - p.start).add_(1)
        assert (count == (1 if found[0] else 0)).all(), key

    found = together(num, lambda rank: shards.state(sharded(whole, rank)))
    for key, parameter in whole.named_parameters():
        parts = [each[key] for each in found]
        assert [list(x.detach().shape) for x in parts] == [*map(parts[0].shard_shape, range(num))]
        assert parts[0].shape == parameter.shape
        assert torch.equal(parts[0].joined(lambda r, parts=parts: parts[r].detach()), parameter)


@pytest.mark.parametrize("name", ["qwen3 tied", "llama biases"])
def test_a_model_folder_is_read_and_written_by_ranks(name, tmp_path):
    whole = filled(name).float()
    weights.save(whole, hf_of(name), tmp_path / "whole")

    def through(rank):
        own = Shards(whole.config, rank)
        decoder, hf = weights.load(tmp_path / "whole", own=own)
        expected = sharded(whole, rank)
        assert all(map(torch.equal, decoder.parameters(), expected.parameters()))
        weights.save(decoder, hf, tmp_path / f"{rank.tp_rank}")

    together(2, through)
    files = [tmp_path / where / "model.safetensors" for where in ("whole", "0")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_dealt_is_refused():
    config = Architecture.from_hf(hf_of("qwen2"))
    assert shards.fault("qwen2", config, 1) == shards.fault("qwen2", config, 4) == ""
    for family, num, words in (
        ("gemma3", 2, "gemma3 models are not dealt yet, only llama"),
        ("qwen2", 3, "does not divide the model's 4 key/value heads"),
        ("qwen2", 8, "does not divide the model's 4 key/value heads"),
    ):
        assert words in shards.fault(family, config, num)
    few = Architecture.from_hf(hf_of("qwen2") | {"vocab_size": 130, "num_key_value_heads": 8})
    assert "leaves a rank without a row" in shards.fault("qwen2", few, 4)
    assert "leaves a rank without a row" in shards.fault("qwen2", few, 8)


# --- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num", [2, 4])
def test_shards_compute_what_the_whole_does(name, num):
    worst, where = distance(name, num)
    assert worst < 1e-12, where


@pytest.mark.parametrize("how", [True, "selective"])
def test_checkpointing_and_copies_of_shards(how):
    def change(decoder):
        decoder.activation_checkpointing = how
        reference = copy.deepcopy(decoder).requires_grad_(False)
        assert reference.shards is not None
        assert not {p.data_ptr() for p in reference.parameters()} & {
            p.data_ptr() for p in decoder.parameters()
        }
        batch = batches()[0]
        assert torch.equal(reference(*batch.inputs()), decoder(*batch.inputs()).detach())

    assert distance("qwen3 tied", 2, change)[0] < 1e-12


def test_one_process_has_plain_products():
    decoder = filled("llama biases")
    kinds = {type(module) for module in decoder.modules()}
    assert not kinds & {linear.ColumnLinear, linear.RowLinear, linear.ShardedEmbedding}
    assert decoder.shards is None and decoder.head_options == {}
    assert Ranks().require_same("tokens", None) is None


def _bias_everywhere(self, x):
    out = torch.nn.functional.linear(x, self.weight, self.bias)
    return linear._Leave.apply(out, self.ranks)


MUTANTS = {
    "q_norm is not summed": (shards, "is_partial", lambda name: False),
    "the bias joins on every rank": (linear.RowLinear, "forward", _bias_everywhere),
    "no sum where ranks meet": (
        linear._Leave, "forward", staticmethod(lambda ctx, x, ranks: x.clone())
    ),
    "no sum where they part": (
        linear._Enter, "backward", staticmethod(lambda ctx, grad: (grad, None))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(monkeypatch, name):
    monkeypatch.setattr(*MUTANTS[name])
    assert distance("llama biases" if "bias" in name else "qwen3 tied", 2)[0] > 1e-4
