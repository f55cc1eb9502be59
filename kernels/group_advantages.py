"""Group-relative advantages of GRPO and its kin, broadcast to tokens, in one launch.

    advantage = (reward - baseline of its group) / (scale + eps)

One program per group reads the group's rewards three times (they are in cache), writes the
advantages of its samples and then those of its samples' tokens; the counts are integer atomic
adds, which give the same sum in every order. Unscored samples (NaN) leave the baseline, the scale
and the loss. A group whose scored rewards are all equal gets exactly 0: rounding in its mean,
divided by eps, would be noise of order one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from intfast.kernels import reference
from intfast.kernels.launch import Impl, expect, readable, resolve_impl

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["std", "population", "batch", "none"]


class TokenLayout(NamedTuple):
    """Where the tokens of each sample lie: sample n owns the tokens offsets[n]..offsets[n + 1]."""

    offsets_N1: Tensor
    """(N + 1,) int64, not decreasing, the last one T."""
    weight_T: Tensor
    """(T,) fp32 loss weights."""


class GroupCounts(NamedTuple):
    """0-dim int64 on the device."""

    all_right: Tensor
    """Groups whose scored rewards all exceed `right_above`; unscored groups are in no count."""
    all_wrong: Tensor
    """Groups with none above it."""
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
    scale: Scale = "std",
    eps: float = 1e-4,
    right_above: float = 0.5,
    impl: Impl = "auto",
) -> GroupAdvantages:
    """Advantages per sample and, with a layout, per token; counts of the kinds of groups.

    rewards_N    (N,) fp32; NaN for unscored. No gradient flows through
    offsets_P1   (P + 1,) int64: group p owns the samples offsets[p]..offsets[p + 1]; any sizes
    tokens       the tokens of the samples, on the rewards' device
    baseline     "mean" of the group, or "leave_one_out" (the mean of the others)
    scale        of the group: "std" unbiased, "population", "none" (Dr.GRPO); or "batch", the
                 unbiased std of all scored rewards
    eps          added to the scale. TRL 1.16 uses 1e-4, verl 0.9 uses 1e-6
    right_above  a reward above it counts as right
    raises       ValueError on a shape, dtype, device or name that does not fit
    note         a group with fewer than two scored samples gets 0; verl keeps a single reward
    """
    device = rewards_N.device
    expect("rewards", rewards_N, rewards_N.shape[:1], torch.float32, device)
    expect("offsets", offsets_P1, offsets_P1.shape[:1], torch.int64, device)
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline: expected 'mean' or 'leave_one_out', got {baseline!r}")
    if scale not in ("std", "population", "batch", "none"):
        raise ValueError(f"scale: expected 'std', 'population', 'batch' or 'none', got {scale!r}")
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
        resolve_impl(impl, device),
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


@torch.library.custom_op("intfast::group_advantages", mutates_args=())
def _group_advantages(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    token_offsets_N1: Tensor | None,
    token_weight_T: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    right_above: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (rewards_N, offsets_P1, token_offsets_N1, token_weight_T)
    if impl == "triton":
        from intfast.kernels import group_advantages_triton

        return group_advantages_triton.run(*arguments, baseline, scale, eps, right_above)
    return _vectorised(*arguments, baseline, scale, eps, right_above)


@_group_advantages.register_fake
def _group_advantages_fake(
    rewards_N, offsets_P1, token_offsets_N1, token_weight_T,
    baseline, scale, eps, right_above, impl,
):  # fmt: skip
    tokens_T = rewards_N[:0] if token_weight_T is None else token_weight_T
    counts = rewards_N.new_empty(5, dtype=torch.int64)
    return (
        torch.empty_like(rewards_N), torch.empty_like(tokens_T), torch.empty_like(tokens_T), counts
    )  # fmt: skip


def _vectorised(
    rewards_N: Tensor,
    offsets_P1: Tensor,
    token_offsets_N1: Tensor | None,
    token_weight_T: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    right_above: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference path: groups in fp64 (they are few), tokens by one gather."""
    scored_N = ~rewards_N.isnan()
    wide_N = rewards_N.double()
    advantage_N = reference.group_advantages(
        wide_N, offsets_P1, baseline=baseline, scale=scale, eps=eps
    ).to(rewards_N.dtype)
    inf = float("inf")
    low_P = _fold(torch.where(scored_N, wide_N, inf), offsets_P1, "min", inf)
    high_P = _fold(torch.where(scored_N, wide_N, -inf), offsets_P1, "max", -inf)
    some_P = high_P >= low_P
    # two tensors: an operator's outputs must not alias
    advantage_T, weight_T = rewards_N.new_empty(0), rewards_N.new_empty(0)
    if token_weight_T is not None:
        sample_T = torch.repeat_interleave(token_offsets_N1.diff(), output_size=len(token_weight_T))
        advantage_T = advantage_N[sample_T]
        weight_T = torch.where(scored_N[sample_T], token_weight_T, 0)
    counts = [
        (some_P & (low_P > right_above)).sum(),
        (some_P & (high_P <= right_above)).sum(),
        (high_P > low_P).sum(),
        scored_N.sum(),
        (weight_T != 0).sum(),
    ]
    return advantage_N, advantage_T, weight_T, torch.stack(counts)


def _fold(value_N: Tensor, offsets_P1: Tensor, reduce: str, empty: float) -> Tensor:
    return torch.segment_reduce(value_N, reduce, offsets=offsets_P1, initial=empty)
