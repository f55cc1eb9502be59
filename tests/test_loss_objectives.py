"""The settings of a policy as objectives: their terms, derivatives, bounds and statistics."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import random, some_streams
from torch.autograd import gradcheck

from intfast.config import PolicyConfig
from intfast.kernels.linear_objective import ObjectiveOutput
from intfast.kernels.objectives import Streams
from intfast.loss import objective_of, policy_stats


def terms_of(config, logprob, streams, entropy=None):
    return objective_of(config, 5)(logprob, entropy, streams)


def configs():
    base = {"clip_low": 0.2, "clip_high": 0.4}
    for objective in ("grpo", "gspo"):
        yield PolicyConfig(objective=objective, **base)
        yield PolicyConfig(objective=objective, dual_clip=1.5, **base)
    yield PolicyConfig(objective="grpo", correction="mask", **base)
    sequence = {
        "correction": "mask",
        "correction_level": "sequence-mean",
        "correction_bounds": (0.5, 1.1),
    }
    yield PolicyConfig(objective="gspo", **sequence, **base)
    yield PolicyConfig(objective="reinforce", entropy=0.3)
    for estimator in ("k1", "k2", "k3"):
        yield PolicyConfig(objective="reinforce", kl=0.3, kl_estimator=estimator)
    for level in ("token", "sequence", "sequence-mean"):
        yield PolicyConfig(objective="reinforce", correction="truncate", correction_level=level)


@pytest.mark.parametrize("config", list(configs()), ids=str)
def test_written_derivatives_are_those_of_the_summed_loss(config):
    logprob, streams = some_streams()
    if config.objective == "gspo":  # equal within a sequence, see objective_of
        streams = streams._replace(advantage_T=(streams.sequence_T - 1.5).double())
    entropy = random(len(logprob), seed=7).abs()

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logprob, entropy):
            terms = terms_of(config, logprob, streams, entropy)
            slope = terms.dentropy_T
            ctx.slopes = terms.dlogprob_T, torch.zeros_like(entropy) if slope is None else slope
            return terms.loss_T.sum()

        @staticmethod
        def backward(ctx, grad):
            return tuple(grad * slope for slope in ctx.slopes)

    assert gradcheck(Loss.apply, (logprob.requires_grad_(), entropy.requires_grad_()))


def test_cispo_gradient_is_the_clipped_ratio_times_advantage():
    # Its factor is a constant by definition, so finite differences of the value do not apply.
    logprob, streams = some_streams()
    config = PolicyConfig(objective="cispo", clip_low=0.3, clip_high=0.5)
    ratio = (logprob - streams.old_T).exp()
    assert (ratio < 0.7).any() and (ratio > 1.5).any()
    slope = terms_of(config, logprob, streams).dlogprob_T
    torch.testing.assert_close(slope, -ratio.clamp(0.7, 1.5) * streams.advantage_T)


def test_gspo_ratio_is_the_geometric_mean_of_its_sequence():
    logprob, streams = some_streams()
    config = PolicyConfig(objective="gspo", clip_low=0.5, clip_high=0.2, dual_clip=1.25)
    ratio = (logprob - streams.old_T).unflatten(0, (5, 8)).mean(1).exp().repeat_interleave(8)
    negative = streams.advantage_T < 0
    assert (ratio > 1.2).any() and (ratio[negative] > 1.25).any() and (ratio < 1.2).any()
    bounded = torch.where(negative, ratio.clamp(0.5, 1.25), ratio.clamp(max=1.2))
    loss = terms_of(config, logprob, streams).loss_T
    torch.testing.assert_close(loss, -bounded * streams.advantage_T)
    output = ObjectiveOutput(loss.sum(), logprob, torch.zeros_like(logprob))
    stats = policy_stats(output, streams, config, 5)
    torch.testing.assert_close(stats["ratio_sum"], ratio.sum())
    assert stats["clip_dual_sum"] == (negative & (ratio > 1.25)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_estimators(estimator):
    logprob, streams = some_streams(advantage_T=torch.zeros(40, dtype=torch.float64))
    d = streams.reference_T - logprob
    config = PolicyConfig(kl=0.3, kl_estimator=estimator)
    loss = terms_of(config, logprob, streams).loss_T
    expected = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[estimator]
    torch.testing.assert_close(loss, 0.3 * expected)
    stats = policy_stats(ObjectiveOutput(loss.sum(), logprob, loss), streams, config, 5)
    torch.testing.assert_close(stats["kl_sum"], expected.sum())


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence-mean"])
def test_correction_by_hand(level, mode):
    logprob, streams = some_streams()
    difference = (streams.old_T - streams.sampler_T).unflatten(0, (5, 8))
    ratio = {
        "token": difference,
        "sequence": difference.sum(1, keepdim=True).expand(5, 8),
        "sequence-mean": difference.mean(1, keepdim=True).expand(5, 8),
    }[level].exp().flatten()  # fmt: skip
    low, high = {"token": (0.6, 1.2), "sequence": (0.5, 2.0), "sequence-mean": (0.97, 1.05)}[level]
    config = PolicyConfig(
        objective="reinforce",
        correction=mode,
        correction_level=level,
        correction_bounds=(low if mode == "mask" else 0.5, high),
    )
    assert (ratio < low).any() and (ratio > high).any()
    assert ((ratio >= low) & (ratio <= high)).any()
    inside = (ratio <= high) & (ratio >= low if mode == "mask" else ratio == ratio)
    factor = ratio.clamp(max=high) if mode == "truncate" else ratio * inside
    plain = terms_of(PolicyConfig(objective="reinforce"), logprob, streams)
    terms = terms_of(config, logprob, streams)
    torch.testing.assert_close(terms.loss_T, factor * plain.loss_T)
    torch.testing.assert_close(terms.dlogprob_T, factor * plain.dlogprob_T)
    output = ObjectiveOutput(plain.loss_T.sum(), logprob, torch.zeros_like(logprob))
    stats = policy_stats(output, streams._replace(reference_T=None), config, 5)
    assert stats["corrected_sum"] == (~inside).sum()
    torch.testing.assert_close(stats["sampler_ratio_sum"], ratio.sum())
    assert stats["sampler_ratio_min"] == pytest.approx(ratio.min().item())
    assert stats["sampler_ratio_max"] == pytest.approx(ratio.max().item())


def test_correction_leaves_divergence_and_entropy_alone():
    logprob, streams = some_streams()
    entropy = random(len(logprob), seed=7).abs()
    streams = streams._replace(sampler_T=streams.old_T - 3)  # all masked
    config = PolicyConfig(correction="mask", kl=0.2, entropy=0.1)
    d = streams.reference_T - logprob
    loss = terms_of(config, logprob, streams, entropy).loss_T
    torch.testing.assert_close(loss, 0.2 * (d.exp() - 1 - d) - 0.1 * entropy)


@pytest.mark.parametrize("objective", ["grpo", "cispo", "reinforce", "gspo"])
def test_zero_advantage_gives_exactly_zero_gradient(objective):
    logprob, streams = some_streams(advantage_T=torch.zeros(40, dtype=torch.float64))
    config = PolicyConfig(objective=objective, correction="truncate")
    assert terms_of(config, logprob, streams).dlogprob_T.abs().max() == 0


@pytest.mark.parametrize("objective", ["grpo", "cispo", "gspo"])
def test_far_ratios_stay_finite(objective):
    streams = Streams(
        weight_T=torch.ones(3),
        advantage_T=torch.tensor([-1.0, 1.0, 1.0]),
        old_T=torch.tensor([-500.0, 0.0, -0.1]),
        reference_T=torch.tensor([0.0, -900.0, -0.1]),
        sampler_T=torch.tensor([0.0, -500.0, -0.1]),
        sequence_T=torch.tensor([0, 0, 1]),
    )
    logprob = torch.tensor([-0.1, -600.0, -0.1])
    config = PolicyConfig(objective=objective, kl=0.1, correction="truncate")
    terms = objective_of(config, 2)(logprob, None, streams)
    assert terms.loss_T.isfinite().all() and terms.dlogprob_T.isfinite().all()
    output = ObjectiveOutput(terms.loss_T.sum(), logprob, torch.zeros(3))
    stats = policy_stats(output, streams, config, 2)
    assert all(math.isfinite(value.item()) for value in stats.values())
