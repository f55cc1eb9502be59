"""The plain truth of every op: whole arrays, autograd, any floating type up to fp64.

Nothing here is fast or small. Tests compare the ops with these functions in fp64; a reader finds
in them what each op means.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .head.plan import IGNORE


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob_T, entropy_T) by log_softmax of the whole (T, V) logits; differentiable.

    bf16 and fp16 inputs are upcast to fp32 first. Rows with target IGNORE give 0 and no gradient.
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    live_T = target_T != IGNORE
    # Zeros instead of the rows themselves: a NaN in an ignored row must reach nothing.
    hidden_TD = torch.where(live_T[:, None], hidden_TD, 0)
    logit_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T
    if softcap is not None:
        logit_TV = softcap * torch.tanh(logit_TV / softcap)
    logprob_TV = torch.log_softmax(logit_TV / temperature, dim=1)
    logprob_T = logprob_TV.gather(1, target_T.clamp_min(0)[:, None])[:, 0]
    entropy_T = -(logprob_TV.exp() * logprob_TV).sum(1)
    return torch.where(live_T, logprob_T, 0), torch.where(live_T, entropy_T, 0)


def linear_objective(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`loss(logprob_T, entropy_T)`, a scalar whose derivatives autograd finds by itself."""
    return loss(
        *linear_logprob(hidden_TD, weight_VD, target_T, temperature=temperature, softcap=softcap)
    )


def span_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum over tokens of weight times minus log-prob; tokens of weight 0 have no effect."""
    target_T = torch.where(weight_T == 0, IGNORE, target_T)
    logprob_T, _ = linear_logprob(
        hidden_TD, weight_VD, target_T, temperature=temperature, softcap=softcap
    )
    return -(weight_T.to(logprob_T.dtype) * logprob_T).sum()


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(stream, normed): the sum, and it over the root of its mean square, times the weight."""
    stream_TD = x_TD if delta_TD is None else x_TD + delta_TD
    square_T1 = stream_TD.square().mean(1, keepdim=True)
    return stream_TD, stream_TD / (square_T1 + eps).sqrt() * weight_D


def norm_rope(
    qkv_TNK: Tensor,
    num_kv: int,
    cos_T1K: Tensor,
    sin_T1K: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value): heads of one kind, normalised where there are norms, then turned."""
    query, key, value = qkv_TNK.split((qkv_TNK.shape[1] - 2 * num_kv, num_kv, num_kv), 1)
    turned = []
    for head, weight_K in zip((query, key), norms[:2] if norms else (None, None), strict=True):
        if weight_K is not None:
            head = head / (head.square().mean(2, keepdim=True) + norms[2]).sqrt() * weight_K
        low, high = head.chunk(2, 2)
        turned.append(head * cos_T1K + torch.cat((-high, low), 2) * sin_T1K)
    return *turned, value


def swiglu(gate_up_TE: Tensor) -> Tensor:
    """The first half, times its sigmoid, times the second half."""
    gate_TI, up_TI = gate_up_TE.chunk(2, 1)
    return gate_TI * torch.sigmoid(gate_TI) * up_TI


def group_advantages(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each sample within its group, one group after the other."""
    advantage_N = torch.zeros_like(rewards_N)
    scored = ~rewards_N.isnan()
    batch_std = rewards_N[scored].std() if scored.sum() > 1 else None
    bounds = offsets_P1.tolist()
    for start, end in itertools.pairwise(bounds):
        live = scored[start:end]
        reward = rewards_N[start:end][live]
        if len(reward) < 2 or reward.max() == reward.min():
            continue
        centred = reward - reward.mean()
        if baseline == "leave-one-out":
            centred = centred * len(reward) / (len(reward) - 1)
        divisor = {
            "group": lambda r: r.std() + eps,
            "group-population": lambda r: r.std(correction=0) + eps,
            "batch": lambda r: batch_std + eps,
            "none": lambda r: 1.0,
        }[scale](reward)
        advantage_N[start:end][live] = centred / divisor
    return advantage_N


def adamw(
    master: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(master, mean, square) after step 1, 2, ... of AdamW."""
    grad = grad_scale * grad
    mean = betas[0] * mean + (1 - betas[0]) * grad
    square = betas[1] * square + (1 - betas[1]) * grad.square()
    corrected, root = mean / (1 - betas[0] ** step), (square / (1 - betas[1] ** step)).sqrt()
    return (1 - lr * weight_decay) * master - lr * corrected / (root + eps), mean, square


def add_gradient(grad: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(total + grad, its squared norm)."""
    total = total + grad
    return total, total.square().sum()
