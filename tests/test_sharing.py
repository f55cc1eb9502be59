"""Adoption of another module's tensors, without vLLM: what must hold, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make_model
from torch import nn

from intfast.batch import pack
from intfast.config import BatchConfig, OptimConfig
from intfast.engine import sharing
from intfast.loss import sft_loss
from intfast.model import weights
from intfast.model.decoder import PackedAttention
from intfast.model.optim import Optimizer
from intfast.records import Example

PADDING = 2


def engine_module(folder, dtype=torch.float32):
    """A stand-in for vLLM's model: our names, padded vocabularies, a tied head under two names."""
    module, _ = weights.load(folder, dtype)
    for owner in (module.model.embed_tokens, getattr(module, "lm_head", None)):
        if owner is not None:
            rows = torch.nn.functional.pad(owner.weight.data, (0, 0, 0, PADDING))
            owner.weight = nn.Parameter(rows, requires_grad=False)
    if module.config.tied:
        module.lm_head = nn.Module()
        module.lm_head.weight = module.model.embed_tokens.weight
    return module


def hidden(decoder):
    attend = PackedAttention([5, 3])
    return decoder(torch.arange(8) + 3, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), attend)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adopted_decoder_is_the_checkpoint_and_takes_no_memory(tmp_path, family, tied):
    make_model(tmp_path, family, tie_word_embeddings=tied)
    module = engine_module(tmp_path)
    decoder = sharing.adopt(module, weights.check(tmp_path), torch.float32)
    loaded, _ = weights.load(tmp_path)
    theirs = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name, _ in loaded.named_parameters()]
    assert [name for name, _ in decoder.named_parameters()] == names
    for name, parameter in decoder.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr()
        assert torch.equal(parameter, loaded.get_parameter(name))
        assert parameter.requires_grad
    assert torch.equal(hidden(decoder), hidden(loaded))
    assert torch.equal(decoder.logits(hidden(decoder)), loaded.logits(hidden(loaded)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_optimizer_is_in_the_other_module(tmp_path, dtype):
    make_model(tmp_path)
    module = engine_module(tmp_path, dtype)
    decoder = sharing.adopt(module, weights.check(tmp_path), dtype)
    link = sharing.Shared(decoder, module)
    before = module.model.layers[0].self_attn.qkv_proj.weight.float().clone()
    step(decoder)
    link.update()
    after = module.model.layers[0].self_attn.qkv_proj.weight
    assert torch.equal(after, decoder.model.layers[0].self_attn.qkv_proj.weight)
    assert (after.float() != before).float().mean() > 0.9
    padding = module.model.embed_tokens.weight[-PADDING:]
    assert torch.equal(padding, torch.zeros_like(padding))


def step(decoder):
    optimizer = Optimizer(decoder.named_parameters(), OptimConfig(lr=0.05), 1)
    example = Example(token_ids=list(range(3, 20)), weights=[0.0] + [1.0] * 16)
    (batch,) = pack([example], BatchConfig(max_tokens=64)).batches
    attend = PackedAttention(batch.lengths)
    hidden_ND = decoder(batch.token_ids_T, batch.position_ids_T, attend, rows_C=batch.rows_N)
    sft_loss(hidden_ND, decoder.head_weight_VD, batch)[0].backward()
    optimizer.step()
    optimizer.close()


def replace_parameter(decoder, module):
    norm = decoder.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())


def replace_data(decoder, module):
    decoder.model.norm.weight.data = decoder.model.norm.weight.data.clone()


def other_dtype(decoder, module):
    decoder.model.norm.to(torch.bfloat16)


def reload_engine(decoder, module):
    module.model.norm.weight.data = module.model.norm.weight.data.clone()


def free_engine(decoder, module):
    module.model.norm.weight.untyped_storage().resize_(0)


def move_both(decoder, module):
    moved = decoder.model.norm.weight.data.clone()
    decoder.model.norm.weight.data = module.model.norm.weight.data = moved


@pytest.mark.parametrize(
    "break_it",
    [replace_parameter, replace_data, other_dtype, reload_engine, free_engine, move_both],
)
def test_a_broken_alias_is_named(tmp_path, break_it):
    make_model(tmp_path)
    module = engine_module(tmp_path)
    decoder = sharing.adopt(module, weights.check(tmp_path), torch.float32)
    link = sharing.Shared(decoder, module)
    link.check()
    break_it(decoder, module)
    for guard in (link.check, link.update):
        with pytest.raises(
            RuntimeError, match=r"1 parameters no longer share.*model\.norm\.weight"
        ):
            guard()


def wrong_shape(module):
    module.model.norm.weight = nn.Parameter(torch.ones(3))


def not_contiguous(module):
    weight = module.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T


def missing(module):
    del module.model.layers[0].self_attn.q_norm.weight


def left_over(module):
    module.model.layers[0].scale = nn.Parameter(torch.ones(1))


def untied(module):
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.data.clone())


@pytest.mark.parametrize(
    "spoil,message",
    [
        (wrong_shape, r"model\.norm\.weight: shape \(3,\), expected \(48,\)"),
        (not_contiguous, r"layers\.1\.mlp\.down_proj\.weight: not contiguous"),
        (missing, r"layers\.0\.self_attn\.q_norm\.weight: missing"),
        (left_over, r"layers\.0\.scale: unknown"),
        (untied, r"lm_head\.weight: not tied"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, spoil, message):
    make_model(tmp_path, tie_word_embeddings=True)
    module = engine_module(tmp_path)
    spoil(module)
    with pytest.raises(ValueError, match=message):
        sharing.adopt(module, weights.check(tmp_path), torch.float32)


def test_another_dtype_is_refused_and_can_be_copied(tmp_path):
    make_model(tmp_path)
    module = engine_module(tmp_path, torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, expected torch\.float32"):
        sharing.adopt(module, weights.check(tmp_path), torch.float32)
    decoder, _ = weights.load(tmp_path)
    link = sharing.Copied(decoder, module)
    step(decoder)
    assert torch.equal(module.model.norm.weight, decoder.model.norm.weight.bfloat16()) is False
    link.update()
    for name, parameter in decoder.named_parameters():
        theirs = dict(module.named_parameters(remove_duplicate=False))[name]
        assert torch.equal(theirs[: len(parameter)], parameter.bfloat16())
