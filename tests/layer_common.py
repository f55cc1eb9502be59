"""Shared by the tests of a layer's elementwise ops: inputs, gradients, and bounds."""

import bounds
import pytest
import torch
from kernels_common import DEVICE, HAS_TRITON, INTERPRETED

PATHS = ["plain", *(["triton"] if HAS_TRITON else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def device_like(monkeypatch):
    """torch.empty gives NaN, and the interpreter rounds bf16 as a device does."""
    if HAS_TRITON and INTERPRETED:
        import kernels_bf16

        kernels_bf16.repair(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(seed, *shape, scale=1.0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=made)).to(DEVICE, dtype)


def outcome(op, *leaves, dtype=None):
    """(results, gradients of the leaves) for fixed gradients of the results.

    dtype: compute in it, from the same numbers.
    """
    given = [None if x is None else x.detach().to(dtype or x.dtype) for x in leaves]
    given = [None if x is None else x.requires_grad_() for x in given]
    results = op(*given)
    results = results if isinstance(results, tuple) else (results,)
    narrow = next(x for x in leaves if x is not None).dtype
    upstream = [
        normal(90 + i, *x.shape, dtype=narrow).to(dtype or narrow) for i, x in enumerate(results)
    ]
    grads = torch.autograd.grad(results, [x for x in given if x is not None], upstream)
    return [x.detach() for x in results], list(grads)


def assert_rounded_once(got, truth, terms, magnitude, what=""):
    """Each number: its own rounding, and those in fp32 of a sum of `terms` below `magnitude`."""
    assert got.shape == truth.shape and torch.isfinite(got).all(), what
    if not got.numel():
        return
    tiny = torch.finfo(got.dtype).smallest_normal * bounds.unit(got.dtype)
    allowed = bounds.unit(got.dtype) * truth.abs() + bounds.of_sum(terms, float(magnitude)) + tiny
    excess = (got.double() - truth).abs() / allowed
    assert excess.max() <= 1, (what, excess.max())


def assert_no_worse(got, eager, truth, what=""):
    """In a narrow type over the whole array; in fp32, where roundings are luck, PEER times.

    The root mean square of n roundings scatters by less than 1 / sqrt(n), and there are two.
    """
    error, theirs = ((x.double() - truth).norm() for x in (got, eager))
    factor = bounds.PEER if got.dtype == torch.float32 else 1 + 2 / got.numel() ** 0.5
    floor = bounds.unit() * truth.norm()
    assert torch.isfinite(got).all() and error <= factor * theirs + floor, (what, error, theirs)


def assert_contract(op, *leaves):
    """Whole outputs, untouched inputs, and the same bits again, also from a graph that was kept."""
    given = [x.detach().clone().requires_grad_() for x in leaves]
    before = [x.detach().clone() for x in given]
    runs = []
    for _ in range(2):
        results = op(*given)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [normal(7 + i, *x.shape, dtype=x.dtype) for i, x in enumerate(results)]
        held = [x.clone() for x in upstream]
        for keep in (True, False):
            grads = torch.autograd.grad(results, given, upstream, retain_graph=keep)
            runs.append([*(x.detach().clone() for x in results), *grads])
        assert all(torch.equal(x, y) for x, y in zip(upstream, held, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    for run in runs:
        assert all(torch.isfinite(x).all() for x in run)
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def assert_same(path, got, want):
    """Bits of the kernel; torch's own loops differ between strides in the last place."""
    for a, b in zip(got, want, strict=True):
        if path == "triton":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


def spread(x):
    """The same numbers with gaps between rows, and with gaps between the numbers of a row."""
    wide = x.new_full((len(x), *x.shape[1:-1], x.shape[-1] + 3), float("nan"))
    wide[..., 1:-2] = x
    gaps = x.new_full((*x.shape, 2), float("nan"))
    gaps[..., 0] = x
    return wide[..., 1:-2], gaps[..., 0]
