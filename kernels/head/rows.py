"""The loss head of one chunk of rows from fp32 logits: the portable Triton path.

The logits come from the vendor's matrix product; one kernel reduces a row to the statistics of
`odds` (formulas there) in a single read, a second one turns the row into its gradient. Two
reads and one write of the logits more than the odds path, but any type, any alignment, and a
gradient through the entropy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import HeadPlan, product
from .rowmath import IGNORED, MAX_EXPONENT, cap, cap_slope, finish


@triton.jit
def _row_statistics(
    z_ptr,
    target_ptr,
    stats_ptr,
    logprob_ptr,
    entropy_ptr,
    num_rows,
    V,
    stride_zc,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DEALT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = target != IGNORED
    if DEALT:
        # The target may be elsewhere; its logit came from there.
        logit = tl.load(stats_ptr + row)
    else:
        known = (target >= 0) & (target < V)
        own_raw = tl.load(z_ptr + row * stride_zc + target, mask=known, other=0.0)
        logit = cap(own_raw, scale, softcap, SOFTCAP)
        # An impossible target must show as NaN.
        logit = tl.where(known | (target == IGNORED), logit, float("nan"))
    shift = 0.0
    r = 0.0
    k = 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        raw = tl.load(z_ptr + row * stride_zc + cols, mask=cols < V, other=float("-inf"))
        valid = (cols < V) & (cols != target)
        u = cap(raw, scale, softcap, SOFTCAP) - logit
        top = tl.max(tl.where(valid, u, float("-inf")), 0)
        # Stay relative to the target until an exponent leaves the range, then follow the maximum.
        raised = tl.where(top > MAX_EXPONENT, tl.maximum(shift, top), shift)
        drop = raised - shift
        k = (k - drop * r) * tl.exp(-drop)
        r = r * tl.exp(-drop)
        shift = raised
        u = tl.where(valid, u - shift, 0.0)
        e = tl.where(valid, tl.exp(u), 0.0)
        r += tl.sum(e, 0)
        k += tl.sum(e * u, 0)
    tl.store(stats_ptr + row, logit)
    tl.store(stats_ptr + num_rows + row, shift)
    tl.store(stats_ptr + 2 * num_rows + row, r)
    tl.store(stats_ptr + 3 * num_rows + row, k)
    logprob, entropy = finish(shift, r, k, live)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def _row_gradient(
    z_ptr,
    out_ptr,
    target_ptr,
    stats_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    num_rows,
    V,
    stride_zc,
    stride_oc,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logit = tl.load(stats_ptr + row)
    shift = tl.load(stats_ptr + num_rows + row)
    r = tl.load(stats_ptr + 2 * num_rows + row)
    dlogprob = tl.load(dlogprob_ptr + row)
    own = tl.exp(-shift)
    total = r + own
    own_slope = dlogprob * r
    if ENTROPY:
        k = tl.load(stats_ptr + 3 * num_rows + row)
        dentropy = tl.load(dentropy_ptr + row)
        mean = (k - shift * own) / total
        own_slope += dentropy * own * (shift + mean)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < V
        raw = tl.load(z_ptr + row * stride_zc + cols, mask=mask, other=0.0)
        z = cap(raw, scale, softcap, SOFTCAP)
        u = z - logit - shift
        slope = -dlogprob
        if ENTROPY:
            slope = slope - dentropy * (u - mean)
        grad = tl.where(cols == target, own_slope, slope * tl.exp(u)) / total
        grad = grad * cap_slope(z, scale, softcap, SOFTCAP) * scale
        tl.store(out_ptr + row * stride_oc + cols, grad.to(out_ptr.dtype.element_ty), mask=mask)


def chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, plan: HeadPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_C, entropy_C, stats_4C, kept_CV); stats as in `odds`, kept are raw logits."""
    logit_CV = product(hidden_CD, weight_VD.T)
    made = statistics(logit_CV, target_C, plan)
    return *made, logit_CV if keep else logit_CV.new_empty(0)


def statistics(
    logit_CV: Tensor, target_C: Tensor, plan: HeadPlan, own_logit_C: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_C, entropy_C, stats_4C) of raw logits; own_logit_C: of the targets, where dealt."""
    num_rows, vocabulary = logit_CV.shape
    fp32 = {"dtype": torch.float32, "device": logit_CV.device}
    logprob_C, entropy_C = torch.empty(num_rows, **fp32), torch.empty(num_rows, **fp32)
    stats_4C = torch.empty(4, num_rows, **fp32)
    if own_logit_C is not None:
        stats_4C[0] = own_logit_C
    _row_statistics[(num_rows,)](
        logit_CV, target_C, stats_4C, logprob_C, entropy_C, num_rows, vocabulary,
        logit_CV.stride(0), 1 / plan.temperature, plan.softcap,
        SOFTCAP=plan.softcap > 0, DEALT=own_logit_C is not None, **_block(logit_CV),
    )  # fmt: skip
    return logprob_C, entropy_C, stats_4C


def chunk_gradient(
    kept_CV: Tensor,
    stats_4C: Tensor,
    dlogprob_C: Tensor,
    dentropy_C: Tensor | None,
    target_C: Tensor,
    plan: HeadPlan,
    dtype: torch.dtype,
) -> Tensor:
    """d loss / d raw logits (C, V) in `dtype`; fp32 overwrites the logits."""
    out_CV = kept_CV if dtype == kept_CV.dtype else torch.empty_like(kept_CV, dtype=dtype)
    _row_gradient[(kept_CV.shape[0],)](
        kept_CV, out_CV, target_C, stats_4C, dlogprob_C,
        dlogprob_C if dentropy_C is None else dentropy_C, *kept_CV.shape,
        kept_CV.stride(0), out_CV.stride(0), 1 / plan.temperature, plan.softcap,
        ENTROPY=dentropy_C is not None, SOFTCAP=plan.softcap > 0, **_block(kept_CV),
    )  # fmt: skip
    return out_CV


def _block(logit_CV: Tensor) -> dict[str, int]:
    """Columns per step and warps; small on the CPU, where the interpreter wants several steps."""
    if not logit_CV.is_cuda:
        return {"BLOCK_V": 32, "num_warps": 4}
    return {"BLOCK_V": 4096, "num_warps": 8}
