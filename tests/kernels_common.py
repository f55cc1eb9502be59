"""Shared by the kernel tests: which implementations run here, inputs that bite, error budgets."""

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
# The Triton code runs in fp32 here: the interpreter's bf16 is not to be trusted.
FORMS = ["reference", *(["odds", "rows"] if HAS_TRITON and INTERPRETED else ["rows"])]
FORMS = FORMS if HAS_TRITON else ["reference"]
LOGPROB_BUDGET = 1e-5


def options(form: str) -> dict:
    """Head options that force one implementation."""
    if form == "reference":
        return {"impl": "reference"}
    return {"impl": "triton", "form": form}


def inputs(T: int, D: int, V: int, scale: float = 1.0, dtype=torch.float32):
    """(hidden_TD, weight_VD, target_T), of order one, targets correlated with the hidden states."""
    made = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(V, D, generator=made)
    target_T = torch.randint(0, V, (T,), generator=made)
    hidden_TD = torch.randn(T, D, generator=made) * scale / D**0.5
    hidden_TD += 2 * scale * weight_VD[target_T] / D * torch.rand(T, 1, generator=made)
    return hidden_TD.to(DEVICE, dtype), weight_VD.to(DEVICE, dtype), target_T.to(DEVICE)


def assert_within(got, eager, truth, floor: float) -> None:
    """Error of `got` at most twice that of eager PyTorch in fp32, element-wise and per row."""
    error, allowed = (got.double() - truth).abs(), 2 * (eager.double() - truth).abs()
    floor = floor * max(1.0, float(truth.abs().max()))
    assert torch.isfinite(got).all()
    assert error.max() <= allowed.max() + floor, (error.max(), allowed.max())
    rows = error.norm(dim=1)
    row_floor = floor * error.shape[1] ** 0.5 + 1e-6 * truth.norm(dim=1)
    excess = rows - allowed.norm(dim=1) - row_floor
    assert excess.max() <= allowed.norm(dim=1).mean(), excess.max()
