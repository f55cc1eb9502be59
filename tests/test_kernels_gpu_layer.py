"""The layer's ops on a CUDA device against fp64, on the sizes of models."""

import pytest
import torch
from kernels_common import DEVICE
from layer_common import assert_no_worse, normal, outcome

from benchmarks import layer_cases
from intfast.kernels import truth as definition
from intfast.kernels.norm_rope import HeadNorms
from intfast.model.layer_ops import FUSED, TORCH

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS = 1e-6
# Tokens that are no multiple of the programs; hidden sizes, (heads, kv heads, head size) of models.
TOKENS = [1, 1000, 4099]
WIDTHS = [576, 2560, 4096, 8192]
HEADS = [(32, 8, 128), (14, 2, 64), (16, 16, 80), (9, 3, 256)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(index, given, call):
    """One op: no worse than eager against fp64, and the same bits twice."""
    name = ("add_rms_norm", "norm_rope", "swiglu")[index]
    found = [
        [*results, *grads]
        for results, grads in (
            outcome(lambda *a: call(FUSED[index], *a), *given),
            outcome(lambda *a: call(FUSED[index], *a), *given),
            outcome(lambda *a: call(layer_cases.PEERS[name][0].load(), *a), *given),
            outcome(lambda *a: call(getattr(definition, name), *a), *given, dtype=torch.float64),
        )
    ]
    for i, (ours, again, eager, exact) in enumerate(zip(*found, strict=True)):
        assert torch.equal(ours, again), i
        assert_no_worse(ours, eager, exact, i)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_add_rms_norm(tokens, width, dtype):
    given = normal(1, tokens, width, dtype=dtype), normal(2, tokens, width, dtype=dtype)
    weight = (1 + normal(3, width, scale=0.3)).to(dtype)
    check(0, (*given, weight), lambda op, x, delta, weight: op(x, delta, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_norm_rope(tokens, heads, dtype):
    num_queries, num_kv, size = heads
    angle = torch.arange(tokens)[:, None, None] * 1e4 ** -torch.linspace(0, 1, size // 2)
    angle = angle.repeat(1, 1, 2)
    cos, sin = (x.to(DEVICE, dtype) for x in (angle.cos(), angle.sin()))
    qkv = normal(1, tokens, num_queries + 2 * num_kv, size, dtype=dtype)
    weights = [(1 + normal(i, size, scale=0.3)).to(dtype) for i in (2, 3)]

    def call(op, qkv, *weights):
        norms = HeadNorms(*weights, EPS)
        return op(qkv, num_kv, cos.to(qkv.dtype), sin.to(qkv.dtype), norms)

    check(1, (qkv, *weights), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 9728, 25_600])
@pytest.mark.parametrize("tokens", TOKENS)
def test_swiglu(tokens, width, dtype):
    check(2, (normal(1, tokens, 2 * width, dtype=dtype),), lambda op, x: op(x))


def test_offsets_beyond_32_bits():
    rows, width = 2**31 // 4096 + 8, 2048
    gate_up = torch.zeros(rows, 2 * width, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-1] = 1
    out = FUSED.swiglu(gate_up)
    torch.testing.assert_close(out[-1], FUSED.swiglu(gate_up[-1:])[0])
    assert not out[:-1].any()


def test_rotation_alone_is_plain_torch_up_to_rounding():
    qkv = normal(1, 1000, 48, 128, dtype=torch.bfloat16)
    angle = torch.arange(1000, device=DEVICE)[:, None, None] * torch.linspace(
        1, 0, 64, device=DEVICE
    )
    cos, sin = (x.repeat(1, 1, 2).bfloat16() for x in (angle.cos(), angle.sin()))
    ours = outcome(lambda x: FUSED.norm_rope(x, 8, cos, sin, None), qkv)
    plain = outcome(lambda x: TORCH.norm_rope(x, 8, cos, sin, None), qkv)
    for got, want in zip(ours[0] + ours[1], plain[0] + plain[1], strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
