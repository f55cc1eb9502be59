"""The sums of gradients and their squares: against fp64, and refusals."""

import bounds
import pytest
import torch
from kernels_common import DEVICE, HAS_TRITON, INTERPRETED

from intfast.kernels import truth
from intfast.kernels.add_gradient import add_gradient

PATHS = ["plain", *(["triton"] if HAS_TRITON else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    """The interpreter rounds bf16 as a device does."""
    if HAS_TRITON and INTERPRETED:
        import kernels_bf16

        kernels_bf16.repair(monkeypatch)
        assert kernels_bf16.interpreter_rounds(torch.bfloat16)


def gradient(shape, seed, dtype):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(DEVICE, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (64,), (1,), (0,), (9, 150)])
def test_micro_batches_add_up_in_fp32(path, dtype, shape):
    total, exact = None, torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    for seed in range(3):
        grad = gradient(shape, seed, dtype)
        before = total
        total, square_B = add_gradient(grad, total, path=path)
        assert before is None or total is before
        exact, norm = truth.add_gradient(grad.double(), exact)
        assert total.dtype == torch.float32
        assert ((total - exact).abs() <= bounds.worst(seed, 1.0) * 4 * 3).all()
    assert (square_B is None) == (path == "plain")
    if square_B is not None:
        # Each total is rounded twice, its square once, and a block adds 64 of them.
        allowed = (bounds.worst(5, 1.0) + bounds.of_sum(64, 1.0)) * norm
        assert abs(square_B.double().sum() - norm) <= allowed


@pytest.mark.parametrize("path", PATHS)
def test_the_first_gradient_is_taken_as_it_is(path):
    grad = gradient((4, 6), 0, torch.float16).T
    total, _ = add_gradient(grad, path=path)
    assert torch.equal(total, grad.float())
    assert total.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_of_any_strides(path):
    total = gradient((6, 4), 1, torch.float32)
    want = total + gradient((4, 6), 0, torch.float16).T.float()
    found, _ = add_gradient(gradient((4, 6), 0, torch.float16).T, total, path=path)
    assert torch.equal(found, want)


def test_bad_arguments_are_refused():
    grad = gradient((4, 6), 0, torch.float16)
    with pytest.raises(ValueError, match=r"total: expected \(4, 6\) torch.float32"):
        add_gradient(grad, grad.double())
    with pytest.raises(ValueError, match="strided"):
        add_gradient(grad, torch.zeros(6, 4, device=DEVICE).T)
    with pytest.raises(ValueError, match="path: expected one of"):
        add_gradient(grad, path="odds")
