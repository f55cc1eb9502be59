import bounds
import pytest
import torch
import torch.nn.functional as F
from kernels_common import DEVICE, HAS_TRITON
from layer_common import (
    DTYPES,
    PATHS,
    assert_contract,
    assert_no_worse,
    assert_rounded_once,
    assert_same,
    device_like,  # noqa: F401
    normal,
    outcome,
    spread,
)
from torch.autograd import gradcheck

from intfast.kernels import truth as definition
from intfast.kernels.swiglu import swiglu

# (T, I): more than one block of columns and not a multiple of one; one number; none.
SHAPES = [(5, 37), (3, 64), (1, 1), (2, 7), (0, 8), (3, 0)]


def eager(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_against_the_truth(path, dtype, shape, scale):
    gate_up = normal(1, shape[0], 2 * shape[1], scale=scale, dtype=dtype)
    (out,), (grad,) = outcome(lambda x: swiglu(x, path=path), gate_up)
    (out_eager,), (grad_eager,) = outcome(eager, gate_up)
    (out_truth,), (grad_truth,) = outcome(definition.swiglu, gate_up, dtype=torch.float64)
    assert out.dtype == grad.dtype == dtype
    if path == "plain":
        assert torch.equal(out, out_eager) and torch.equal(grad, grad_eager)
        return
    if out.numel() > 1:
        assert_no_worse(out, out_eager, out_truth, "out")
        assert_no_worse(grad, grad_eager, grad_truth, "grad")
    # Of each number: a few roundings in fp32 of products no larger than these, and its own.
    largest = float(gate_up.abs().max()) ** 2 if out.numel() else 0.0
    assert_rounded_once(out, out_truth, 4, largest, "out")
    assert_rounded_once(grad, grad_truth, 8, 4 * largest, "grad")


@pytest.mark.parametrize("path", PATHS)
def test_contract(path):
    assert_contract(lambda x: swiglu(x, path=path), normal(1, 4, 38))


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path):
    gate_up = normal(1, 4, 38)
    (want,), (want_grad,) = outcome(lambda x: swiglu(x, path=path), gate_up)
    for x in (*spread(gate_up), gate_up.T.contiguous().T):
        assert_same(path, [swiglu(x, path=path)], [want])
    given = gate_up.clone().requires_grad_()
    for upstream in spread(normal(90, 4, 19)):
        (grad,) = torch.autograd.grad(swiglu(given, path=path), given, upstream)
        assert_same(path, [grad], [want_grad])
    (grad,) = torch.autograd.grad(swiglu(given, path=path).sum(), given)
    ones = torch.ones(4, 19, device=DEVICE)
    assert_same(path, [grad], torch.autograd.grad(swiglu(given, path=path), given, ones))


@pytest.mark.parametrize("path", PATHS)
def test_gates_far_from_zero(path):
    """The sigmoid is 0 or 1 there, and must not become a quotient of infinities."""
    gate = torch.tensor([-3e38, -1e4, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e4], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    (out,), (grad,) = outcome(lambda x: swiglu(x, path=path), gate_up)
    (out_truth,), (grad_truth,) = outcome(definition.swiglu, gate_up, dtype=torch.float64)
    for got, truth in ((out, out_truth), (grad, grad_truth)):
        assert torch.isfinite(got).all()
        allowed = bounds.of_sum(8, 1) * truth.abs().clamp(min=1)
        assert ((got.double() - truth).abs() <= allowed).all()


def test_gradcheck_of_the_plain_path():
    assert gradcheck(lambda x: swiglu(x, path="plain"), normal(1, 3, 8).double().requires_grad_())


def test_bad_arguments_are_refused():
    for bad in (normal(1, 2, 3), normal(1, 2, 2, 4)):
        with pytest.raises(ValueError, match="gate_up: expected"):
            swiglu(bad)
    with pytest.raises(ValueError, match="path: expected one of"):
        swiglu(normal(1, 2, 4), path="rows")
    if HAS_TRITON:
        with pytest.raises(ValueError, match="use path='plain'"):
            swiglu(normal(1, 2, 4).double(), path="triton")
