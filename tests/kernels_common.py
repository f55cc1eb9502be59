"""Shared by the kernel tests: which implementations run here, inputs that bite, error budgets."""

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
# In fp32, and in the narrow types after the check of kernels_bf16.
PATHS = ["plain", *(["odds", "rows"] if HAS_TRITON and INTERPRETED else ["rows"])]
PATHS = PATHS if HAS_TRITON else ["plain"]
LOGPROB_BUDGET = 1e-5


def inputs(T: int, D: int, V: int, scale: float = 1.0, dtype=torch.float32):
    """(hidden_TD, weight_VD, target_T), of order one, targets correlated with the hidden states."""
    made = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(V, D, generator=made)
    target_T = torch.randint(0, V, (T,), generator=made)
    hidden_TD = torch.randn(T, D, generator=made) * scale / D**0.5
    hidden_TD += 2 * scale * weight_VD[target_T] / D * torch.rand(T, 1, generator=made)
    return hidden_TD.to(DEVICE, dtype), weight_VD.to(DEVICE, dtype), target_T.to(DEVICE)


def logprob_budget(truth_T):
    """1e-5 nat, or one unit in the last place of an fp32 result where that is more: from 128 on."""
    ulp_T = torch.exp2(truth_T.abs().clamp(min=1e-30).log2().floor() - 23)
    return ulp_T.clamp(min=LOGPROB_BUDGET)


def assert_twice(got, eager, truth) -> None:
    """Error of `got` at most twice that of eager PyTorch, over all elements and in each row."""
    error, allowed = (got.double() - truth).abs(), 2 * (eager.double() - truth).abs()
    assert torch.isfinite(got).all()
    if error.numel():
        assert error.max() <= allowed.max(), (error.max(), allowed.max())
        excess = error.norm(dim=1) - allowed.norm(dim=1)
        assert excess.max() <= 0, (excess.max(), excess.argmax())


def assert_within(got, eager, truth, floor: float) -> None:
    """`assert_twice` for fp32 inputs, where both errors are roundings of the last place.

    There a row may cost eager nothing by luck, as where a single product is exact, so twice its
    error is no bound; the floor is a few units in the last place of the largest element.
    """
    error, allowed = (got.double() - truth).abs(), 2 * (eager.double() - truth).abs()
    floor = floor * max(1.0, float(truth.abs().max()))
    assert torch.isfinite(got).all()
    assert error.max() <= allowed.max() + floor, (error.max(), allowed.max())
    rows = error.norm(dim=1)
    row_floor = floor * error.shape[1] ** 0.5 + 1e-6 * truth.norm(dim=1)
    excess = rows - allowed.norm(dim=1) - row_floor
    assert excess.max() <= allowed.norm(dim=1).mean(), excess.max()
