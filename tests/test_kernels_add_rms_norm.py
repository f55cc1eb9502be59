import bounds
import pytest
import torch
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
from intfast.kernels.add_rms_norm import MAX_WIDTH, add_rms_norm

# More rows than programs and not a multiple; widths that are no power of two; one row; none.
SHAPES = [(7, 20), (1, 33), (4, 64), (2, 1030), (0, 8)]
EPS = 1e-6
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def eager(x, delta, weight):
    """As transformers writes it."""
    stream = x if delta is None else x + delta
    wide = stream.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return stream, weight * (wide * scale).to(x.dtype)


def leaves(rows, width, dtype, add=True, scale=1.0):
    delta = normal(2, rows, width, scale=scale, dtype=dtype) if add else None
    weight = 1 + normal(3, width, scale=0.3, dtype=torch.float32)
    return normal(1, rows, width, scale=scale, dtype=dtype), delta, weight.to(dtype)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_against_the_truth(path, dtype, shape, add):
    given = leaves(*shape, dtype, add)
    names = ["stream", "normed", "dx", *(["ddelta"] if add else []), "dweight"]
    found = [
        [*results, *grads]
        for results, grads in (
            outcome(lambda *a: add_rms_norm(*a, EPS, path=path), *given),
            outcome(eager, *given),
            outcome(lambda *a: definition.add_rms_norm(*a, EPS), *given, dtype=torch.float64),
        )
    ]
    for name, ours, theirs, truth in zip(names, *found, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert torch.isfinite(ours).all()
        if path == "triton" and truth.numel() > 1:
            assert_no_worse(ours, theirs, truth, name)
        elif truth.numel():
            # Both are off by roundings of the same kind, at other places.
            floor = bounds.of_sum(sum(shape), float(truth.abs().max()))
            allowed = bounds.PEER * (theirs.double() - truth).abs().max() + floor
            assert (ours.double() - truth).abs().max() <= allowed, name


@needs_triton
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_rounds_once(dtype, shape):
    x, delta, weight = leaves(*shape, dtype)
    (stream, normed), grads = outcome(
        lambda *a: add_rms_norm(*a, EPS, path="triton"), x, delta, weight
    )
    assert torch.equal(stream, x + delta)
    # From here on the stream is what was rounded.
    (_, normed_truth), (dx, dweight) = outcome(
        lambda s, w: definition.add_rms_norm(s, None, w, EPS), stream, weight, dtype=torch.float64
    )
    narrow = (stream.double().square().mean(1, keepdim=True) + EPS).rsqrt()
    largest = max(normal(91, *shape).abs().max() * weight.abs().max() * narrow.max(), 4.0)
    assert_rounded_once(normed, normed_truth, shape[1], normed_truth.abs().max(), "normed")
    assert torch.equal(grads[0], grads[1])
    assert_rounded_once(grads[0], dx, shape[1], 4 * largest, "dx")
    terms = (normal(91, *shape, dtype=dtype).double() * normed_truth / weight.double()).abs()
    assert_rounded_once(grads[2], dweight, sum(shape), terms.sum(0).max(), "dweight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_rows_of_one_number_have_no_direction(path, dtype):
    x, delta, weight = leaves(3, 1, dtype)
    (stream, normed), (dx, _, _) = outcome(
        lambda *a: add_rms_norm(*a, 0.0, path=path), x, delta, weight
    )
    torch.testing.assert_close(normed, stream.sign() * weight)
    # The gradient of the stream alone is left, up to what cancels in it.
    cancelled = normal(91, 3, 1, dtype=dtype) * weight / stream
    allowed = bounds.of_sum(3, 1, dtype) * cancelled.abs().max()
    assert (dx - normal(90, 3, 1, dtype=dtype)).abs().max() <= allowed


@pytest.mark.parametrize("path", PATHS)
def test_contract(path):
    assert_contract(lambda *a: add_rms_norm(*a, EPS, path=path), *leaves(7, 20, torch.float32))
    x, _, weight = leaves(7, 20, torch.float32, add=False)
    assert_contract(lambda x, w: add_rms_norm(x, None, w, EPS, path=path), x, weight)


@pytest.mark.parametrize("path", PATHS)
def test_without_delta_the_stream_is_x_and_nothing_is_copied(path):
    x, _, weight = leaves(3, 8, torch.float32, add=False)
    stream, _ = add_rms_norm(x, None, weight, EPS, path=path)
    assert stream.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path):
    x, delta, weight = leaves(5, 18, torch.float32)
    want, want_grads = outcome(lambda *a: add_rms_norm(*a, EPS, path=path), x, delta, weight)
    for wide_x, wide_delta in ((a, b) for a in spread(x) for b in spread(delta)):
        got = add_rms_norm(wide_x, wide_delta, spread(weight[None])[1][0], EPS, path=path)
        assert_same(path, got, want)
    # The gradients that come in have gaps as well; one of them is a single number everywhere.
    given = [y.clone().requires_grad_() for y in (x, delta, weight)]
    for i in range(2):
        upstream = [spread(normal(90 + j, 5, 18))[i] for j in range(2)]
        grads = torch.autograd.grad(add_rms_norm(*given, EPS, path=path), given, upstream)
        assert_same(path, grads, want_grads)
    grads = torch.autograd.grad(add_rms_norm(*given, EPS, path=path)[1].sum(), given)
    ones = [torch.zeros(5, 18, device=DEVICE), torch.ones(5, 18, device=DEVICE)]
    full = torch.autograd.grad(add_rms_norm(*given, EPS, path=path), given, ones)
    for a, b in zip(grads, full, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("add", [True, False])
def test_a_gradient_through_one_result_alone(path, add):
    x, delta, weight = leaves(5, 18, torch.float32, add)
    for chosen in (0, 1):
        found = []
        for op, dtype in ((add_rms_norm, None), (definition.add_rms_norm, torch.float64)):
            kwargs = {"path": path} if dtype is None else {}
            given = [y for y in (x, delta, weight) if y is not None]
            given = [y.to(dtype or y.dtype).requires_grad_() for y in given]
            results = op(given[0], given[1] if add else None, given[-1], EPS, **kwargs)
            up = normal(5, 5, 18).to(results[chosen].dtype)
            grads = torch.autograd.grad(results[chosen], given, up, allow_unused=True)
            found.append(grads)
        for got, want in zip(*found, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                bound = bounds.of_sum(18, 8 * float(want.abs().max()))
                assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("path", PATHS)
def test_frozen_weights_and_streams(path):
    x, delta, weight = leaves(4, 6, torch.float32)
    full = outcome(lambda *a: add_rms_norm(*a, EPS, path=path)[1], x, delta, weight)[1]
    for i in range(3):
        given = [y.clone().requires_grad_(j == i) for j, y in enumerate((x, delta, weight))]
        normed = add_rms_norm(*given, EPS, path=path)[1]
        (grad,) = torch.autograd.grad(normed, given[i], normal(90, 4, 6))
        assert torch.equal(grad, full[i])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-18, 1e-4, 1e4, 1e15])
def test_large_and_small_numbers(path, scale):
    """eps decides below 1e-3; above 1e18 the squares leave fp32, in every implementation."""
    x, _, weight = leaves(4, 24, torch.float32, add=False, scale=scale)
    x[1] = 0
    results, grads = outcome(lambda x, w: add_rms_norm(x, None, w, EPS, path=path)[1], x, weight)
    truths, true_grads = outcome(
        lambda x, w: definition.add_rms_norm(x, None, w, EPS)[1], x, weight, dtype=torch.float64
    )
    assert (results[0][1] == 0).all()
    for got, truth in zip([*results, *grads], [*truths, *true_grads], strict=True):
        for row, exact in zip(got.view(-1, 24), truth.view(-1, 24), strict=True):
            assert torch.isfinite(row).all()
            largest = float(exact.abs().max())
            assert (row.double() - exact).abs().max() <= bounds.of_sum(24, 8 * largest)


@pytest.mark.parametrize("path", PATHS)
def test_eps_is_added_to_the_mean_square(path):
    x, weight = torch.full((1, 4), 2.0, device=DEVICE), torch.ones(4, device=DEVICE)
    for eps, want in ((0.0, 1.0), (12.0, 0.5)):
        assert torch.equal(add_rms_norm(x, None, weight, eps, path=path)[1], want * weight[None])


def test_gradcheck_of_the_plain_path():
    x, delta, weight = (y.double().requires_grad_() for y in leaves(3, 6, torch.float32))
    assert gradcheck(lambda *a: add_rms_norm(*a, EPS, path="plain"), (x, delta, weight))


def test_bad_arguments_are_refused():
    x, delta, weight = leaves(3, 8, torch.float32)
    with pytest.raises(ValueError, match="path: expected one of"):
        add_rms_norm(x, delta, weight, EPS, path="odds")
    if not HAS_TRITON:
        return
    for bad, match in (
        ((x[None], delta[None], weight), "x: expected"),
        ((x, delta, weight[:4]), "weight: expected"),
        ((x, delta[:2], weight), "delta: expected"),
        ((x, delta.bfloat16(), weight), "delta: expected"),
        ((x.double(), delta.double(), weight.double()), "use path='plain'"),
        ((x.new_zeros(1, MAX_WIDTH + 1), None, weight), "up to 8192"),
    ):
        with pytest.raises(ValueError, match=match):
            add_rms_norm(*bad, EPS, path="triton")
