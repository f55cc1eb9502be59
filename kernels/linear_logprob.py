"""Log-probs of target tokens straight from hidden states.

    logprob[t] = log_softmax(cap(hidden[t] @ weight.T) / temperature)[target[t]]

The logits live in one chunk buffer at a time. Without a gradient this costs 2TDV operations; with
one the backward makes the logits again: 8TDV in all. A loss that is known per token should use
`linear_objective` (6TDV).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from .head import chunks, ladder
from .head.plan import HeadOptions, head_of


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, target_T, rows_R, main_grad_VD, plan, need):
        ctx.set_materialize_grads(False)
        inputs = chunks.gather(hidden_TD, weight_VD, target_T, rows_R, plan)
        logprob_R, entropy_R = chunks.statistics(inputs)
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, rows_R, main_grad_VD)
        ctx.plan, ctx.need, ctx.dtype = plan, need, logprob_R.dtype
        num_rows = hidden_TD.shape[0]
        logprob_T = chunks.scatter(logprob_R, rows_R, num_rows)
        entropy_T = chunks.scatter(entropy_R, rows_R, num_rows)
        if plan.entropy != "gradient":
            ctx.mark_non_differentiable(entropy_T)
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx, dlogprob_T, dentropy_T):
        hidden_TD, weight_VD, target_T, rows_R, main_grad_VD = ctx.saved_tensors
        inputs = chunks.gather(hidden_TD, weight_VD, target_T, rows_R, ctx.plan)
        grads = chunks.Gradients(inputs, *ctx.need, main_grad_VD)
        if ctx.plan.entropy != "gradient":
            dentropy_T = None
        if dlogprob_T is None:
            dlogprob_T = hidden_TD.new_zeros(len(hidden_TD), dtype=ctx.dtype)
        if rows_R is not None:
            dlogprob_T = dlogprob_T[rows_R]
            dentropy_T = None if dentropy_T is None else dentropy_T[rows_R]
        for start, end in ctx.plan.chunks(len(inputs.hidden_RD)):
            chunk = chunks.forward(inputs, start, end, keep=True)
            dentropy_C = None if dentropy_T is None else dentropy_T[start:end]
            grads.add(chunk, start, end, dlogprob_T[start:end], dentropy_C)
        hidden_grad_RD = grads.hidden_RD
        if hidden_grad_RD is not None:
            hidden_grad_RD = chunks.scatter(hidden_grad_RD, rows_R, len(hidden_TD))
        return hidden_grad_RD, grads.returned_weight(), None, None, None, None, None


def linear_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, **options: Unpack[HeadOptions]
) -> tuple[Tensor, Tensor]:
    """(logprob_T, entropy_T) of the targets, without storing the (T, V) logits.

    hidden_TD   (T, D) bf16, fp16, fp32 or fp64; differentiable
    weight_VD   (V, D) same dtype; differentiable, may be frozen
    target_T    (T,)   int64 in [0, V); IGNORE gives 0.0 and no gradient
    options     `head.plan.HeadOptions`. With rows_R the other rows give 0.0 and no gradient; with
                entropy="none" entropy_T is undefined
    returns     (T,)   twice, fp32 (fp64 for fp64 inputs), natural log; logprob <= 0
    raises      ValueError on a shape, dtype, device or option that does not fit, and for CPU
                tensors on a target outside [0, V); CUDA rows with such a target are NaN
    accuracy    tests/test_kernels_linear_logprob.py
    """
    settings = head_of(options)
    plan, *need = ladder.plan_call(hidden_TD, weight_VD, target_T, settings)
    if not any(need):
        inputs = chunks.gather(hidden_TD, weight_VD, target_T, settings.rows_R, plan)
        logprob_R, entropy_R = chunks.statistics(inputs)
        found = (logprob_R, entropy_R)
        return tuple(chunks.scatter(x, settings.rows_R, len(hidden_TD)) for x in found)
    return _LinearLogprob.apply(
        hidden_TD, weight_VD, target_T, settings.rows_R, settings.main_grad_VD, plan, tuple(need)
    )
