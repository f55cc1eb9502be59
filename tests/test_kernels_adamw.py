"""AdamW's step and the sums of gradients: against fp64, against torch's step, and refusals."""

import math

import bounds
import pytest
import torch
from kernels_common import DEVICE, HAS_TRITON, INTERPRETED

from intfast.kernels import truth
from intfast.kernels.adamw import _chance, adamw, joined, split

PATHS = ["plain", *(["triton"] if HAS_TRITON else [])]
SHAPES = [(7, 5), (64,), (3, 64), (1,), (0, 4), (1000,)]
RULE = {"betas": (0.9, 0.999), "eps": 1e-8}


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    """The interpreter rounds bf16 as a device does."""
    if HAS_TRITON and INTERPRETED:
        import kernels_bf16

        kernels_bf16.repair(monkeypatch)
        assert kernels_bf16.interpreter_rounds(torch.bfloat16)


def state(dtype=torch.float32, narrow=torch.bfloat16):
    """(masters, grads, means, squares, narrow) of some shapes; every other one has no narrow."""
    made = torch.Generator().manual_seed(0)
    columns = [[], [], [], [], []]
    for index, shape in enumerate(SHAPES):
        values = [torch.randn(shape, generator=made, dtype=dtype).to(DEVICE) for _ in range(4)]
        values[1] *= 10.0 ** (index - 3)
        values[3] = (values[1] * values[3]).square()
        small = values[0].to(narrow) if index % 2 == 0 else None
        for column, value in zip(columns, [*values, small], strict=True):
            column.append(value)
    return columns


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step", [1, 2, 3000])
@pytest.mark.parametrize("grad_scale,weight_decay", [(1.0, 0.0), (0.037, 0.1)])
def test_a_step_is_adamw(path, step, grad_scale, weight_decay):
    settings = {**RULE, "lr": 0.03, "weight_decay": weight_decay}
    masters, grads, means, squares, narrow = state()
    before = [[x.double() for x in column] for column in (masters, grads, means, squares)]
    adamw(
        masters, grads, means, squares, narrow,
        step=step, grad_scale=grad_scale, path=path, **settings,
    )  # fmt: skip
    for old, *found, small in zip(
        zip(*before, strict=True), masters, means, squares, narrow, strict=True
    ):
        want = truth.adamw(*old, step=step, grad_scale=grad_scale, **settings)
        moved = 1.5 * (want[0] - old[0]).abs() + old[0].abs()
        # A dozen roundings at most, each of something no larger than these.
        sizes = (moved, old[2].abs() + (grad_scale * old[1]).abs(), want[2])
        for got, exact, size in zip(found, want, sizes, strict=True):
            assert ((got.double() - exact).abs() <= bounds.worst(14, 1.0) * size).all()
        if small is not None:
            assert torch.equal(small, found[0].to(small.dtype))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_plain_path_is_torchs_own_step_to_the_bit(narrow):
    masters, grads, means, squares, small = state(narrow=narrow)
    parameters = [torch.nn.Parameter(master.clone()) for master in masters]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, fused=True, **RULE)
    for parameter, mean, square in zip(parameters, means, squares, strict=True):
        optimizer.state[parameter] = {
            "step": torch.tensor(4.0, device=DEVICE),
            "exp_avg": mean.clone(),
            "exp_avg_sq": square.clone(),
        }
    for step in (5, 6):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = 0.3 * grad
        optimizer.step()
        adamw(
            masters, [grad.clone() for grad in grads], means, squares, small,
            step=step, lr=0.02, weight_decay=0.1, grad_scale=0.3, path="plain", **RULE,
        )  # fmt: skip
    for master, mean, square, parameter in zip(masters, means, squares, parameters, strict=True):
        assert torch.equal(master, parameter.detach())
        assert torch.equal(mean, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(square, optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_triton_step_is_torchs_to_two_last_places():
    """Which operations are fused is each compiler's own, so the last bit is not."""
    both = []
    for path in PATHS:
        columns = state()
        for step in range(1, 21):
            grads = [grad.clone() for grad in columns[1]]
            adamw(
                columns[0], grads, *columns[2:],
                step=step, lr=1e-3, weight_decay=0.01, path=path, **RULE,
            )  # fmt: skip
        both.append(columns[0])
    for plain, triton in zip(*both, strict=True):
        # 20 steps of at most 3 lr each, after a first one of any size.
        size = plain.abs() + 1.0
        assert ((plain - triton).abs() <= 2 * bounds.unit() * 20**0.5 * size).all()


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_so(path):
    masters, grads, means, squares, narrow = state()
    grads[0][0, 0], grads[1][3] = math.nan, math.inf
    adamw(
        masters, grads, means, squares, narrow,
        step=1, lr=0.1, weight_decay=0.0, path=path, **RULE,
    )  # fmt: skip
    assert masters[0][0, 0].isnan() and narrow[0][0, 0].isnan()
    assert masters[0].isnan().sum() == 1 and not masters[1][3].isfinite()


@pytest.mark.parametrize("path", PATHS)
def test_no_tensors_are_no_step(path):
    adamw([], [], [], [], [], step=1, lr=0.1, weight_decay=0.0, grad_scale=0.5, path=path, **RULE)


def test_bad_arguments_are_refused():
    masters, grads, means, squares, narrow = state()
    settings = {"step": 1, "lr": 0.1, "weight_decay": 0.0, **RULE}
    with pytest.raises(ValueError, match="grads: expected 6"):
        adamw(masters, grads[1:], means, squares, narrow, **settings)
    with pytest.raises(ValueError, match=r"means: expected \(7, 5\)"):
        adamw(masters, grads, means[1:] + means[:1], squares, narrow, **settings)
    with pytest.raises(ValueError, match="squares"):
        adamw(masters, grads, means, [s.double() for s in squares], narrow, **settings)
    with pytest.raises(ValueError, match="step: expected"):
        adamw(masters, grads, means, squares, narrow, **{**settings, "step": 0})
    with pytest.raises(ValueError, match="path: expected one of"):
        adamw(masters, grads, means, squares, narrow, path="odds", **settings)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_kernel_refuses_fp64_and_strides():
    settings = {"step": 1, "lr": 0.1, "weight_decay": 0.0, "path": "triton", **RULE}
    with pytest.raises(ValueError, match="path='plain'"):
        adamw(*state(torch.float64), **settings)
    columns = state()
    columns[0][0] = columns[0][0].T.contiguous().T
    with pytest.raises(ValueError, match="strided"):
        adamw(*columns, **settings)


# --- less in memory ----------------------------------------------------------------------------


def as_split(masters):
    """(low, narrow) of fp32 masters."""
    narrow = [torch.empty_like(master, dtype=torch.bfloat16) for master in masters]
    low = [torch.empty_like(master, dtype=torch.int16) for master in masters]
    for made in zip(masters, narrow, low, strict=True):
        split(*made)
    return low, narrow


def halfway(tensor):
    """Where fp32 numbers lie half way between two bf16."""
    return (tensor.view(torch.int32) & 0xFFFF) == 0x8000


def test_a_split_master_is_the_fp32_number_and_its_weight_the_nearest():
    bits = torch.arange(-(1 << 31), 1 << 31, 99_991)
    ends = [0x8000, 0x18000, 0x7FFF, 0x3F808000, 0x3F818000, 0x3F7FFFFF, 0x7F7F7FFF, 1, -1]
    bits = torch.cat([bits, torch.tensor(ends), torch.tensor(ends) | -(1 << 31)])
    master = bits.int().view(torch.float32)
    master = master[master.abs() < 3e38]  # as masters are
    (low,), (narrow,) = as_split([master])
    assert torch.equal(joined(narrow, low).view(torch.int32), master.view(torch.int32))
    is_half = halfway(master)
    assert is_half.sum() > 4 and torch.equal(narrow[~is_half], master[~is_half].bfloat16())
    # Half way torch takes the even one, which 16 bits more could not tell apart from both sides.
    assert (narrow[is_half].float().abs() > master[is_half].abs()).all()


@pytest.mark.parametrize("path", PATHS)
def test_split_masters_step_as_fp32_ones_to_the_bit(path):
    masters, _, means, squares, _ = state()
    low, narrow = as_split(masters)
    ours = [*map(torch.clone, means)], [*map(torch.clone, squares)]
    weights = [master.bfloat16() for master in masters]
    drawn, halves = torch.Generator().manual_seed(1), 0
    for step in range(1, 4 if path == "triton" else 300):
        grads = [torch.randn(m.shape, generator=drawn).to(DEVICE) for m in masters]
        how = {"step": step, "lr": 0.003, "weight_decay": 0.1, "grad_scale": 0.4, "path": path}
        adamw(masters, [g.clone() for g in grads], means, squares, weights, **how, **RULE)
        adamw(low, grads, *ours, narrow, **how, **RULE)
        for master, mine, small, weight in zip(masters, low, narrow, weights, strict=True):
            assert torch.equal(joined(small, mine), master)
            differ = small != weight
            halves += int(differ.sum())
            assert halfway(master)[differ].all()
    assert all(map(torch.equal, [*means, *squares], [*ours[0], *ours[1]]))
    # One in 131,072; most weights were never half way.
    assert halves <= 20


@pytest.mark.parametrize("path", PATHS)
def test_short_moments_round_means_to_nearest_and_squares_by_chance(path):
    masters, grads, means, squares, narrow = state()
    low, small = as_split(masters)
    short = [[x.bfloat16() for x in column] for column in (means, squares)]
    wide = [[x.float() for x in column] for column in short]
    how = {"step": 7, "lr": 0.003, "weight_decay": 0.1, "path": path}
    adamw(masters, [g.clone() for g in grads], *wide, narrow, **how, **RULE)
    adamw(low, grads, *short, small, part=3, **how, **RULE)
    # The step itself is of wide numbers.
    assert all(torch.equal(joined(n, x), m) for n, x, m in zip(small, low, masters, strict=True))
    for mean, square, exact, exact_square in zip(*short, *wide, strict=True):
        assert torch.equal(mean, exact.bfloat16())
        down = (exact_square.view(torch.int32) >> 16).short().view(torch.bfloat16)
        up = square.view(torch.int16) - down.view(torch.int16)
        assert ((up == 0) | (up == 1)).all()
        bits = exact_square.view(torch.int32) & 0xFFFF
        chance = _chance(square.shape, 7, 3 * square.numel(), square.device)
        assert torch.equal(up.bool(), bits + chance >= 1 << 16)


def test_chance_is_even_and_follows_from_step_and_place():
    whole = _chance(torch.Size([1 << 16]), 5, 0, torch.device("cpu"))
    assert int(whole.min()) >= 0 and int(whole.max()) < 1 << 16
    # The mean of 65,536 even numbers, within four of its standard deviations.
    assert abs(float(whole.double().mean()) / 65_536 - 0.5) < 4 * (1 / 12 / 65_536) ** 0.5
    part = _chance(torch.Size([1 << 15]), 5, 1 << 15, torch.device("cpu"))
    assert torch.equal(part, whole[1 << 15 :])
    other = _chance(torch.Size([1 << 16]), 6, 0, torch.device("cpu"))
    together = torch.corrcoef(torch.stack([whole, other]).double())[0, 1]
    assert abs(float(together)) < 4 / 256


def test_short_squares_follow_and_nearest_ones_would_not():
    """A step changes squares by a 1,000th; the last place of bf16 is a 128th to a 256th."""
    size = 1 << 14
    masters, grads = [torch.zeros(size)], [torch.full((size,), 0.1)]
    means, squares = ([torch.full((size,), x, dtype=torch.bfloat16)] for x in (0.1, 1.0))
    stuck = torch.ones(size, dtype=torch.bfloat16)
    for step in range(1, 501):
        adamw(
            masters, grads, means, squares, [None],
            step=step, lr=0.0, weight_decay=0.0, path="plain", **RULE,
        )  # fmt: skip
        stuck = (0.999 * stuck.float() + 0.001 * 0.01).bfloat16()
    exact = 0.999**500 + (1 - 0.999**500) * 0.01
    assert (stuck == 1).all()
    assert float(squares[0].double().mean()) == pytest.approx(exact, rel=0.01)


def test_bad_short_state_is_refused():
    masters, grads, means, squares, _ = state()
    low, narrow = as_split(masters)
    settings = {"step": 1, "lr": 0.1, "weight_decay": 0.0, **RULE}
    with pytest.raises(ValueError, match="narrow: expected the bf16 weight of a split master"):
        adamw(low, grads, means, squares, [None] * 6, **settings)
    with pytest.raises(ValueError, match=r"narrow: expected .* torch.bfloat16"):
        adamw(low, grads, means, squares, [n.half() for n in narrow], **settings)
    with pytest.raises(ValueError, match=r"squares: expected .* torch.bfloat16"):
        adamw(masters, grads, [m.bfloat16() for m in means], squares, narrow, **settings)
    with pytest.raises(ValueError, match=r"grads: expected .* torch.float32"):
        adamw(low, [g.bfloat16() for g in grads], means, squares, narrow, **settings)
