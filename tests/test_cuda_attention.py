"""Which attention kernel CUDA tensors get: CPU tensors that say they are CUDA's, calls recorded."""

import pytest
import torch
import torch.nn.functional as F
from tiny import config_dict
from torch import Tensor
from torch.backends import cuda as backends

from intfast.engine import hygiene
from intfast.engine.cache import KVCache, Step
from intfast.model import attention
from intfast.model.architecture import Architecture
from intfast.model.attention import PackedAttention
from intfast.model.fixed import Shapes


@pytest.fixture
def calls(monkeypatch):
    """(kernel, query, key, grouped, masked, whether cuDNN was allowed) of every call."""
    found = []
    own = F.scaled_dot_product_attention

    def padded(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        found.append(("padded", q, k, enable_gqa, attn_mask, backends.cudnn_sdp_enabled()))
        return own(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    def packed(q, k, v, *_, **__):
        found.append(("packed", q, k, None, None, None))
        return torch.zeros_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", padded)
    monkeypatch.setattr(attention, "varlen_attn", packed)
    # There is no accelerator to pin memory for.
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return found


def heads(dtype, size, lengths=(5, 4)):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(sum(lengths), n, size, generator=made).to(dtype) for n in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(
    "dtype,size,kernel",
    [
        (torch.bfloat16, 64, "packed"),
        (torch.float16, 256, "packed"),
        (torch.bfloat16, 20, "padded"),
        (torch.bfloat16, 264, "padded"),
        (torch.float32, 64, "padded"),
    ],
)
def test_heads_go_where_they_are_taken(monkeypatch, calls, dtype, size, kernel, window):
    """The packed kernel wants 16 bits, multiples of 8 and at most 256; no other, grouped heads."""
    qkv = heads(dtype, size)
    want = PackedAttention([5, 4])(0, *qkv, window)
    calls.clear()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    got = PackedAttention([5, 4])(0, *qkv, window)
    assert {call[0] for call in calls} == {kernel}
    if kernel == "packed":
        return
    torch.testing.assert_close(got, want)
    # torch's own state, in which cuDNN may be taken.
    assert backends.cudnn_sdp_enabled()
    for _, q, k, grouped, mask, has_cudnn in calls:
        assert q.shape[1] == k.shape[1] == 4 and not grouped
        assert (mask is None) == (window is None) and not has_cudnn


def decode(dtype):
    """One step of three rows of a cache of 40 slots."""
    config = Architecture.from_hf(config_dict("qwen3"))
    storage = torch.zeros(config.num_layers * 2 * 3 * 2 * 40 * 16, dtype=dtype)
    shapes = Shapes((), (), 32, 16, 1, False, "")
    step = Step(KVCache(config, 3, 40, storage), torch.tensor([3, 7, 20]), 20, shapes)
    return step(0, *heads(dtype, 16, (3,)), None)


def test_decoding_never_takes_cudnn(calls):
    """Nor after vLLM was started, which switches it off and has it put back by hygiene."""
    decode(torch.bfloat16)
    with hygiene.preserved({}):
        backends.enable_cudnn_sdp(False)
    assert backends.cudnn_sdp_enabled()
    decode(torch.bfloat16)
    assert [(call[-1], call[-2] is not None) for call in calls] == [(False, True)] * 2
    assert backends.cudnn_sdp_enabled()
