"""Log-probs of target tokens from hidden states, without more logits than a byte budget.

    logprob[i] = log_softmax(hidden[i] @ weight.T / temperature)[target[i]]
    entropy[i] = -sum_j p[i, j] log p[i, j]

While the fp32 logits of all rows fit into the budget they are kept, and the gradient costs two
matrix products (6NHV in all). Above it they are made chunk by chunk and again in the backward pass
(8NHV).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGITS_BYTES = 512 * 2**20


def head_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    temperature: float = 1.0,
    need_entropy: bool = False,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """(logprob_N, entropy_N), natural log, fp32 (fp64 for fp64 input).

    hidden_ND     (N, D) floating point; differentiable
    weight_VD     (V, D) same dtype and device; differentiable, may be frozen
    target_N      (N,)   int64 in [0, V)
    logits_bytes  of the largest (rows, V) buffer; at least one row is made at a time
    raises        ValueError on a shape or dtype mismatch, or a temperature <= 0
    """
    shapes = (hidden_ND.ndim, weight_VD.ndim) == (2, 2)
    shapes = shapes and hidden_ND.shape[1] == weight_VD.shape[1]
    if not shapes or target_N.shape != hidden_ND.shape[:1] or hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            "head: expected hidden (N, D), weight (V, D) of one dtype and target (N,), got "
            f"{tuple(hidden_ND.shape)} {hidden_ND.dtype}, {tuple(weight_VD.shape)} "
            f"{weight_VD.dtype}, {tuple(target_N.shape)}; cast or compact them alike"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature: expected a number > 0, got {temperature}; "
            "greedy samples have no log-probs, sample with a temperature to train on them"
        )
    row_bytes = weight_VD.shape[0] * (8 if hidden_ND.dtype == torch.float64 else 4)
    chunk = min(max(1, logits_bytes // row_bytes), max(1, len(hidden_ND)))
    return _HeadLogprob.apply(hidden_ND, weight_VD, target_N, temperature, need_entropy, chunk)


class _HeadLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, need_entropy, chunk):
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprob_N = hidden_ND.new_empty(len(hidden_ND), dtype=dtype)
        entropy_N = torch.empty_like(logprob_N) if need_entropy else None
        logprob_CV = None
        for rows in _chunks(len(hidden_ND), chunk):
            logprob_CV = _logprob(hidden_ND[rows], weight_VD, temperature)
            logprob_N[rows] = logprob_CV.gather(1, target_N[rows, None])[:, 0]
            if need_entropy:
                entropy_N[rows] = -_expectation(logprob_CV)
        kept = logprob_CV if chunk >= len(hidden_ND) else None
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, entropy_N, kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logprob_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, entropy_N, kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        for rows in _chunks(len(hidden_ND), ctx.chunk):
            logprob_CV = kept
            if logprob_CV is None:
                logprob_CV = _logprob(hidden_ND[rows], weight_VD, ctx.temperature)
            parts = (
                x if x is None else x[rows] for x in (grad_logprob_N, grad_entropy_N, entropy_N)
            )
            grad_CV = _grad_logits(logprob_CV, target_N[rows], *parts)
            grad_CV = grad_CV.div_(ctx.temperature).to(hidden_ND.dtype)
            if need_hidden:
                grad_hidden_ND[rows] = grad_CV @ weight_VD
            if need_weight:
                grad_weight_VD += _product(grad_CV.T, hidden_ND[rows])
        if need_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None, None


def _grad_logits(
    logprob_CV: Tensor,
    target_C: Tensor,
    grad_logprob_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    entropy_C: Tensor | None,
) -> Tensor:
    """d logprob[t] / d z_j = [j = t] - p_j, and d entropy / d z_j = -p_j (log p_j + entropy)."""
    grad_CV = logprob_CV.exp()
    slope_C = torch.zeros_like(logprob_CV[:, 0]) if grad_logprob_C is None else grad_logprob_C
    if grad_entropy_C is None:
        grad_CV.mul_(-slope_C[:, None])
    else:
        factor_CV = (logprob_CV + entropy_C[:, None]) * grad_entropy_C[:, None]
        grad_CV.mul_(factor_CV.add_(slope_C[:, None]).neg_())
    return grad_CV.scatter_add_(1, target_C[:, None], slope_C[:, None])


def _chunks(num_rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, num_rows, chunk)]


def _logprob(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logit_CV = _product(hidden_CD, weight_VD.T)
    return (logit_CV / temperature if temperature != 1 else logit_CV).log_softmax(1)


def _expectation(logprob_CV: Tensor) -> Tensor:
    return (logprob_CV.exp() * logprob_CV).sum(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with an unrounded fp32 result: bf16 logits would cost 1e-2 nat."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
