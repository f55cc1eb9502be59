"""The layer's ops as torch.library sees them, and together in a decoder."""

import copy
from collections import Counter
from functools import partial

import bounds
import pytest
import torch
from kernels_common import HAS_TRITON, INTERPRETED
from layer_common import device_like, normal  # noqa: F401
from tiny import FAMILIES, config_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import fake_twins
from intfast.kernels import add_rms_norm, norm_rope, swiglu
from intfast.kernels.norm_rope import HeadNorms
from intfast.model.decoder import Architecture, Decoder, Layer, PackedAttention, RMSNorm
from intfast.model.layer_ops import FUSED, TORCH, LayerOps

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="tests/test_kernels_gpu_layer.py has the device"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
]
TRITON = LayerOps(*(partial(op, path="triton") for op in FUSED))
T, H, J, K, D = 5, 4, 2, 8, 12
COS, SIN = (torch.linspace(-1, 1, T * K // 2).view(T, 1, -1).repeat(1, 1, 2) for _ in range(2))
NORMS = HeadNorms(normal(3, K), normal(4, K), 1e-6)


def operator_calls():
    """(operator, arguments) of each of the six, in each of its forms."""
    x, weight, both = normal(1, T, D), normal(2, D), normal(5, T, H + 2 * J, K)[:, : H + J]
    angles = COS[:, 0, : K // 2], SIN[:, 0, : K // 2]
    scale = normal(6, T).abs()
    for delta in (None, normal(7, T, D)):
        yield add_rms_norm._forward, (x, delta, weight, 1e-6)
        yield add_rms_norm._backward, (x, delta, normal(8, T, D), scale, weight)
    grads = normal(7, T, H, K), normal(8, T, J, K), normal(9, T, J, K)
    for norms in ((*NORMS[:2], 1e-6), (None, None, 0.0)):
        yield norm_rope._forward, (both, J, *angles, *norms)
        kept = None if norms[0] is None else both
        yield norm_rope._backward, (*grads, kept, *angles, *norms)
    yield swiglu._forward, (normal(1, T, 2 * D),)
    yield swiglu._backward, (normal(2, T, D), normal(1, T, 2 * D))


def test_operators_keep_their_schemas():
    for operator, arguments in operator_calls():
        torch.library.opcheck(operator, arguments)


def test_their_twins_on_the_fake_device_compute_the_same():
    for operator, arguments in operator_calls():
        results = operator(*arguments), fake_twins.run(operator._opoverload, arguments, {})
        got, want = (x if isinstance(x, tuple) else (x,) for x in results)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def step(ops, x, delta, weight, qkv, query_K, key_K):
    """Every op once, the norm in both forms."""
    stream, normed = ops.add_rms_norm(x, delta, weight, 1e-6)
    stream, again = ops.add_rms_norm(stream, None, weight, 1e-6)
    query, key, value = ops.norm_rope(qkv, J, COS, SIN, HeadNorms(query_K, key_K, 1e-6))
    turned = ops.norm_rope(qkv, J, COS, SIN, None)
    gated = ops.swiglu(torch.cat((normed, again), 1))
    heads = (query.sum(1) * key.sum(1) * value.sum(1)).square().sum() + turned[0].square().sum()
    return (stream * gated).sum() + heads


def leaves():
    shapes = [(T, D), (T, D), (D,), (T, H + 2 * J, K), (K,), (K,)]
    return [normal(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]


def outcome(function):
    given = leaves()
    value = function(*given)
    return [value.detach(), *torch.autograd.grad(value, given)]


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["plain", "triton"])
def test_compiles_whole_and_gives_the_same(ops):
    torch._dynamo.reset()
    compiled = torch.compile(partial(step, ops), fullgraph=True, backend="aot_eager")
    for got, want in zip(outcome(compiled), outcome(partial(step, ops)), strict=True):
        # torch.compile may take apart what the plain path is made of.
        bound = bounds.of_sum(H * K * D, float(want.abs().max()))
        assert torch.equal(got, want) if ops is TRITON else (got - want).abs().max() <= bound


def test_fake_tensors_of_a_model_cost_no_memory():
    with FakeTensorMode():
        qkv = torch.empty(1 << 17, 48, 128, dtype=torch.bfloat16, requires_grad=True)
        angle = torch.empty(1 << 17, 1, 128, dtype=torch.bfloat16)
        weight = torch.empty(128, dtype=torch.bfloat16, requires_grad=True)
        query, key, value = TRITON.norm_rope(qkv, 8, angle, angle, HeadNorms(weight, weight, 1e-6))
        assert [x.shape[1] for x in (query, key, value)] == [32, 8, 8]
        (grad,) = torch.autograd.grad(query.sum() + key.sum() + value.sum(), qkv)
        assert grad.shape == qkv.shape and grad.dtype == torch.bfloat16
        gate_up = torch.empty(1 << 17, 2 * 9728, dtype=torch.bfloat16, requires_grad=True)
        out = TRITON.swiglu(gate_up)
        assert out.shape == (1 << 17, 9728)
        assert torch.autograd.grad(out.sum(), gate_up)[0].shape == gate_up.shape
        x = torch.empty(1 << 17, 2560, dtype=torch.bfloat16, requires_grad=True)
        wide = torch.empty(2560, dtype=torch.bfloat16, requires_grad=True)
        stream, normed = TRITON.add_rms_norm(x, x, wide, 1e-6)
        grads = torch.autograd.grad((stream * normed).sum(), (x, wide))
        assert [g.shape for g in grads] == [x.shape, wide.shape]


# In a decoder ------------------------------------------------------------------------------------

LENGTHS = [4, 1, 7]


def set_ops(decoder, ops):
    for module in decoder.modules():
        if isinstance(module, Layer | RMSNorm):
            module.ops = ops


def passes(decoder, ops, rows_C=None):
    """(hidden states, gradients by name) of one forward and backward."""
    set_ops(decoder, ops)
    decoder.zero_grad()
    token_T = torch.arange(sum(LENGTHS)) % decoder.config.vocab_size
    position_T = torch.cat([torch.arange(n) for n in LENGTHS])
    hidden = decoder(token_T, position_T, PackedAttention(LENGTHS), rows_C)
    hidden.backward(normal(9, *hidden.shape, dtype=hidden.dtype))
    grads = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **grads}


def decoder_of(family, **changes):
    """Random weights, with which activations stay of order one."""
    decoder = Decoder(Architecture.from_hf(config_dict(family, **changes)))
    for i, parameter in enumerate(decoder.parameters()):
        spread = parameter.shape[-1] ** -0.5
        mean = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data = mean + normal(i, *parameter.shape, scale=spread)
    return decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_as_accurate_with_the_kernels(family, dtype):
    decoder = decoder_of(family).to(dtype)
    rows_C = torch.tensor([10, 2, 3])
    ours = passes(decoder, TRITON, rows_C)
    theirs = passes(decoder, TORCH, rows_C)
    exact = passes(copy.deepcopy(decoder).double(), TORCH, rows_C)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        floor = bounds.of_sum(sum(LENGTHS), float(truth.abs().max()), dtype)
        errors = [(x[name].double() - truth).abs().max() for x in (ours, theirs)]
        assert errors[0] <= bounds.PEER * errors[1] + floor, (name, errors)
        assert ours[name].shape == truth.shape and ours[name].dtype == dtype


@pytest.mark.parametrize("how", [True, "selective"])
def test_activation_checkpointing_gives_the_same_bits(how):
    decoder = decoder_of("qwen3")
    without = passes(decoder, TRITON)
    decoder.activation_checkpointing = how
    for name, value in passes(decoder, TRITON).items():
        assert torch.equal(value, without[name]), name


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_copies_nothing_and_concatenates_nothing(family):
    """Three operators forward (the norm twice), as many backward, one add; the rest is products."""
    decoder = decoder_of(family, num_key_value_heads=4)
    set_ops(decoder, TRITON)
    layer, x = decoder.model.layers[0], normal(1, 6, 48).requires_grad_()
    rope = decoder._ropes(torch.arange(6), torch.float32)[0]

    def attend(layer, query, key, value, window):
        return torch.ops.aten.addcmul(query, key, value)

    with Seen() as forward:
        out = layer(x, rope, attend, None)
    with Seen() as backward:
        out.backward(torch.ones(6, 48))
    views = {"view", "t", "unsqueeze", "slice", "transpose", "detach", "alias", "_unsafe_view"}
    views |= {"expand", "empty", "new_empty", "split", "split_with_sizes", "select", "unbind"}
    own = {"add_rms_norm": 2, "norm_rope": 1, "swiglu": 1}
    counted = {k: n for k, n in forward.names.items() if k not in views | {"mm", "addcmul"}}
    assert counted == own | {"add": 1}
    gradients = {f"{name}_gradient": n for name, n in own.items()}
    found = {k: n for k, n in backward.names.items() if k in gradients or k in COPIES}
    assert found == gradients
    # The stream's gradient arrives at each norm together with the branch's: nothing is added.
    assert "add" not in backward.names and "add_" not in backward.names


COPIES = {"cat", "copy_", "clone", "_to_copy", "slice_backward", "zeros", "zeros_like", "new_zeros"}
