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

from intfast.kernels import norm_rope as op
from intfast.kernels import truth as definition
from intfast.kernels.norm_rope import HeadNorms, norm_rope

# (T, H, J, K): more tokens than programs; heads that fill a block of heads in part; halves that
# are no power of two; one head of each kind and one token; the smallest head; no tokens.
SHAPES = [(7, 6, 2, 16), (4, 4, 4, 24), (1, 1, 1, 20), (3, 2, 1, 2), (0, 2, 1, 8)]
EPS = 1e-6
NAMES = ["query", "key", "value", "dqkv", "dquery_weight", "dkey_weight"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of heads, the last of them with room, as in models."""
    stock = op._blocks
    monkeypatch.setattr(op, "_blocks", lambda *a: {**stock(*a), "BLOCK_H": 4})


def angles(rows, size, dtype):
    angle = torch.arange(rows)[:, None, None] * (1e4 ** -torch.linspace(0, 1, size // 2))
    angle = angle.repeat(1, 1, 2) + 0.3
    # A scale, as YaRN has: the rotation is not orthogonal.
    return (1.2 * angle.cos()).to(DEVICE, dtype), (1.2 * angle.sin()).to(DEVICE, dtype)


def leaves(shape, dtype, norms=True):
    rows, num_queries, num_kv, size = shape
    qkv = normal(1, rows, num_queries + 2 * num_kv, size, dtype=dtype)
    if not norms:
        return (qkv,)
    weights = [(1 + normal(i, size, scale=0.3)).to(dtype) for i in (2, 3)]
    return qkv, *weights


def call(function, shape, dtype, **kwargs):
    """Of (qkv, weights) or of qkv alone, with angles of the leaves' type and numbers of `dtype`."""

    def run(qkv, *weights):
        cos, sin = (x.to(qkv.dtype) for x in angles(shape[0], shape[3], dtype))
        norms = HeadNorms(*weights, EPS) if weights else None
        return function(qkv, shape[2], cos, sin, norms, **kwargs)

    return run


def eager(qkv, num_kv, cos, sin, norms):
    """As transformers writes it."""
    query, key, value = qkv.split((qkv.shape[1] - 2 * num_kv, num_kv, num_kv), 1)
    turned = []
    for x, weight in zip((query, key), norms[:2] if norms else (None, None), strict=True):
        if weight is not None:
            wide = x.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
            x = weight * (wide * scale).to(x.dtype)
        low, high = x.chunk(2, -1)
        turned.append(x * cos + torch.cat((-high, low), -1) * sin)
    return *turned, value


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_against_the_truth(path, dtype, shape, norms):
    given = leaves(shape, dtype, norms)
    found = [
        [*results, *grads]
        for results, grads in (
            outcome(call(norm_rope, shape, dtype, path=path), *given),
            outcome(call(eager, shape, dtype), *given),
            outcome(call(definition.norm_rope, shape, dtype), *given, dtype=torch.float64),
        )
    ]
    names = NAMES if norms else NAMES[:4]
    for name, ours, theirs, truth in zip(names, *found, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape, name
        assert torch.isfinite(ours).all(), name
        # A head of two numbers keeps but its direction: what is left of a gradient cancels.
        if path == "triton" and truth.numel() and shape[3] > 2:
            assert_no_worse(ours, theirs, truth, name)
        elif truth.numel():
            floor = bounds.of_sum(sum(shape), float(truth.abs().max()))
            allowed = bounds.PEER * (theirs.double() - truth).abs().max() + floor
            assert (ours.double() - truth).abs().max() <= allowed, name


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_rounds_once(dtype, shape, norms):
    given = leaves(shape, dtype, norms)
    results, grads = outcome(call(norm_rope, shape, dtype, path="triton"), *given)
    truths, true_grads = outcome(
        call(definition.norm_rope, shape, dtype), *given, dtype=torch.float64
    )
    assert torch.equal(results[2], given[0][:, -shape[2] :])
    scale = float(given[0].double().square().mean(2).clamp(min=0.05).rsqrt().max())
    for name, got, truth in zip(NAMES, results + grads, truths + true_grads, strict=False):
        # What is added up is at most a few times as large as the result, but for the gradients of
        # small heads.
        magnitude = 4 * (scale if name == "dqkv" and norms else 1) * float(truth.abs().max())
        assert_rounded_once(got, truth, sum(shape), magnitude, name)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_contract(path, norms):
    given = leaves(SHAPES[0], torch.float32, norms)
    assert_contract(call(norm_rope, SHAPES[0], torch.float32, path=path), *given)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_values_are_read_where_they_lie(path, norms):
    qkv, *weights = leaves(SHAPES[0], torch.float32, norms)
    value = call(norm_rope, SHAPES[0], torch.float32, path=path)(qkv, *weights)[2]
    assert value.data_ptr() == qkv[:, -2:].data_ptr() and value.stride() == qkv.stride()


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path, norms):
    shape = SHAPES[0]
    run = call(norm_rope, shape, torch.float32, path=path)
    qkv, *weights = leaves(shape, torch.float32, norms)
    want, want_grads = outcome(run, qkv, *weights)
    # Among them the heads of a slice of a wider projection, and tokens within heads.
    views = [*spread(qkv), qkv.transpose(0, 1).contiguous().transpose(0, 1)]
    for x in views:
        assert_same(path, run(x, *weights), want)
    given = [x.clone().requires_grad_() for x in (qkv, *weights)]
    for i in range(3):
        upstream = [normal(90 + j, *x.shape) for j, x in enumerate(want)]
        # As attention gives it back: tokens within heads.
        turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in upstream]
        upstream = [[*spread(x), y][i] for x, y in zip(upstream, turned, strict=True)]
        grads = torch.autograd.grad(run(*given), given, upstream)
        assert_same(path, grads, want_grads)
    sums = torch.autograd.grad(sum(x.sum() for x in run(*given)), given)
    ones = torch.autograd.grad(run(*given), given, [torch.ones_like(x) for x in want])
    for a, b in zip(sums, ones, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_through_one_result_alone(path):
    shape = SHAPES[1]
    for chosen in range(3):
        found = []
        for function, dtype, kwargs in (
            (norm_rope, torch.float32, {"path": path}),
            (definition.norm_rope, torch.float64, {}),
        ):
            given = [x.to(dtype).requires_grad_() for x in leaves(shape, torch.float32)]
            result = call(function, shape, torch.float32, **kwargs)(*given)[chosen]
            up = normal(5, *result.shape).to(dtype)
            found.append(torch.autograd.grad(result, given, up, allow_unused=True))
        for got, want in zip(*found, strict=True):
            # Nothing and zeros are the same to a weight.
            got, want = (torch.zeros(1) if x is None else x.cpu() for x in (got, want))
            bound = bounds.of_sum(sum(shape), 8 * float(want.abs().max()))
            assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-18, 1e4, 1e15])
def test_large_and_small_numbers(path, scale):
    shape = SHAPES[0]
    qkv, *weights = leaves(shape, torch.float32)
    qkv = scale * qkv
    qkv[2, 1] = 0
    results, grads = outcome(call(norm_rope, shape, torch.float32, path=path), qkv, *weights)
    truths, true_grads = outcome(
        call(definition.norm_rope, shape, torch.float32), qkv, *weights, dtype=torch.float64
    )
    assert (results[0][2, 1] == 0).all()
    parts = lambda x: x.reshape(-1, shape[3])  # noqa: E731
    for got, truth in zip([*results, *grads], [*truths, *true_grads], strict=True):
        assert torch.isfinite(got).all()
        allowed = 8 * bounds.of_sum(sum(shape), 1.0) * parts(truth).abs().amax(1, keepdim=True)
        assert ((parts(got).double() - parts(truth)).abs() <= allowed).all()


@pytest.mark.parametrize("path", PATHS)
def test_an_eps_of_zero_leaves_the_sums_over_tokens_finite(path):
    """What a block of heads or a last program reads past the end is zero: no scale may see it."""
    shape = SHAPES[0]
    given = leaves(shape, torch.float32)
    cos, sin = angles(shape[0], shape[3], torch.float32)

    def run(function, **kwargs):
        def call_it(qkv, *weights):
            norms = HeadNorms(*weights, 0.0)
            return function(qkv, shape[2], cos.to(qkv), sin.to(qkv), norms, **kwargs)

        return call_it

    _, grads = outcome(run(norm_rope, path=path), *given)
    _, true_grads = outcome(run(definition.norm_rope), *given, dtype=torch.float64)
    for got, truth in zip(grads, true_grads, strict=True):
        bound = bounds.of_sum(sum(shape), 8 * float(truth.abs().max()))
        assert (got.double() - truth).abs().max() <= bound


def test_generation_makes_the_same_with_fewer_calls():
    """Queries and keys together; the bits are those of training."""
    for norms in (True, False):
        given = leaves(SHAPES[0], torch.float32, norms)
        run = call(norm_rope, SHAPES[0], torch.float32, path="plain")
        with torch.inference_mode():
            found = run(*given)
        for a, b in zip(found, run(*given), strict=True):
            assert (a - b).abs().max() <= bounds.of_sum(8, float(b.abs().max()))


@pytest.mark.parametrize("norms", [True, False])
def test_gradcheck_of_the_plain_path(norms):
    shape = (3, 2, 1, 6)
    given = [x.double().requires_grad_() for x in leaves(shape, torch.float32, norms)]
    assert gradcheck(call(norm_rope, shape, torch.float64, path="plain"), given)


def test_bad_arguments_are_refused():
    shape = SHAPES[0]
    (qkv, *weights), (cos, sin) = leaves(shape, torch.float32), angles(7, 16, torch.float32)
    norms = HeadNorms(*weights, EPS)
    with pytest.raises(ValueError, match="path: expected one of"):
        norm_rope(qkv, 2, cos, sin, norms, path="rows")
    if not HAS_TRITON:
        return
    for bad, match in (
        ((qkv.flatten(1), 2, cos, sin, norms), "qkv: expected"),
        ((qkv, 5, cos, sin, norms), "qkv: expected"),
        ((qkv, 0, cos, sin, norms), "qkv: expected"),
        ((qkv[..., :15], 2, cos, sin, norms), "qkv: expected"),
        ((qkv, 2, cos[:4], sin, norms), "cos: expected"),
        ((qkv, 2, cos, sin[:, 0], norms), "sin: expected"),
        ((qkv, 2, cos, sin, norms._replace(key_K=weights[0][:4])), "norms: expected"),
        ((qkv.double(), 2, cos.double(), sin.double(), None), "use path='plain'"),
    ):
        with pytest.raises(ValueError, match=match):
            norm_rope(*bad, path="triton")
