"""Every op on a CUDA device against fp64, on the sizes that models have and on ragged ones.

The hidden states and weights are bf16. "eager" has fp32 logits, and rounds their gradient to bf16
for the gradient products as autograd does between bf16 tensors.
"""

import pytest
import torch
from kernels_common import LOGPROB_BUDGET, assert_within

from intfast.kernels import truth as definition
from intfast.kernels.group_advantages import TokenLayout, group_advantages
from intfast.kernels.head.autotune import Shape, autotune
from intfast.kernels.head.plan import IGNORE
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import EntropyBonus, Kl, PolicyClip, SequenceClip, Streams, Sum
from intfast.kernels.span_cross_entropy import span_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARIES = [1, 31, 257, 32_000, 50_257, 128_256, 151_936]
ROWS = [0, 1, 3, 255, 1025]
# Not a multiple of a tile; not a multiple of 16 bytes (the rows path); a model's own.
WIDTHS = [200, 100, 2560]
# Every size of each axis once and the largest together; not the whole product.
SHAPES = [
    *((255, 200, vocabulary) for vocabulary in VOCABULARIES),
    *((rows, 200, 32_000) for rows in ROWS),
    *((255, width, 50_257) for width in WIDTHS),
    (1025, 2560, 151_936),
]
PATHS = ["odds", "rows"]


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 products are the yardstick here, so they must not be rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


def make(rows, width, vocabulary, peak=12.0, dtype=torch.bfloat16):
    """(hidden, weight, target): some targets near probability 1, some unlikely."""
    made = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=made, device="cuda")
    target = torch.randint(vocabulary, (rows,), generator=made, device="cuda")
    hidden = 2 * torch.randn(rows, width, generator=made, device="cuda") / width**0.5
    hidden += peak * torch.rand(rows, 1, generator=made, device="cuda") * weight[target] / width
    return hidden.to(dtype), weight.to(dtype), target


class Fp32Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight = ctx.saved_tensors
        dlogits = dlogits.to(hidden.dtype)
        return dlogits @ weight, dlogits.T @ hidden


def plain_logprob(hidden, weight, target, temperature=1.0):
    """(log-prob, entropy): the reference in fp64, eager PyTorch otherwise."""
    if hidden.dtype == torch.float64:
        return definition.linear_logprob(hidden, weight, target, temperature=temperature)
    live = target != IGNORE
    logp = (Fp32Logits.apply(hidden, weight) / temperature).log_softmax(1)
    chosen = logp.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(live, chosen, 0), torch.where(live, -(logp.exp() * logp).sum(1), 0)


def skip_unaligned(path, width):
    if path == "odds" and width % 8:
        pytest.skip("the odds path needs rows of 16 bytes; it refuses this width")


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def leaves(hidden, weight, dtype=None):
    return (
        hidden.detach().to(dtype or hidden.dtype).requires_grad_(),
        weight.detach().to(dtype or weight.dtype).requires_grad_(),
    )


def assert_gradients(got, eager, truth):
    for value, plain, exact in zip(got, eager, truth, strict=True):
        if exact.numel():
            assert_within(value, plain, exact, 2e-6)


def three_ways(hidden, weight, ours, plain):
    """(value, gradients) of ours, of eager fp32 logits and in fp64."""
    found = []
    for call, dtype in ((ours, None), (plain, None), (plain, torch.float64)):
        pair = leaves(hidden, weight, dtype)
        value = call(*pair)
        found.append((value.detach(), gradients(value, *pair)))
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprob(path, shape):
    rows, width, vocabulary = shape
    skip_unaligned(path, width)
    hidden, weight, target = make(*shape)
    target[rows // 2 : rows // 2 + 1] = IGNORE
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1)).cuda()
    kwargs = {"temperature": 0.8}

    def ours(h, w):
        # Two chunks, so that the weight's gradient is summed over them.
        half = max(1, rows // 2) * 4 * max(8, vocabulary)
        logprob, _ = linear_logprob(h, w, target, path=path, chunk_bytes=half,
                                    **kwargs)  # fmt: skip
        return (logprob * upstream).sum()

    def plain(h, w):
        logprob, _ = plain_logprob(h, w, target, **kwargs)
        return (logprob * upstream.to(logprob.dtype)).sum()

    got, eager, truth = three_ways(hidden, weight, ours, plain)
    assert_gradients(got[1], eager[1], truth[1])
    if rows == 0:
        return
    with torch.no_grad():
        logprob, entropy = linear_logprob(hidden, weight, target, path=path, **kwargs)
        exact = definition.linear_logprob(hidden.double(), weight.double(), target, **kwargs)
    assert (logprob <= 0).all()
    assert (logprob.double() - exact[0]).abs().max() <= LOGPROB_BUDGET
    assert (entropy.double() - exact[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_confident_tokens_and_large_logits(path):
    """1 - p down to 1e-6 keeps its relative accuracy; logits of +-80 stay finite."""
    hidden, weight, target = make(64, 256, 32_000)
    scale = torch.linspace(0, 60, 64, device="cuda")[:, None]
    hidden = (scale * weight[target].float() / 256).to(torch.bfloat16)
    logprob, _ = linear_logprob(hidden, weight, target, path=path)
    exact, _ = definition.linear_logprob(hidden.double(), weight.double(), target)
    assert exact.abs().min() < 1e-6
    assert ((logprob.double() - exact).abs() <= 1e-5 + 1e-3 * exact.abs()).all()
    confident = exact.abs() < 1e-3
    error = (logprob.double() - exact).abs() / exact.abs().clamp(min=1e-9)
    assert error[confident & (exact.abs() > 1e-8)].max() < 1e-2
    hidden = torch.full((3, 64), 10.0, device="cuda")
    weight = torch.full((99, 64), 0.125, device="cuda")
    weight[::2] *= -1
    large = [value.to(torch.bfloat16) for value in (hidden, weight)]
    target = torch.tensor([0, 1, 98], device="cuda")
    logprob, entropy = linear_logprob(*large, target, path=path)
    exact, _ = definition.linear_logprob(*(value.double() for value in large), target)
    assert torch.isfinite(entropy).all()
    assert ((logprob.double() - exact).abs() <= 1e-5 * (1 + exact.abs())).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["clip", "sum", "sequence"])
@pytest.mark.parametrize("main", [False, True])
def test_objective(path, kind, main):
    rows = 700
    hidden, weight, target = make(rows, 256, 50_257, peak=6.0)
    made = torch.Generator().manual_seed(2)
    near, _ = definition.linear_logprob(hidden.double(), weight.double(), target)
    streams = Streams(
        (torch.rand(rows, generator=made) > 0.4).float().cuda(),
        # constant within a sequence, as the sequence objective's derivative assumes
        torch.randn(7, generator=made).cuda().repeat_interleave(100),
        near.float() + 0.2 * torch.randn(rows, generator=made).cuda(),
        near.float() + 0.2 * torch.randn(rows, generator=made).cuda(),
        None,
        torch.arange(7, device="cuda").repeat_interleave(100),
    )
    objective = {
        "clip": PolicyClip(0.1, 0.2, 3.0),
        "sum": Sum((PolicyClip(), Kl(0.1, "k3"))),
        "sequence": SequenceClip(7, 0.05, 0.05),
    }[kind]
    rows_R = streams.weight_T.cpu().nonzero()[:, 0].cuda()
    buffer = torch.ones(weight.shape, device="cuda") if main else None

    def ours(h, w):
        options = {"rows_R": rows_R, "main_grad_VD": buffer, "chunk_bytes": 130 * 50_264 * 6}
        return linear_objective(
            h, w, target, objective, streams, path=path, entropy="none", **options
        ).loss

    def plain(h, w):
        return loss_of(plain_logprob(h, w, target)[0])

    def loss_of(logp):
        A, old, weight_T = streams.advantage_T, streams.old_T, streams.weight_T
        change = logp - old
        if kind == "sequence":
            grid, live = change.view(7, 100), weight_T.view(7, 100)
            change = ((grid * live).sum(1) / live.sum(1)).repeat_interleave(100)
        ratio = change.exp()
        low, high = {"clip": (0.1, 0.2), "sum": (0.2, 0.2), "sequence": (0.05, 0.05)}[kind]
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
        if kind == "clip":
            loss = torch.where(A < 0, torch.minimum(loss, -3.0 * A), loss)
        if kind == "sum":
            d = streams.reference_T - logp
            loss = loss + 0.1 * (d.exp() - d - 1)
        return (weight_T * loss).sum()

    if not main:
        got, eager, truth = three_ways(hidden, weight, ours, plain)
    else:
        _, eager, truth = three_ways(hidden, weight, plain, plain)
        pair = leaves(hidden, weight)
        value = ours(*pair)
        (hidden_grad,) = gradients(value, pair[0])
        got = value.detach(), (hidden_grad, buffer - 1)
    assert (got[0].double() - truth[0]).abs() <= 1e-5 * streams.weight_T.sum()
    if main:
        # fp32 against eager's bf16 gradient, after an addition to 1
        assert_within(got[1][0], eager[1][0], truth[1][0], 2e-6)
        assert_within(got[1][1], eager[1][1], truth[1][1], 1e-5)
    else:
        assert_gradients(got[1], eager[1], truth[1])


def test_entropy_bonus_runs_and_agrees():
    hidden, weight, target = make(130, 256, 4001, peak=4.0)
    streams = Streams(torch.ones(130, device="cuda"), torch.ones(130, device="cuda"))
    objective = Sum((PolicyClip(), EntropyBonus(0.3)))

    def ours(h, w):
        return linear_objective(h, w, target, objective, streams).loss

    def plain(h, w):
        logp, entropy = plain_logprob(h, w, target)
        return -((logp - logp.detach()).exp() + 0.3 * entropy).sum()

    got, eager, truth = three_ways(hidden, weight, ours, plain)
    assert (got[0].double() - truth[0]).abs() < 1e-3
    # Over a whole array: single rows of few large terms round twice in one and once in the other.
    for value, plain_grad, exact in zip(got[1], eager[1], truth[1], strict=True):
        assert (value - exact).norm() <= 2 * (plain_grad - exact).norm()


@pytest.mark.parametrize("shape", [(1025, 2560, 151_936), (255, 100, 257), (3, 200, 31)], ids=str)
def test_span_cross_entropy(shape):
    rows, *_ = shape
    hidden, weight, target = make(*shape)
    weight_T = torch.rand(rows, generator=torch.Generator().manual_seed(3))
    weight_T[1::3] = 0

    def ours(h, w):
        return span_cross_entropy(h, w, target, weight_T)

    def plain(h, w):
        return -(weight_T.cuda() * plain_logprob(h, w, target)[0]).sum()

    got, eager, truth = three_ways(hidden, weight, ours, plain)
    assert (got[0].double() - truth[0]).abs() <= 2e-5 * rows
    assert_gradients(got[1], eager[1], truth[1])
    assert (got[1][0][1::3] == 0).all()


def test_frozen_head_masked_rows_and_strided_inputs():
    hidden, weight, target = make(96, 256, 1003)
    strided = torch.stack((hidden, hidden), 2)[..., 0].requires_grad_()
    assert not strided.is_contiguous()
    logprob, _ = linear_logprob(strided, weight, target)
    (got,) = torch.autograd.grad(logprob.sum(), strided)
    plain = hidden.detach().clone().requires_grad_()
    value, _ = linear_logprob(plain, weight, target)
    (expected,) = torch.autograd.grad(value.sum(), plain)
    assert torch.equal(logprob, value) and torch.equal(got, expected)
    target[:] = IGNORE
    logprob, _ = linear_logprob(plain, weight, target)
    (got,) = torch.autograd.grad(logprob.sum(), plain)
    assert (logprob == 0).all() and (got == 0).all()


def test_same_bits_from_run_to_run():
    hidden, weight, target = make(513, 512, 32_003)
    streams = Streams(torch.ones(513, device="cuda"), torch.randn(513).cuda())
    results = []
    for _ in range(3):
        pair = leaves(hidden, weight)
        loss = linear_objective(*pair, target, PolicyClip(), streams).loss
        results.append((loss.detach(), *gradients(loss, *pair)))
    for again in results[1:]:
        for first, value in zip(results[0], again, strict=True):
            assert torch.equal(first, value)


def test_no_wait_for_the_device():
    """The collator's index and main-gradient mode need no answer from the device."""
    hidden, weight, target = make(256, 256, 4096)
    hidden.requires_grad_()
    buffer = torch.zeros(weight.shape, device="cuda")
    weight_T, rows_R = torch.ones(256, device="cuda"), torch.arange(0, 256, 2, device="cuda")
    arguments = (hidden, weight, target, weight_T)
    span_cross_entropy(*arguments, rows_R=rows_R, main_grad_VD=buffer).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        span_cross_entropy(*arguments, rows_R=rows_R, main_grad_VD=buffer).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scale", ["group", "group-population", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_group_advantages(scale, baseline):
    made = torch.Generator().manual_seed(4)
    sizes = torch.tensor([8, 1, 5, 0, 16, 3, 8])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    rewards = torch.randint(3, (int(sizes.sum()),), generator=made).float() / 2
    rewards[3], rewards[9:14] = float("nan"), 0.5
    lengths = torch.randint(0, 700, (len(rewards),), generator=made)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    weight = (torch.rand(int(lengths.sum()), generator=made) > 0.3).float()
    results = []
    for device, path in (("cuda", "triton"), ("cpu", "plain")):
        layout = TokenLayout(starts.to(device), weight.to(device))
        results.append(
            group_advantages(
                rewards.to(device), offsets.to(device), layout, path=path, scale=scale,
                baseline=baseline, eps=1e-4,
            )
        )  # fmt: skip
    got, expected = results
    torch.testing.assert_close(got.advantage_N.cpu(), expected.advantage_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.advantage_T.cpu(), expected.advantage_T, rtol=2e-6, atol=2e-6)
    assert torch.equal(got.weight_T.cpu(), expected.weight_T)
    assert [int(c) for c in got.counts] == [int(c) for c in expected.counts]


def test_compiled_objective():
    hidden, weight, target = make(200, 256, 2048)
    streams = Streams(torch.ones(200, device="cuda"), torch.randn(200).cuda())

    def loss_of(h, w):
        return linear_objective(h, w, target, PolicyClip(), streams).loss

    found = []
    for call in (loss_of, torch.compile(loss_of)):
        pair = leaves(hidden, weight)
        loss = call(*pair)
        found.append((loss.detach(), *gradients(loss, *pair)))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-2, atol=1e-4)


def test_autotune_on_the_device(tmp_path):
    hidden, weight, target = make(512, 256, 8192)
    shape = Shape(512, 256, 8192)
    choice = autotune(shape, tmp_path / "tiles.json")
    assert all(0 < seconds < 1 for _, seconds in choice.seconds)
    assert autotune(shape, tmp_path / "tiles.json") == choice
    options = {"path": "odds", "entropy": "none"}
    exact, _ = definition.linear_logprob(hidden.double(), weight.double(), target)
    for tile, _ in choice.seconds:
        logprob, _ = linear_logprob(hidden, weight, target, tile=tile, **options)
        assert (logprob.double() - exact).abs().max() <= LOGPROB_BUDGET
