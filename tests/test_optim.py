"""Masters, schedule, clipping, skipping and exact resume."""

from __future__ import annotations

import json
import math

import bounds
import pytest
import torch
from torch import nn

from intfast.config import OptimConfig
from intfast.model import optim
from intfast.model.optim import Optimizer, learning_rate

FLAT = OptimConfig(lr=0.01, schedule="constant")


def small_model(dtype=torch.float32, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    return model.to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    inputs = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    (scale * model(inputs.to(dtype)).float().square().sum()).backward()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_schedule_values():
    config = OptimConfig(lr=2.0, floor=0.1, warmup_ratio=1 / 6)
    rates = [learning_rate(step, 24, config) for step in (0, 1, 3, 4, 14, 24, 99)]
    assert rates == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.1, 0.2, 0.2])
    linear = OptimConfig(lr=2.0, floor=0.0, schedule="linear")
    assert [learning_rate(s, 10, linear) for s in (0, 5, 10)] == [2.0, 1.0, 0.0]
    constant = OptimConfig(lr=2.0, schedule="constant", warmup_ratio=0.2)
    assert [learning_rate(s, 10, constant) for s in (0, 1, 2, 9)] == [1.0, 2.0, 2.0, 2.0]
    # a ratio rounds up: some warm-up was asked for
    assert learning_rate(0, 11, OptimConfig(lr=3.0, warmup_ratio=0.1)) == 1.5


def test_first_steps_equal_adamw_written_out(monkeypatch):
    monkeypatch.setattr(optim, "EPS", 1e-6)
    config = OptimConfig(lr=0.03, schedule="linear", floor=0.0, weight_decay=0.1, max_grad_norm=0.0)
    matrix = nn.Parameter(torch.tensor([[0.5, -2.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
    optimizer = Optimizer([("matrix", matrix), ("bias", bias)], config, total_steps=10)
    truth = {"matrix": matrix.detach().clone(), "bias": bias.detach().clone()}
    moments = {name: [torch.zeros_like(value)] * 2 for name, value in truth.items()}
    for step in range(3):
        grads = {"matrix": torch.tensor([[0.3, -0.1 * step]]), "bias": torch.tensor([2.0 - step])}
        (matrix * grads["matrix"]).sum().backward()
        (bias * grads["bias"]).sum().backward()
        stats = optimizer.step()
        lr = 0.03 * (1 - step / 10)
        assert stats.lr == pytest.approx(lr)
        for name, value in truth.items():
            grad = grads[name].double()
            first = 0.9 * moments[name][0] + 0.1 * grad
            second = 0.999 * moments[name][1] + 0.001 * grad**2
            moments[name] = [first, second]
            corrected = first / (1 - 0.9 ** (step + 1))
            root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6
            decay = 0.1 if name == "matrix" else 0.0
            truth[name] = value * (1 - lr * decay) - lr * corrected / root
    # 20 operations a step on values up to 2, and 1 - 0.999**step loses a factor of 1,000.
    atol = bounds.worst(3 * 20, 2.0 + 0.03 * 1000, torch.float64)
    torch.testing.assert_close(matrix.detach(), truth["matrix"], rtol=0, atol=atol)
    torch.testing.assert_close(bias.detach(), truth["bias"], rtol=0, atol=atol)


def test_matrices_decay_and_vectors_do_not():
    model = small_model()
    config = OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5)
    optimizer = Optimizer(model.named_parameters(), config, total_steps=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix, norm = (model[i].weight.detach().clone() for i in (0, 1))
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), matrix * 0.95)
    assert torch.equal(model[1].weight.detach(), norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_stays_and_gradients_are_freed(dtype):
    model = small_model(dtype)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    alias = model[0].weight.detach()
    before = alias.clone()
    optimizer = Optimizer(model.named_parameters(), FLAT, total_steps=5)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert not torch.equal(alias, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    tensors, _ = optimizer.state_tensors()
    masters = {name: value for name, value in tensors.items() if name.startswith("master.")}
    assert bool(masters) == (dtype != torch.float32)
    for name, parameter in model.named_parameters():
        if masters:
            assert torch.equal(masters[f"master.{name}"].to(dtype), parameter)


def test_small_steps_move_masters_long_before_bf16_weights():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    config = OptimConfig(lr=1e-4, schedule="constant")
    optimizer = Optimizer([("w", parameter)], config, total_steps=100)
    moved_at = None
    for step in range(60):
        (parameter * torch.ones_like(parameter)).sum().backward()
        optimizer.step()
        master = optimizer.state_tensors()[0]["master.w"]
        # Each step rounds near 1, and always to the same side.
        assert (master.double() - (1 - 1e-4 * (step + 1))).abs().max() < bounds.worst(step + 1, 1.0)
        if moved_at is None and parameter[0] != 1:
            moved_at = step + 1
    # bf16 has a spacing of 2**-8 below 1; rounding turns over half-way, at 19.5 steps of 1e-4
    assert moved_at == 20


def test_bf16_gradients_add_up_in_fp32():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    config = OptimConfig(lr=1.0, schedule="constant", max_grad_norm=0.0)
    optimizer = Optimizer([("w", parameter)], config, total_steps=1)
    for value in [256.0] + [1.0] * 7:  # 256 + 1 is 256 in bf16
        (parameter.float() * value).sum().backward()
    assert parameter.grad is None
    assert optimizer.step().grad_norm == 263.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_equal_one_batch(monkeypatch, dtype):
    # An update in proportion to the gradient, far above the last place of the weights.
    monkeypatch.setattr(optim, "EPS", 10.0)
    config = OptimConfig(lr=1.0, schedule="constant")
    before = dict(small_model(dtype).named_parameters())
    results = []
    for parts in (1, 4):
        model = small_model(dtype)
        optimizer = Optimizer(model.named_parameters(), config, total_steps=1)
        inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
        for part in inputs.chunk(parts):
            (model(part).float().square().sum() / 12).backward()
        stats = optimizer.step()
        results.append((stats.grad_norm, dict(model.named_parameters())))
    (one, ours), (four, theirs) = results
    assert one == pytest.approx(four, abs=bounds.of_sum(12, one, dtype))
    bounds.assert_same_update(ours, theirs, before, 12)


@pytest.mark.parametrize("numbers", [1, 1_000, 8_000_000, 40_000_000])
def test_the_norm_of_many_numbers_is_exact(numbers):
    """A CPU's fp32 sum of the squares, as torch's get_total_norm makes it, is off by 3e-3."""
    made = torch.Generator().manual_seed(0)
    # Of very different sizes, as gradients are.
    grads = [torch.randn(numbers, generator=made) * scale for scale in (1e-3, 1.0)]
    grads[1][numbers // 2 :] *= 1e-2
    squares = [float(part.double().square().sum()) for g in grads for part in g.split(1 << 20)]
    exact = math.sqrt(math.fsum(squares))
    found = optim.total_norm([grads[0].view(1, -1), grads[1]])
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(exact, rel=bounds.worst(optim.BLOCK, 1.0) / 8)
    if numbers > optim.BLOCK:
        assert found.item() == pytest.approx(exact, rel=1e-7)


def test_the_norm_of_nothing_finite_and_of_other_types():
    for bad in (math.nan, math.inf):
        found = optim.total_norm([torch.ones(300), torch.tensor([1.0, bad])])
        assert not math.isfinite(found.item())
    wide = torch.full((3, 100), 1 / 3, dtype=torch.float64)
    assert optim.total_norm([wide]).item() == pytest.approx(math.sqrt(300) / 3, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_by_the_global_norm(dtype):
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (2, 3)]
    optimizer = Optimizer([("a", parameters[0]), ("b", parameters[1])], FLAT, total_steps=2)
    (parameters[0] * 3).sum().backward()
    (parameters[1] * 4).sum().backward()
    norm = math.sqrt(2 * 9 + 3 * 16)
    assert optimizer.step().grad_norm == pytest.approx(norm)
    tensors, _ = optimizer.state_tensors()
    torch.testing.assert_close(tensors["exp_avg.a"], torch.full((2,), 0.1 * 3 / norm))
    torch.testing.assert_close(tensors["exp_avg.b"], torch.full((3,), 0.1 * 4 / norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_gradient_changes_nothing_and_is_counted(monkeypatch, dtype, poison):
    monkeypatch.setattr(optim, "MAX_SKIPPED", 3)
    model = small_model(dtype)
    optimizer = Optimizer(model.named_parameters(), FLAT, total_steps=50)
    backward(model, 0)
    optimizer.step()

    def snapshot():
        tensors, _ = optimizer.state_tensors()
        return [value.clone() for value in tensors.values()] + weights(model)

    def skip():
        backward(model, 1)
        (model[2].bias[0].float() * poison).backward()
        return optimizer.step()

    before = snapshot()
    for _ in range(2):
        stats = skip()
        assert stats.skipped and not math.isfinite(stats.grad_norm)
    for left, right in zip(before, snapshot(), strict=True):
        assert torch.equal(left, right)
    backward(model, 2)
    assert not optimizer.step().skipped  # a good step ends the row
    assert optimizer.num_skipped == 2
    skip()
    skip()
    with pytest.raises(RuntimeError, match=r"update 6: not finite for 3 updates in a row.*2.bias"):
        skip()


def test_split_masters_are_todays_masters_over_many_steps():
    """The same gradients: the same masters and moments, saved as the same tensors."""
    found = []
    for state in ("fp32", "split"):
        model = small_model(torch.bfloat16)
        config = OptimConfig(lr=3e-3, weight_decay=0.1)
        optimizer = Optimizer(model.named_parameters(), config, 400, state=state)
        drawn = torch.Generator().manual_seed(0)
        for _ in range(400):
            for parameter in model.parameters():
                grad = torch.randn(parameter.shape, generator=drawn).bfloat16()
                (parameter * grad).sum().backward()
            optimizer.step()
        tensors, _ = optimizer.state_tensors()
        found.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        if state == "split":
            held = [tensor.nbytes for tensor in optimizer._state().values()]
            assert sum(held) == 10 * sum(p.numel() for p in model.parameters())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_halves_of_fp16_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight: expected bfloat16.*float16; use model"):
        Optimizer(small_model(torch.float16).named_parameters(), FLAT, 1, state="split")


def test_whatever_state_reads_what_another_saved():
    """Masters are saved in fp32: only moments have to be as wide."""
    saved = {}
    for state in ("fp32", "split"):
        model = small_model(torch.bfloat16)
        optimizer = Optimizer(model.named_parameters(), FLAT, 9, state=state)
        if saved:
            optimizer.load_state_tensors(*saved["fp32"])
        for step in range(3):
            backward(model, step)
            optimizer.step()
        tensors, counters = optimizer.state_tensors()
        saved[state] = {k: x.detach().clone() for k, x in tensors.items()}, counters
    back = Optimizer(small_model(torch.bfloat16).named_parameters(), FLAT, 9)
    back.load_state_tensors(*saved["split"])
    made = back.state_tensors()[0]
    assert all(torch.equal(made[name], tensor) for name, tensor in saved["split"][0].items())
    assert back.num_steps == 6
    short = Optimizer(small_model(torch.bfloat16).named_parameters(), FLAT, 9, state="short")
    with pytest.raises(ValueError, match=r"first .'exp_avg"):
        short.load_state_tensors(*saved["split"])


@pytest.mark.parametrize("state", ["split", "short"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_with_less_in_memory_is_bitwise_equal(dtype, state):
    test_resume_is_bitwise_equal_to_an_uninterrupted_run(dtype, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_equal_to_an_uninterrupted_run(dtype, state="fp32"):
    config = OptimConfig(lr=0.02, warmup_ratio=0.2, weight_decay=0.1)

    def train(model, optimizer, steps):
        for step in steps:
            backward(model, step, scale=math.nan if step == 2 else 1.0)
            optimizer.step()

    whole = small_model(dtype)
    reference = Optimizer(whole.named_parameters(), config, 9, state=state)
    train(whole, reference, range(9))

    first = small_model(dtype)
    optimizer = Optimizer(first.named_parameters(), config, 9, state=state)
    train(first, optimizer, range(4))
    tensors, counters = optimizer.state_tensors()
    saved = {name: value.detach().clone() for name, value in tensors.items()}
    counters = json.loads(json.dumps(counters))

    second = small_model(dtype, seed=1)
    if dtype == torch.float32:
        second.load_state_dict(first.state_dict())
    resumed = Optimizer(second.named_parameters(), config, 9, state=state)
    resumed.load_state_tensors(saved, counters)
    train(second, resumed, range(4, 9))
    for left, right in zip(weights(whole), weights(second), strict=True):
        assert torch.equal(left, right)
    left, right = reference.state_tensors(), resumed.state_tensors()
    assert left[1] == right[1] == {"num_steps": 9, "num_skipped": 1, "skipped_in_a_row": 0}
    assert all(torch.equal(left[0][n].detach(), right[0][n].detach()) for n in left[0])


def test_foreign_state_is_refused_before_any_change():
    model = small_model(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), FLAT, total_steps=3)
    tensors, counters = optimizer.state_tensors()
    good = {name: value.clone() + 1 for name, value in tensors.items()}
    before = weights(model)
    missing = {name: value for name, value in good.items() if name != "exp_avg.0.bias"}
    reshaped = good | {"exp_avg.0.bias": torch.zeros(8)}
    for bad in (missing, reshaped, good | {"exp_avg.9.bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"1 names are .* first \['exp_avg\.\d\.bias'\]"):
            optimizer.load_state_tensors(bad, counters)
    with pytest.raises(ValueError, match="num_steps"):
        optimizer.load_state_tensors(good, {})
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_frozen_parameters_are_left_alone_and_close_removes_the_hooks():
    model = small_model(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = Optimizer(model.named_parameters(), FLAT, total_steps=2)
    backward(model, 0)
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    optimizer.close()
    backward(model, 0)
    assert model[2].weight.grad is not None


def test_wrong_use_is_refused():
    model = small_model()
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match="call backward before step"):
        Optimizer(named, FLAT, total_steps=1).step()
    with pytest.raises(ValueError, match="list tied weights once"):
        Optimizer([*named, ("tied", named[0][1])], FLAT, total_steps=1)
    with pytest.raises(ValueError, match="unfreeze the model"):
        Optimizer([], FLAT, total_steps=1)
    with pytest.raises(ValueError, match="total_steps"):
        Optimizer(named, FLAT, total_steps=0)
