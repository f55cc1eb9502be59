import math
from itertools import pairwise

import bounds
import numpy as np
import pytest
import torch
from kernels_common import DEVICE, HAS_TRITON

from intfast.kernels.group_advantages import TokenLayout, group_advantages

PATHS = ["plain", *(["triton"] if HAS_TRITON else [])]
NAN = float("nan")


def golden(rewards, offsets, baseline, scale, eps):
    """Independent NumPy fp64, one sample at a time."""
    out = np.zeros(len(rewards))
    scored = [r for r in rewards if not math.isnan(r)]
    for start, end in pairwise(offsets):
        group = [i for i in range(start, end) if not math.isnan(rewards[i])]
        values = [rewards[i] for i in group]
        if len(set(values)) < 2:
            continue
        for i in group:
            others = [rewards[j] for j in group if j != i]
            base = np.mean(values) if baseline == "mean" else np.mean(others)
            divisor = {
                "group": np.std(values, ddof=1) + eps,
                "group-population": np.std(values) + eps,
                "batch": np.std(scored, ddof=1) + eps,
                "none": 1.0,
            }[scale]
            out[i] = (rewards[i] - base) / divisor
    return out


def batch(seed):
    made = np.random.default_rng(seed)
    sizes = [1, 0, 5, 19, 8, 3, 2]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rewards = made.integers(0, 2, offsets[-1]) + 0.25 * made.integers(0, 2, offsets[-1])
    rewards[[2, 7, 20]] = NAN
    rewards[25:33], rewards[33:36], rewards[36:] = 1.25, 0.1, NAN
    lengths = made.integers(0, 40, offsets[-1])
    token_offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = made.random(token_offsets[-1]) * (made.random(token_offsets[-1]) > 0.3)
    return rewards, offsets, token_offsets, weights


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scale", ["group", "group-population", "batch", "none"])
def test_against_numpy(path, baseline, scale):
    rewards, offsets, token_offsets, weights = batch(5)
    layout = TokenLayout(
        torch.tensor(token_offsets, device=DEVICE),
        torch.tensor(weights, dtype=torch.float32, device=DEVICE),
    )
    got = group_advantages(
        torch.tensor(rewards, dtype=torch.float32, device=DEVICE),
        torch.tensor(offsets, device=DEVICE), layout,
        baseline=baseline, scale=scale, eps=1e-2, path=path,
    )  # fmt: skip
    want = golden(rewards, offsets, baseline, scale, 1e-2)
    # Means and deviations are sums of at most all rewards, whose differences are exact.
    bound = bounds.of_sum(len(rewards), np.abs(want).max())
    np.testing.assert_allclose(got.advantage_N.cpu(), want, rtol=0, atol=bound)
    sample_T = np.repeat(np.arange(len(rewards)), np.diff(token_offsets))
    np.testing.assert_allclose(got.advantage_T.cpu(), want[sample_T], rtol=0, atol=bound)
    kept = np.where(np.isnan(rewards[sample_T]), 0, weights)
    np.testing.assert_allclose(got.weight_T.cpu(), kept, rtol=bounds.unit())
    groups = [[r for r in rewards[a:b] if not math.isnan(r)] for a, b in pairwise(offsets)]
    counts = [int(value) for value in got.counts]
    assert counts == [
        sum(1 for g in groups if g and min(g) > 0.5),
        sum(1 for g in groups if g and max(g) <= 0.5),
        sum(1 for g in groups if len(set(g)) > 1),
        int((~np.isnan(rewards)).sum()),
        int((kept != 0).sum()),
    ]
    assert min(counts) > 0


@pytest.mark.parametrize("path", PATHS)
def test_equal_rewards_give_exactly_zero(path):
    # the fp32 mean of some of these groups is not their reward; over eps that would be noise
    sizes = torch.arange(3, 21)
    rewards = torch.repeat_interleave(torch.linspace(0.1, 0.9, 18), sizes).to(DEVICE)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0))).to(DEVICE)
    for scale, eps in (("group", 1e-7), ("group-population", 1e-7), ("group", 0.0)):
        got = group_advantages(rewards, offsets, scale=scale, eps=eps, path=path)
        assert (got.advantage_N == 0).all() and int(got.counts.active) == 0
    assert got.advantage_T is None and got.weight_T is None


@pytest.mark.parametrize("path", PATHS)
def test_large_offsets_in_rewards_do_not_cancel(path):
    rewards = torch.tensor([4096.0, 4096.5, 4097.0, 4095.0], device=DEVICE)
    got = group_advantages(rewards, torch.tensor([0, 4], device=DEVICE), eps=0.0, path=path)
    want = golden(rewards.tolist(), [0, 4], "mean", "group", 0.0)
    # As for rewards of 0 to 2, since their differences are exact.
    bound = bounds.of_sum(4, 2 / np.std(rewards.tolist(), ddof=1))
    np.testing.assert_allclose(got.advantage_N.cpu(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scale", ["group", "group-population", "batch", "none"])
@pytest.mark.parametrize(
    "base,spread", [(1.0, 1e-6), (1e6, 1e4), (-3e4, 0.01), (0.0, 1e-20), (1e-3, 1e3), (0.7, 1e-7)]
)
def test_rewards_close_together_keep_their_differences(path, baseline, scale, base, spread):
    """1 + k 1e-6, and 1e6 +- 1e4: from sums of the rewards themselves, 6 % of an advantage."""
    made = np.random.default_rng(0)
    steps = made.integers(0, 20, 41)
    steps[[0, 1]] = 0, 19
    # The rewards as they are in fp32: what the roundings took away is not asked for.
    rewards = (base + spread * steps).astype(np.float32).astype(np.float64)
    rewards[7] = NAN
    offsets = [0, 9, 41]
    eps = 1e-12 * spread
    got = group_advantages(
        torch.tensor(rewards, dtype=torch.float32, device=DEVICE),
        torch.tensor(offsets, device=DEVICE), baseline=baseline, scale=scale, eps=eps, path=path,
    ).advantage_N.cpu().double()  # fmt: skip
    want = golden(rewards, offsets, baseline, scale, eps)
    # Differences of a group from its lowest reward: a few sums of 32 of them.
    bound = bounds.of_sum(41, 2 * np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("path", PATHS)
def test_a_group_is_of_one_kind(path):
    # all right, all wrong, active although every reward is above the bound, no reward at all
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.6, 1.0, NAN, NAN], device=DEVICE)
    offsets = torch.tensor([0, 2, 4, 6, 8, 8], device=DEVICE)
    counts = group_advantages(rewards, offsets, path=path).counts
    assert [int(value) for value in counts] == [1, 1, 1, 6, 0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_no_samples_and_no_groups(path, offsets):
    layout = TokenLayout(torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(0).to(DEVICE))
    for tokens in (None, layout):
        for scale in ("group", "batch"):
            got = group_advantages(
                torch.ones(0).to(DEVICE), torch.tensor(offsets, device=DEVICE), tokens,
                scale=scale, path=path,
            )  # fmt: skip
            assert got.advantage_N.shape == (0,) and not any(int(value) for value in got.counts)
            assert tokens is None or got.advantage_T.shape == got.weight_T.shape == (0,)


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scale", ["group", "group-population", "batch", "none"])
def test_fp64_rewards_stay_fp64_on_the_plain_path(baseline, scale):
    rewards, offsets, token_offsets, weights = batch(5)
    layout = TokenLayout(torch.tensor(token_offsets), torch.tensor(weights, dtype=torch.float32))
    got = group_advantages(
        torch.tensor(rewards), torch.tensor(offsets), layout,
        baseline=baseline, scale=scale, path="plain",
    )  # fmt: skip
    want = golden(rewards, offsets, baseline, scale, 1e-4)
    assert got.advantage_N.dtype == got.advantage_T.dtype == torch.float64
    bound = bounds.of_sum(len(rewards), np.abs(want).max(), torch.float64)
    np.testing.assert_allclose(got.advantage_N, want, rtol=0, atol=bound)
    sample_T = np.repeat(np.arange(len(rewards)), np.diff(token_offsets))
    np.testing.assert_array_equal(got.advantage_T, got.advantage_N[sample_T])


def test_bad_arguments_are_refused():
    rewards = torch.zeros(4)
    for offsets in ([0, 3], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="offsets"):
            group_advantages(rewards, torch.tensor(offsets))
    with pytest.raises(ValueError, match="scale"):
        group_advantages(rewards, torch.tensor([0, 4]), scale="mad")
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(rewards.half(), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="path: expected one of"):
        group_advantages(rewards, torch.tensor([0, 4]), path="odds")


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_kernel_refuses_fp64():
    rewards, offsets = torch.zeros(4, device=DEVICE).double(), torch.tensor([0, 4], device=DEVICE)
    with pytest.raises(ValueError, match="path='plain'"):
        group_advantages(rewards, offsets, path="triton")
