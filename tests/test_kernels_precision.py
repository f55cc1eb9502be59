"""The loss head in bf16 and fp16, on the vocabularies of models, and where rounding bites."""

import pytest
import torch
from kernels_common import (
    DEVICE,
    HAS_TRITON,
    INTERPRETED,
    PATHS,
    assert_twice,
    assert_within,
    inputs,
    logprob_budget,
)

from intfast.kernels import truth as definition
from intfast.kernels.head.plan import IGNORE, TERMS, product
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import CrossEntropy, Reinforce, Streams

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tests/test_kernels_gpu.py has the device")

NARROW = [torch.bfloat16, torch.float16]
VOCABULARIES = [1, 31, 257, 32_000, 50_257, 128_256, 151_936]
# Every size of each axis, the largest of one with small ones of the other.
SHAPES = [
    *((3, 8, vocabulary) for vocabulary in VOCABULARIES),
    *((rows, 20, 257) for rows in (0, 1, 3, 255, 1025)),
    (255, 8, 32_000),
]


class Between(torch.autograd.Function):
    """fp32 logits whose gradient is rounded to the inputs' type for the gradient products.

    What autograd does between tensors of a narrow type, on a GPU with fp32 accumulation.
    """

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight = ctx.saved_tensors
        dlogits = dlogits.to(hidden.dtype).float()
        products = dlogits @ weight.float(), dlogits.T @ hidden.float()
        return tuple(product.to(hidden.dtype) for product in products)


def between(hidden, weight, target):
    logprob = Between.apply(hidden, weight).log_softmax(1)
    return logprob.gather(1, target[:, None])[:, 0], None


def run(fn, hidden, weight, target, **kwargs):
    """(logprob, gradient of hidden, gradient of weight) for a fixed upstream gradient."""
    upstream = torch.randn(len(target), generator=torch.Generator().manual_seed(7))
    pair = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    logprob, _ = fn(*pair, target, **kwargs)
    return logprob.detach(), *torch.autograd.grad(
        (logprob * upstream.to(logprob.dtype)).sum(), pair
    )


def truth_of(hidden, weight, target):
    return run(definition.linear_logprob, hidden.double(), weight.double(), target)


def assert_logprobs(got, truth):
    assert got.dtype == torch.float32
    assert ((got.double() - truth).abs() <= logprob_budget(truth)).all()


@pytest.fixture
def narrow_interpreter(monkeypatch):
    """The interpreter with bf16 that was checked against torch bit for bit."""
    import kernels_bf16

    kernels_bf16.repair(monkeypatch)
    return kernels_bf16


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_interpreter_rounds_as_a_device_does(narrow_interpreter):
    for dtype in NARROW:
        assert narrow_interpreter.interpreter_rounds(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_path_keeps_the_bound_exactly(shape, dtype):
    """The bound of fp32 logits and fp32 gradient products, without a floor."""
    rows, width, vocabulary = shape
    case = inputs(rows, width, vocabulary, scale=2.0, dtype=dtype)
    truth, eager = truth_of(*case), run(definition.linear_logprob, *case)
    # Two chunks, and one; all rows of this many columns are one chunk by default.
    for chunk_bytes in {10**9, max(1, rows // 2) * vocabulary * 8}:
        got = run(linear_logprob, *case, path="plain", chunk_bytes=chunk_bytes)
        assert_logprobs(got[0], truth[0])
        for value, plain, exact in zip(got[1:], eager[1:], truth[1:], strict=True):
            assert value.dtype == dtype
            assert_twice(value, plain, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_path_in_fp32(shape):
    case = inputs(*shape, scale=2.0)
    truth, eager = truth_of(*case), run(definition.linear_logprob, *case)
    got = run(linear_logprob, *case, path="plain")
    assert_logprobs(got[0], truth[0])
    for value, plain, exact in zip(got[1:], eager[1:], truth[1:], strict=True):
        if exact.numel():
            assert_within(value, plain, exact, 2e-6)


@pytest.mark.skipif("rows" not in PATHS, reason="needs triton")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(36, 18, 70), (1, 16, 31), (3, 5, 1), (5, 70, 150)], ids=str)
def test_rows_form_keeps_the_bound_exactly(shape, dtype, narrow_interpreter):
    case = inputs(*shape, scale=4.0, dtype=dtype)
    truth, eager = truth_of(*case), run(between, *case)
    for chunk_bytes in (10**9, 6 * 70 * 20):
        got = run(linear_logprob, *case, chunk_bytes=chunk_bytes, path="rows")
        assert_logprobs(got[0], truth[0])
        for value, plain, exact in zip(got[1:], eager[1:], truth[1:], strict=True):
            assert_twice(value, plain, exact)


@pytest.mark.skipif("odds" not in PATHS, reason="needs triton and its interpreter")
@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_odds_form_in_bf16(scale, narrow_interpreter):
    """Twice eager's error over the array and in its worst row.

    Not in each: the exponential and the scaled hidden states are rounded where eager rounds
    dlogits once, and a row in which that one rounding happens to be small has no room for two.
    """
    case = inputs(36, 18, 150, scale=scale, dtype=torch.bfloat16)
    truth, eager = truth_of(*case), run(between, *case)
    for chunk_bytes in (10**9, 6 * 150 * 20):
        got = run(linear_logprob, *case, chunk_bytes=chunk_bytes, path="odds")
        assert_logprobs(got[0], truth[0])
        for value, plain, exact in zip(got[1:], eager[1:], truth[1:], strict=True):
            error, allowed = (value.double() - exact).abs(), 2 * (plain.double() - exact).abs()
            size = exact.norm(dim=1)
            assert error.max() <= allowed.max()
            assert (error.norm(dim=1) / size).max() <= (allowed.norm(dim=1) / size).max()


@pytest.mark.skipif("odds" not in PATHS, reason="needs triton and its interpreter")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", [(1, 16, 2), (1, 8, 3), (2, 18, 2), (10, 18, 31)], ids=str)
def test_odds_form_of_a_few_numbers_in_bf16(shape, softcap, narrow_interpreter):
    """Eager may round a few numbers to nothing by luck, so twice its error is no bound there.

    What is: the exponentials, the scaled hidden states and the result are rounded once each.
    """
    unit = torch.finfo(torch.bfloat16).eps / 2
    case = inputs(*shape, scale=2.0, dtype=torch.bfloat16)
    wide = [x.double() if x.is_floating_point() else x for x in case]
    exact = run(definition.linear_logprob, *wide, softcap=softcap)
    got = run(linear_logprob, *case, path="odds", softcap=softcap)
    for value, truth in zip(got[1:], exact[1:], strict=True):
        assert (value.double() - truth).norm() <= 3 * unit * truth.norm()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 32])
def test_a_product_over_a_vocabulary_sums_in_blocks(rows):
    """Five standard deviations of what rounding each partial sum of the blocks must cost.

    A rounding is uniform, u |sum| / sqrt(3) in the mean square. One sum over all terms was found
    10 to 30 deviations off, for one row on every library and for 32 on some.
    """
    made = torch.Generator().manual_seed(0)
    left = torch.randn(rows, 151_936, generator=made).softmax(1)
    right = torch.randn(151_936, 8, generator=made)
    total, square = torch.zeros(rows, 8).double(), torch.zeros(rows, 8).double()
    for start in range(0, left.shape[1], TERMS):
        part = slice(start, start + TERMS)
        sums = (left.double()[:, part, None] * right.double()[None, part]).cumsum(1)
        total += sums[:, -1]
        square += sums.square().sum(1) + total.square()
    deviation = 2.0**-24 * (square / 3).sqrt()
    assert ((product(left, right) - total).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_one_chunk_rounds_its_weight_gradient_once(dtype):
    """The factors of a single chunk were rounded to the weight's type before the product."""
    case = inputs(1, 4, 151_936, scale=2.0, dtype=dtype)
    truth, eager = truth_of(*case), run(definition.linear_logprob, *case)
    got = run(linear_logprob, *case, path="plain")
    assert_twice(got[2], eager[2], truth[2])


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path):
    hidden, weight, target = inputs(9, 16, 40)
    streams = Streams(torch.ones(9), torch.linspace(-1, 1, 9))
    pair = hidden.requires_grad_(), weight.requires_grad_()

    def both():
        logprob, _ = linear_logprob(*pair, target, path=path)
        out = linear_objective(*pair, target, Reinforce(), streams, path=path)
        grads = torch.autograd.grad(logprob.sum() + out.loss, pair)
        return logprob, out.loss, *grads

    plain = both()
    with torch.autocast("cpu", torch.bfloat16):
        cast = both()
    for x, y in zip(plain, cast, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_rows_masked_in_every_type(dtype):
    hidden, weight, target = inputs(5, 8, 31, dtype=dtype)
    target[:] = IGNORE
    got = run(linear_logprob, hidden * float("nan"), weight, target, path="plain")
    assert all((value == 0).all() for value in got)
    streams = Streams(torch.ones(5, device=DEVICE))
    pair = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_objective(*pair, target, CrossEntropy(), streams, path="plain")
    assert out.loss == 0 and all((g == 0).all() for g in torch.autograd.grad(out.loss, pair))
