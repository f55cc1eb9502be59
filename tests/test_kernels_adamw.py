"""AdamW's step and the sums of gradients: against fp64, against torch's step, and refusals."""

import math

import bounds
import pytest
import torch
from kernels_common import DEVICE, HAS_TRITON, INTERPRETED

from intfast.kernels import truth
from intfast.kernels.adamw import adamw

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
