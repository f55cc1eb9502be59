"""Bounds of rounding: from the number of terms and the type, or from a peer of the same run.

The model: an operation rounds its result once, by at most u = eps / 2 of it; the roundings of a sum
are independent and of random sign, so that n of them make at most u * sqrt(n) * magnitude in the
mean square, magnitude being the largest partial sum. FACTOR standard deviations are allowed: 3e-7
of the cases lie above them, and a uniform rounding has only 1/sqrt(3) of the deviation assumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch

FACTOR = 5
PEER = 4
"""Times the largest error of a peer: each of two results may be as far from the exact one, and
another order of the same sums may round twice as much."""


def unit(dtype: torch.dtype = torch.float32) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def of_sum(terms: int, magnitude: float, dtype: torch.dtype = torch.float32) -> float:
    """For a sum of `terms` values whose partial sums stay below `magnitude`, in any order."""
    return FACTOR * math.sqrt(terms) * unit(dtype) * magnitude


def worst(terms: int, total: float, dtype: torch.dtype = torch.float32) -> float:
    """For a sum of `terms` whose absolute values add up to `total`: no order exceeds this."""
    return terms * unit(dtype) * total


@torch.no_grad()
def log_prob_errors(hf: torch.nn.Module, sequences: Iterable[Sequence[int]]) -> torch.Tensor:
    """|error| of every log-prob (next token by vocabulary) of a transformers model as it is.

    In fp32 at the least, against itself in fp64. Its norms stay in fp32 there, which adds roundings
    of the same size: these are the errors of fp32 or of the narrower type of the weights.
    """
    wide = copy.deepcopy(hf).double()
    errors = []
    for tokens in sequences:
        ids = torch.tensor([tokens])
        found, exact = (model(ids, use_cache=False).logits[0] for model in (hf, wide))
        found = found.float().log_softmax(-1)
        errors.append((found.double() - exact.log_softmax(-1)).abs().flatten())
    return torch.cat(errors)


def of_log_probs(hf: torch.nn.Module, sequences: Iterable[Sequence[int]]) -> float:
    """Between two computations of the log-probs of this model: PEER times its largest error."""
    return PEER * log_prob_errors(hf, sequences).max().item()


@torch.no_grad()
def assert_same_update(ours, theirs, before, terms: int) -> None:
    """Weights after the same update, whose gradients are sums of `terms` in two orders.

    Each weight is rounded once, and the gradient's sums as `of_sum` has it; their magnitude is the
    tensor's largest update, since the update is made proportional to the gradient (a large EPS).
    """
    for name, tensor in ours.items():
        gap = (tensor - theirs[name]).abs().double()
        update = (tensor - before[name]).abs().max().item()
        assert update > 0, name
        allowed = 2 * unit(tensor.dtype) * tensor.abs().double() + of_sum(
            terms, update, tensor.dtype
        )
        assert (gap <= allowed).all(), (name, gap.max().item(), update)
