"""Group-relative advantages of GRPO and its kin, broadcast to tokens, in one launch.

    advantage = (reward - baseline of its group) / (scale + eps)

One program per group reads the group's rewards four times (they are in cache), writes the
advantages of its samples and then those of its samples' tokens; the counts are integer atomic
adds, which give the same sum in every order. Unscored samples (NaN) leave the baseline, the scale
and the loss. A group whose scored rewards are all equal gets exactly 0: rounding in its mean,
divided by eps, would be noise of order one. The kernel sums in fp32, but only what is left of the
rewards above the lowest of their group.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import truth
from .head.plan import NAMESPACE, expect, readable
from .launch import Path, jit, takes_triton, tl

Baseline = Literal["mean", "leave-one-out"]
Scale = Literal["group", "group-population", "batch", "none"]
_SCALES = {"none": 0, "group": 1, "group-population": 2, "batch": 3}


@jit
def _moments(reward_ptr, start, end, BLOCK: tl.constexpr):
    """(count, mean less min, sum of squared deviations, min, max) of a range's scored rewards."""
    # 0-dim tensors, so that an empty group has them too
    count = tl.full((), 0.0, tl.float32)
    low = tl.full((), float("inf"), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    for at in range(start, end, BLOCK):
        samples = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        scored = reward == reward
        count += tl.sum(scored.to(tl.float32), 0)
        low = tl.minimum(low, tl.min(tl.where(scored, reward, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(scored, reward, float("-inf")), 0))
    # From the lowest: rewards that lie close together differ exactly, wherever they lie.
    total = tl.full((), 0.0, tl.float32)
    for at in range(start, end, BLOCK):
        samples = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        total += tl.sum(tl.where(reward == reward, reward - low, 0.0), 0)
    mean = total / tl.maximum(count, 1.0)
    # A pass of its own: the sum of squares less the squared mean would cancel.
    squares = tl.full((), 0.0, tl.float32)
    for at in range(start, end, BLOCK):
        samples = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        centred = tl.where(reward == reward, (reward - low) - mean, 0.0)
        squares += tl.sum(centred * centred, 0)
    return count, mean, squares, low, high


@jit
def _advantages_of_a_group(
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
    # Without scored rewards low > high, so that the group is neither active nor flat.
    active = high > low
    factor = tl.where(active, factor, 0.0)
    for at in range(start, end, BLOCK_N):
        samples = at + tl.arange(0, BLOCK_N)
        reward = tl.load(reward_ptr + samples, mask=samples < end, other=float("nan"))
        advantage = tl.where(reward == reward, (reward - low - mean) * factor, 0.0)
        tl.store(advantage_ptr + samples, advantage, mask=samples < end)
    flat = low == high
    tl.atomic_add(count_ptr, (flat & (low > right_above)).to(tl.int64))
    tl.atomic_add(count_ptr + 1, (flat & (low <= right_above)).to(tl.int64))
    tl.atomic_add(count_ptr + 2, active.to(tl.int64))
    tl.atomic_add(count_ptr + 3, count.to(tl.int64))
    if TOKENS:
        active_tokens = tl.zeros((BLOCK_T,), tl.int32)
        for sample in range(start, end):
            reward = tl.load(reward_ptr + sample)
            scored = reward == reward
            advantage = tl.where(scored, (reward - low - mean) * factor, 0.0)
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


def _triton(
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
        _advantages_of_a_group[(num_groups,)](
            rewards_N, offsets_P1.contiguous(),
            token_offsets_N1.contiguous() if tokens else offsets_P1, weight_T,
            advantage_N, advantage_T, out_weight_T, counts, num_samples, num_tokens,
            eps, right_above,
            BLOCK_N=8 if small else 128, BLOCK_T=16 if small else 1024,
            SCALE=_SCALES[scale], LEAVE_ONE_OUT=baseline == "leave-one-out", TOKENS=tokens,
            num_warps=8,
        )  # fmt: skip
    return advantage_N, advantage_T, out_weight_T, counts


def _plain(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    token_offsets_N1: Tensor | None,
    token_weight_T: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    right_above: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The torch path: groups by `truth` in fp64 (they are few), tokens by one gather."""
    scored_N = ~rewards_N.isnan()
    wide_N = rewards_N.double()
    advantage_N = truth.group_advantages(
        wide_N, offsets_P1, baseline=baseline, scale=scale, eps=eps
    ).to(rewards_N.dtype)
    inf = float("inf")
    low_P = _fold(torch.where(scored_N, wide_N, inf), offsets_P1, "min", inf)
    high_P = _fold(torch.where(scored_N, wide_N, -inf), offsets_P1, "max", -inf)
    flat_P = high_P == low_P
    # two tensors: an operator's outputs must not alias
    advantage_T, weight_T = rewards_N.new_empty(0), rewards_N.new_empty(0, dtype=torch.float32)
    if token_weight_T is not None:
        sample_T = torch.repeat_interleave(token_offsets_N1.diff(), output_size=len(token_weight_T))
        advantage_T = advantage_N[sample_T]
        weight_T = torch.where(scored_N[sample_T], token_weight_T, 0)
    counts = [
        (flat_P & (low_P > right_above)).sum(),
        (flat_P & (low_P <= right_above)).sum(),
        (high_P > low_P).sum(),
        scored_N.sum(),
        (weight_T != 0).sum(),
    ]
    return advantage_N, advantage_T, weight_T, torch.stack(counts)


def _fold(value_N: Tensor, offsets_P1: Tensor, reduce: str, empty: float) -> Tensor:
    return torch.segment_reduce(value_N, reduce, offsets=offsets_P1, initial=empty)


@torch.library.custom_op(f"{NAMESPACE}::group_advantages", mutates_args=())
def _group_advantages(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    token_offsets_N1: Tensor | None,
    token_weight_T: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    right_above: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = _triton if path == "triton" else _plain
    return run(
        rewards_N, offsets_P1, token_offsets_N1, token_weight_T, baseline, scale, eps, right_above
    )


@_group_advantages.register_fake
def _group_advantages_fake(
    rewards_N, offsets_P1, token_offsets_N1, token_weight_T,
    baseline, scale, eps, right_above, path,
):  # fmt: skip
    num_tokens = 0 if token_weight_T is None else token_weight_T.shape[0]
    weight_T = rewards_N.new_empty(num_tokens, dtype=torch.float32)
    counts = rewards_N.new_empty(5, dtype=torch.int64)
    return torch.empty_like(rewards_N), rewards_N.new_empty(num_tokens), weight_T, counts


class TokenLayout(NamedTuple):
    """Where the tokens of each sample lie: sample n owns the tokens offsets[n]..offsets[n + 1]."""

    offsets_N1: Tensor
    """(N + 1,) int64, not decreasing, the last one T."""
    weight_T: Tensor
    """(T,) fp32 loss weights."""


class GroupCounts(NamedTuple):
    """0-dim int64 on the device. A group is in one of the first three, or has no scored sample."""

    all_right: Tensor
    """Groups whose scored rewards are equal and above `right_above`."""
    all_wrong: Tensor
    """Groups whose scored rewards are equal and not above it."""
    active: Tensor
    """Groups whose scored rewards differ."""
    scored: Tensor
    """Samples with a reward."""
    active_tokens: Tensor
    """Tokens of non-zero weight of scored samples; 0 without a token layout."""


class GroupAdvantages(NamedTuple):
    """What `group_advantages` returns."""

    advantage_N: Tensor
    advantage_T: Tensor | None
    weight_T: Tensor | None
    """The given weights, 0 for the tokens of unscored samples and of no sample."""
    counts: GroupCounts


def group_advantages(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    tokens: TokenLayout | None = None,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    eps: float = 1e-4,
    right_above: float = 0.5,
    path: Path = "auto",
) -> GroupAdvantages:
    """Advantages per sample and, with a layout, per token; counts of the kinds of groups.

    rewards_N    (N,) fp32, or fp64 on the plain path; NaN for unscored. No gradient flows through
    offsets_P1   (P + 1,) int64: group p owns the samples offsets[p]..offsets[p + 1]; any sizes
    tokens       the tokens of the samples, on the rewards' device
    baseline     "mean" of the group, or "leave-one-out" (the mean of the others)
    scale        standard deviation of the "group", unbiased; "group-population"; of the "batch",
                 unbiased, over all scored rewards; or "none" (Dr.GRPO)
    eps          added to the scale. TRL 1.16 uses 1e-4, verl 0.9 uses 1e-6
    right_above  a reward above it counts as right
    path         "plain" is torch alone, in fp64 inside; "triton"; "auto" is "triton" on CUDA
    returns      advantages in the rewards' type; 0 for the unscored
    raises       ValueError on a shape, dtype, device or name that does not fit
    note         a group with fewer than two scored samples gets 0; verl keeps a single reward
    """
    device = rewards_N.device
    wide = rewards_N.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    expect("rewards", rewards_N, rewards_N.shape[:1], dtype, device)
    expect("offsets", offsets_P1, offsets_P1.shape[:1], torch.int64, device)
    for name, value, known in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        if value not in get_args(known):
            raise ValueError(f"{name}: expected one of {get_args(known)}, got {value!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected >= 0, got {eps}")
    if tokens is not None:
        num_samples = rewards_N.shape[0]
        expect("tokens.offsets", tokens.offsets_N1, (num_samples + 1,), torch.int64, device)
        expect("tokens.weight", tokens.weight_T, tokens.weight_T.shape[:1], torch.float32, device)
    _check_offsets(offsets_P1, rewards_N.shape[0], "offsets", "samples")
    if tokens is not None:
        num_tokens = tokens.weight_T.shape[0]
        _check_offsets(tokens.offsets_N1, num_tokens, "tokens.offsets", "tokens")
    advantage_N, advantage_T, weight_T, counts = _group_advantages(
        rewards_N.detach(),
        offsets_P1,
        None if tokens is None else tokens.offsets_N1,
        None if tokens is None else tokens.weight_T.detach(),
        baseline,
        scale,
        eps,
        right_above,
        "triton" if takes_triton(path, rewards_N, (torch.float32,)) else "plain",
    )
    if tokens is None:
        advantage_T = weight_T = None
    return GroupAdvantages(advantage_N, advantage_T, weight_T, GroupCounts(*counts.unbind()))


def _check_offsets(offsets: Tensor, end: int, name: str, unit: str) -> None:
    # Where they cannot be looked at, the kernel bounds its reads and writes.
    if not readable(offsets):
        return
    falls = bool((offsets[1:] < offsets[:-1]).any())
    if len(offsets) < 1 or falls or int(offsets[0]) != 0 or int(offsets[-1]) != end:
        raise ValueError(
            f"{name}: expected to rise from 0 to the {end} {unit}, got {offsets.tolist()[:8]}...; "
            "pass the cumulative sizes with a leading 0"
        )
