"""The Triton kernel of `group_advantages`: one program per group, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCALES = {"none": 0, "std": 1, "population": 2, "batch": 3}


@triton.jit
def _moments(reward_ptr, start, end, BLOCK: tl.constexpr):
    """(count, mean, sum of squared deviations, min, max) of the scored rewards of a range."""
    # 0-dim tensors, so that an empty group has them too
    count = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    low = tl.full((), float("inf"), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    for at in range(start, end, BLOCK):
        samples = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        scored = reward == reward
        count += tl.sum(scored.to(tl.float32), 0)
        total += tl.sum(tl.where(scored, reward, 0.0), 0)
        low = tl.minimum(low, tl.min(tl.where(scored, reward, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(scored, reward, float("-inf")), 0))
    mean = total / tl.maximum(count, 1.0)
    # A second pass: the sum of squares less the squared mean would cancel.
    squares = tl.full((), 0.0, tl.float32)
    for at in range(start, end, BLOCK):
        samples = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        centred = tl.where(reward == reward, reward - mean, 0.0)
        squares += tl.sum(centred * centred, 0)
    return count, mean, squares, low, high


@triton.jit
def _group_advantages(
    reward_ptr,
    offset_ptr,
    token_offset_ptr,
    token_weight_ptr,
    advantage_ptr,
    token_advantage_ptr,
    weight_ptr,
    count_ptr,
    N,
    T,
    eps,
    right_above,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    group = tl.program_id(0)
    # Bounded by N and T: the host cannot check offsets on a device without waiting for it.
    start = tl.maximum(tl.load(offset_ptr + group), 0)
    end = tl.minimum(tl.load(offset_ptr + group + 1), N)
    count, mean, squares, low, high = _moments(reward_ptr, start, end, BLOCK_N)
    divisor = 1.0
    if SCALE == 1:
        divisor = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)) + eps
    elif SCALE == 2:
        divisor = tl.sqrt(squares / tl.maximum(count, 1.0)) + eps
    elif SCALE == 3:
        batch_count, _, batch_squares, _, _ = _moments(reward_ptr, 0, N, BLOCK_N)
        divisor = tl.sqrt(batch_squares / tl.maximum(batch_count - 1.0, 1.0)) + eps
    factor = 1.0 / divisor
    if LEAVE_ONE_OUT:
        factor = factor * count / tl.maximum(count - 1.0, 1.0)
    # high > low is false without scored rewards
    active = high > low
    factor = tl.where(active, factor, 0.0)
    for at in range(start, end, BLOCK_N):
        samples = at + tl.arange(0, BLOCK_N)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        advantage = tl.where(reward == reward, (reward - mean) * factor, 0.0)
        tl.store(advantage_ptr + samples, advantage, mask=samples < end)
    tl.atomic_add(count_ptr, (tl.where(count > 0, low, float("-inf")) > right_above).to(tl.int64))
    tl.atomic_add(
        count_ptr + 1, (tl.where(count > 0, high, float("inf")) <= right_above).to(tl.int64)
    )
    tl.atomic_add(count_ptr + 2, active.to(tl.int64))
    tl.atomic_add(count_ptr + 3, count.to(tl.int64))
    if TOKENS:
        active_tokens = tl.zeros((BLOCK_T,), tl.int32)
        for sample in range(start, end):
            reward = tl.load(reward_ptr + sample)
            scored = reward == reward
            advantage = tl.where(scored, (reward - mean) * factor, 0.0)
            first = tl.maximum(tl.load(token_offset_ptr + sample), 0)
            last = tl.minimum(tl.load(token_offset_ptr + sample + 1), T)
            for token in range(first, last, BLOCK_T):
                tokens = token + tl.arange(0, BLOCK_T)
                mask = tokens < last
                weight = tl.load(token_weight_ptr + tokens, mask=mask, other=0.0)
                weight = tl.where(scored, weight, 0.0)
                tl.store(weight_ptr + tokens, weight, mask=mask)
                tl.store(token_advantage_ptr + tokens, weight * 0.0 + advantage, mask=mask)
                active_tokens += (weight != 0).to(tl.int32)
        tl.atomic_add(count_ptr + 4, tl.sum(active_tokens, 0).to(tl.int64))


def run(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    token_offsets_N1: Tensor | None,
    token_weight_T: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    right_above: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantage_N, advantage_T, weight_T, counts_5); the last three as `GroupCounts` says."""
    rewards_N = rewards_N.contiguous()
    tokens = token_weight_T is not None
    num_samples, num_tokens = len(rewards_N), len(token_weight_T) if tokens else 0
    weight_T = token_weight_T.contiguous() if tokens else rewards_N[:0]
    advantage_N = torch.empty_like(rewards_N)
    advantage_T, out_weight_T = torch.empty_like(weight_T), torch.empty_like(weight_T)
    counts = torch.zeros(5, dtype=torch.int64, device=rewards_N.device)
    num_groups = len(offsets_P1) - 1
    if num_groups:
        small = not rewards_N.is_cuda
        _group_advantages[(num_groups,)](
            rewards_N, offsets_P1.contiguous(),
            token_offsets_N1.contiguous() if tokens else offsets_P1, weight_T,
            advantage_N, advantage_T, out_weight_T, counts, num_samples, num_tokens,
            eps, right_above,
            BLOCK_N=8 if small else 128, BLOCK_T=16 if small else 1024,
            SCALE=_SCALES[scale], LEAVE_ONE_OUT=baseline == "leave_one_out", TOKENS=tokens,
            num_warps=8,
        )  # fmt: skip
    return advantage_N, advantage_T, out_weight_T, counts
