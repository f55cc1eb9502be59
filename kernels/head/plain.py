"""The loss head of one chunk of rows in plain PyTorch: the path of CPU tensors, and of fp64.

The same algebra as `odds` (formulas there), so that a confident token keeps its relative
accuracy, and the same statistics; the gradient products follow from the kept array without a
softmax over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import IGNORE, HeadPlan

# Above this exponent a row is taken relative to its largest logit instead of its target's.
MAX_EXPONENT = 64.0


class Columns:
    """Where the targets of a chunk have their logits, and what is taken over all columns."""

    def __init__(self, target_C: Tensor) -> None:
        self.column_C1 = target_C.clamp_min(0)[:, None]

    def logits(self, u_CV: Tensor) -> Tensor:
        """Those of the targets."""
        return u_CV.gather(1, self.column_C1)[:, 0]

    def put(self, x_CV: Tensor, value_C: Tensor) -> None:
        """Write into the targets' columns."""
        x_CV.scatter_(1, self.column_C1, value_C[:, None])

    def shift(self, u_CV: Tensor, logit_C: Tensor) -> Tensor:
        """How far the largest logit lies above the target's, where that is too far; else 0."""
        # On the CPU the maximum of everything costs a tenth of the rows' own, and settles most.
        if u_CV.device.type == "cpu" and u_CV.numel() > 0:
            spread = u_CV.max() - logit_C.min()
            if spread <= MAX_EXPONENT:
                return torch.zeros_like(logit_C)
        return excess(u_CV.amax(1), logit_C)

    def sums(self, r_C: Tensor, k_C: Tensor) -> tuple[Tensor, Tensor]:
        """Those over the whole vocabulary."""
        return r_C, k_C


def chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    target_C: Tensor,
    plan: HeadPlan,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_C, entropy_C, stats_4C, kept_CV) of one chunk.

    stats_4C  target logit, shift, R, K in the compute type (fp32, or fp64 for fp64 inputs)
    kept_CV   with `keep`: E, or the exponents u where the gradient needs them; else empty
    """
    temperature, softcap, entropy = plan.temperature, plan.softcap, plan.entropy
    dtype = torch.promote_types(hidden_CD.dtype, torch.float32)
    u_CV = hidden_CD.to(dtype) @ weight_VD.to(dtype).T
    if softcap:
        u_CV.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1:
        u_CV.div_(temperature)
    columns = _columns(target_C, weight_VD, plan)
    logit_C = columns.logits(u_CV)
    shift_C = columns.shift(u_CV, logit_C)
    u_CV.sub_((logit_C + shift_C)[:, None])
    keep_exponents = keep and (softcap > 0 or entropy == "gradient")
    e_CV = u_CV.exp() if keep_exponents or entropy != "none" else u_CV.exp_()
    columns.put(e_CV, torch.zeros_like(logit_C))
    r_C = e_CV.sum(1)
    k_C = torch.zeros_like(r_C)
    if entropy != "none":
        # In place of the one that is not kept; sum() is pairwise, a BLAS dot is not.
        k_C = (e_CV.mul_(u_CV) if keep_exponents else u_CV.mul_(e_CV)).sum(1)
    r_C, k_C = columns.sums(r_C, k_C)
    stats_4C = torch.stack((logit_C, shift_C, r_C, k_C))
    logprob_C, entropy_C = finish(stats_4C, target_C != IGNORE)
    kept_CV = (u_CV if keep_exponents else e_CV) if keep else u_CV.new_empty(0)
    return logprob_C, entropy_C, stats_4C, kept_CV


def _columns(target_C: Tensor, weight_VD: Tensor, plan: HeadPlan) -> Columns:
    if plan.vocabulary is None:
        return Columns(target_C)
    from . import dealt  # which builds on this file

    return dealt.Columns(target_C, len(weight_VD), plan.vocabulary)


def excess(largest_C: Tensor, logit_C: Tensor) -> Tensor:
    """How far the largest logit of a row lies above the target's, where too far; else 0."""
    excess_C = largest_C - logit_C
    return torch.where(excess_C > MAX_EXPONENT, excess_C, 0)


def finish(stats_4C: Tensor, live_C: Tensor) -> tuple[Tensor, Tensor]:
    """(logprob_C, entropy_C) of rows from their sums."""
    _, shift_C, r_C, k_C = stats_4C.unbind(0)
    own_C = torch.exp(-shift_C)
    log_sum_C = torch.where(shift_C > 0, (r_C + own_C).log(), r_C.log1p())
    logprob_C = torch.where(live_C, -(shift_C + log_sum_C), 0)
    entropy_C = log_sum_C - (k_C - own_C * shift_C) / (r_C + own_C)
    return logprob_C, torch.where(live_C, entropy_C, 0)


def chunk_gradient(
    kept_CV: Tensor,
    stats_4C: Tensor,
    dlogprob_C: Tensor,
    dentropy_C: Tensor | None,
    target_C: Tensor,
    weight_VD: Tensor,
    plan: HeadPlan,
) -> tuple[Tensor, Tensor]:
    """(left_CV, scale_C) with d loss / d raw logits = scale_C * left_CV; overwrites `kept_CV`."""
    temperature, softcap = plan.temperature, plan.softcap
    logit_C, shift_C, r_C, k_C = stats_4C.unbind(0)
    own_C = torch.exp(-shift_C)
    sum_C = r_C + own_C
    columns = _columns(target_C, weight_VD, plan)
    if not softcap and dentropy_C is None:
        columns.put(kept_CV, -r_C)
        return kept_CV, -dlogprob_C / (sum_C * temperature)
    factor_CV = None
    if softcap:
        tanh_CV = (kept_CV + (logit_C + shift_C)[:, None]) * (temperature / softcap)
        factor_CV = 1 - tanh_CV.square()
    left_CV = kept_CV.exp()
    own_slope_C = -dlogprob_C * r_C
    if dentropy_C is None:
        left_CV.mul_(dlogprob_C[:, None])
    else:
        mean_C = (k_C - own_C * shift_C) / sum_C
        slope_CV = kept_CV.sub_(mean_C[:, None]).mul_(dentropy_C[:, None])
        left_CV.mul_(slope_CV.add_(dlogprob_C[:, None]))
        own_slope_C = own_slope_C - dentropy_C * own_C * (shift_C + mean_C)
    columns.put(left_CV, own_slope_C)
    if factor_CV is not None:
        left_CV *= factor_CV
    return left_CV, -1 / (sum_C * temperature)
