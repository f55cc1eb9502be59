import bounds
import pytest
import torch
from kernels_common import (
    DEVICE,
    INTERPRETED,
    LOGPROB_BUDGET,
    PATHS,
    assert_within,
    inputs,
)

from intfast.kernels import truth as definition
from intfast.kernels.head import chunks
from intfast.kernels.head.plan import IGNORE, Head, HeadPlan, plan_head, read_recipe
from intfast.kernels.head.tiles import Tile
from intfast.kernels.linear_logprob import linear_logprob

# (T, D, V, chunk_bytes): several tiles and ragged tails on every axis, single rows, columns, none
SHAPES = [(36, 18, 70, 6_000), (1, 16, 31, 10**9), (3, 5, 1, 10**9), (0, 8, 9, 10**9)]
# more than 32 tiles of the vocabulary; hidden states wider than 1,024
WIDE = [(3, 8, 1100, 10**9), (3, 1030, 9, 10**9)]


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(fn, hidden, weight, target, upstream, **kwargs):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    logprob, entropy = fn(hidden, weight, target, **kwargs)
    loss = (logprob * upstream[0].to(logprob.dtype)).sum()
    if upstream[1] is not None:
        loss = loss + (entropy * upstream[1].to(entropy.dtype)).sum()
    return logprob.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


def compare(hidden, weight, target, path, entropy, chunk, budget=LOGPROB_BUDGET, **kwargs):
    made = torch.Generator().manual_seed(7)
    upstream = [torch.randn(len(target), generator=made).to(DEVICE) for _ in range(2)]
    if entropy != "gradient":
        upstream[1] = None
    call = (target, upstream)
    truth = run(definition.linear_logprob, hidden.double(), weight.double(), *call, **kwargs)
    eager = run(definition.linear_logprob, hidden, weight, *call, **kwargs)
    extra = {"entropy": entropy, "chunk_bytes": chunk, "path": path}
    got = run(linear_logprob, hidden, weight, *call, **kwargs, **extra)
    assert got[0].dtype == torch.float32 and (got[0] <= 0).all()
    if len(target):
        for value, exact in zip(got[:2], truth[:2], strict=True):
            assert (value.double() - exact).abs().max() <= budget
        assert_within(got[2], eager[2], truth[2], 2e-6)
    assert_within(got[3], eager[3], truth[3], 2e-6)
    return got, truth


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("capped", [False, True])
def test_values_and_gradients_against_fp64(path, shape, capped):
    T, D, V, chunk = shape
    hidden, weight, target = inputs(T, D, V, scale=2.0)
    target[T // 2 : T // 2 + 1] = IGNORE
    entropy = "value" if path == "odds" else "gradient"
    kwargs = {"temperature": 0.7, "softcap": 3.0} if capped else {}
    compare(hidden, weight, target, path, entropy, chunk, **kwargs)


@pytest.mark.parametrize("path", [path for path in PATHS if path == "odds"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_second_tiles_of_the_small_kernels(path, shape):
    T, D, V, chunk = shape
    compare(*inputs(T, D, V, scale=2.0), path, "value", chunk)


@pytest.mark.parametrize("path", PATHS)
def test_confident_tokens_keep_their_relative_accuracy(path):
    _, weight, target = inputs(12, 16, 40)
    margin = torch.linspace(8, 30, 12, device=DEVICE)
    hidden = weight[target] / weight[target].square().sum(1, True) * margin[:, None]
    got, truth = compare(hidden, weight, target, path, "value", 10**9)
    confident = truth[0] > -1e-3
    assert confident.sum() >= 3 and truth[0].max() > -1e-6
    # the exponential carries over what two logits are off, sums of 16 terms up to 30
    budget = bounds.of_sum(2 * 16, 30.0)
    assert (got[0].double() / truth[0] - 1).abs()[confident].max() < budget
    rows = (got[2].double() - truth[2]).norm(dim=1) / truth[2].norm(dim=1)
    # the rare words' part and the target's, each that far off
    assert rows.max() < 2 * budget


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [None, 200.0])
@pytest.mark.parametrize("shape", [(10, 16, 40), (6, 70, 150)], ids=str)
def test_logits_of_eighty(path, softcap, shape):
    hidden, weight, target = inputs(*shape)
    hidden = hidden / (hidden @ weight.T).abs().amax(1, True) * 80
    own = (hidden[::2] * weight[target[::2]]).sum(1, True)
    hidden[::2] *= -own.sign()
    # three units in the last place of a logit of 80, or of the softcap; or what eager is off here,
    # whose logits are the same sums in the order of this library
    pair = hidden.double(), weight.double()
    plain, _ = definition.linear_logprob(hidden, weight, target, softcap=softcap)
    exact, _ = definition.linear_logprob(*pair, target, softcap=softcap)
    budget = 3 * 2.0 ** (-17 if softcap is None else -16)
    budget = max(budget, 2 * float((plain - exact).abs().max()))
    _, truth = compare(hidden, weight, target, path, "value", 10**9, budget, softcap=softcap)
    assert truth[0].min() < -80 and truth[0].max() > -64


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_logit_in_the_last_tile(path):
    """150 above the first tiles: an exponential relative to their maximum is infinite."""
    hidden, weight, target = inputs(3, 16, 150)
    weight[:128, 0], weight[128:, 0], hidden[:, 0] = -5.0, 10.0, 10.0
    target[:] = torch.tensor([5, 70, 140])
    compare(hidden, weight, target, path, "value", 10**9, 3 * 2.0**-16)


@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_reach_nothing(path):
    hidden, weight, target = inputs(19, 21, 40)
    dead = [0, 5, 18]
    target[dead], hidden[dead] = IGNORE, float("nan")
    upstream = torch.ones(19, device=DEVICE)
    upstream[5] = float("nan")
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy = linear_logprob(h, w, target, path=path)
    logprob.backward(upstream)
    for value in (logprob, entropy, h.grad):
        assert (value[dead] == 0).all() and torch.isfinite(value).all()
    assert torch.isfinite(w.grad).all() and w.grad.norm() > 0
    h.grad = w.grad = None
    logprob, _ = linear_logprob(h, w, torch.full_like(target, IGNORE), path=path)
    logprob.sum().backward()
    assert (logprob == 0).all() and (h.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_rows_main_gradient_and_frozen_inputs(path):
    hidden, weight, target = inputs(21, 17, 40)
    rows = torch.tensor([1, 2, 3, 11, 20], device=DEVICE)
    upstream = torch.linspace(-1, 2, 21, device=DEVICE)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    only = torch.full_like(target, IGNORE).index_copy_(0, rows, target[rows])
    want, exact = (
        run(definition.linear_logprob, *pair, only, [upstream, None])
        for pair in ((h, w), (h.double(), w.double()))
    )
    want, exact = [(v[0], *v[2:]) for v in (want, exact)]

    def call(h, w, **extra):
        return linear_logprob(h, w, target, rows_R=rows, **extra, path=path)[0]

    picked = call(h, w)
    got = (picked, *torch.autograd.grad(picked, (h, w), upstream))
    main = torch.ones_like(weight)
    into_main = torch.autograd.grad(
        call(h, weight, main_grad_VD=main, chunk_bytes=2_000), h, upstream
    )
    frozen = torch.autograd.grad(call(h, weight), h, upstream)
    alone = torch.autograd.grad(call(hidden, w), w, upstream)
    assert ((got[0].double() - exact[0]).abs() <= LOGPROB_BUDGET).all()
    pairs = [(got[1], 1), (got[2], 2), (main - 1, 2), (alone[0], 2)]
    for x, i in [*pairs, (into_main[0], 1), (frozen[0], 1)]:
        assert_within(x, want[i], exact[i], 2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_strided_inputs_nothing_modified_and_repeatable(path):
    hidden, weight, target = inputs(17, 18, 40)
    strided = hidden.T.contiguous().T.requires_grad_()
    wide = torch.randn(40, 25, device=DEVICE)
    wide[:, :18] = weight
    sliced = wide[:, :18].requires_grad_()
    upstream = torch.linspace(-1, 2, 17, device=DEVICE)
    held = (strided, sliced, target, upstream)
    before = [x.detach().clone() for x in held]
    runs = []
    for _ in range(2):
        logprob, _ = linear_logprob(strided, sliced, target, path=path)
        runs.append((logprob, *torch.autograd.grad(logprob, (strided, sliced), upstream)))
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    eager, truth = (
        run(definition.linear_logprob, *pair, target, [upstream, None])
        for pair in ((hidden, weight), (hidden.double(), weight.double()))
    )
    assert_within(runs[0][1], eager[2], truth[2], 2e-6)
    assert_within(runs[0][2], eager[3], truth[3], 2e-6)


@pytest.mark.skipif(not INTERPRETED, reason="CUDA targets are not checked on the host")
def test_bad_inputs_are_refused():
    hidden, weight, target = inputs(4, 8, 9)
    bad = target.clone()
    bad[2] = 9
    with pytest.raises(ValueError, match="row 2"):
        linear_logprob(hidden, weight, bad)
    for kwargs in ({"temperature": 0.0}, {"softcap": -1.0}, {"chunk_bytes": 0}, {"path": "x"}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            linear_logprob(hidden, weight, target, **kwargs)
    with pytest.raises(ValueError, match="one floating type"):
        linear_logprob(hidden.double(), weight, target)
    with pytest.raises(ValueError, match="main_grad_VD"):
        linear_logprob(hidden, weight, target, main_grad_VD=torch.zeros(9, 7))
    for old in ("temprature", "impl", "form"):
        with pytest.raises(TypeError, match=f"{old}: expected some of temperature, .* path, tile"):
            linear_logprob(hidden, weight, target, **{old: 1.0})


@pytest.mark.parametrize("tile", [None, Tile(64, 128, 32, 4, 3, tma=True, warp_specialize=False)])
def test_a_recipe_reads_back_as_its_plan(tile):
    plan = HeadPlan("odds" if tile else "plain", 1 / 3, 0.1, "value", tile)
    assert read_recipe(plan.recipe) == plan


@pytest.mark.parametrize("path", [path for path in PATHS if path != "plain"])
def test_impossible_target_shows_as_nan_without_a_host_check(path):

    hidden, weight, target = inputs(5, 8, 9)
    plan = plan_head(hidden, weight, target, Head(path=path))
    target[3] = 12
    logprob, _ = chunks.statistics(chunks.gather(hidden, weight, target, None, plan))
    assert logprob.isnan().tolist() == [False, False, False, True, False]


def test_fp64_gradcheck():
    hidden, weight, target = inputs(5, 4, 7, dtype=torch.float64)
    target[1] = IGNORE

    def fn(h, w):
        return linear_logprob(
            h, w, target, temperature=0.8, softcap=4.0, entropy="gradient",
            path="plain", chunk_bytes=300,
        )  # fmt: skip

    assert torch.autograd.gradcheck(fn, (hidden.requires_grad_(), weight.requires_grad_()))


def far_rows(value):
    """The same rows 2**30 elements apart, so that row 2 starts beyond int32."""
    stride = 2**30
    store = torch.empty((len(value) - 1) * stride + value.shape[1])
    return store.as_strided(value.shape, (stride, 1)).copy_(value)


@pytest.mark.skipif("odds" not in PATHS, reason="needs the interpreter")
@pytest.mark.parametrize("far", ["hidden", "weight", "logits"])
def test_offsets_beyond_two_to_the_31(far, monkeypatch):
    from intfast.kernels.head import odds, rows

    # The memory is virtual as long as nothing poisons it.
    torch.use_deterministic_algorithms(False)
    hidden, weight, target = inputs(3, 8, 4, scale=3.0)
    want, _ = definition.linear_logprob(hidden, weight, target)
    path = "rows" if far == "logits" else "odds"
    plan = plan_head(hidden, weight, target, Head(path=path))
    if far == "logits":
        logits = far_rows(hidden @ weight.T)
        monkeypatch.setattr(rows, "product", lambda left, right: logits)
        got = rows.chunk(hidden, weight, target, plan, keep=True)
        ones = torch.ones(3)
        grad = rows.chunk_gradient(got[3], got[2], ones, None, target, plan, torch.float32)
        # a probability is off by what the arguments of its exponential and of the sum's are
        off = bounds.worst(1, 2 * (2 * logits.abs().max().item() + 8))
        assert grad.sum(1).abs().max() < off and (grad.abs().sum(1) > 0.01).all()
    else:
        pair = {"hidden": hidden, "weight": weight}
        pair[far] = far_rows(pair[far])
        got = odds.chunk(pair["hidden"], pair["weight"], target, plan, keep=True)
    torch.testing.assert_close(got[0], want)
