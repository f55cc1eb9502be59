"""Objectives against NumPy fp64, finite differences and the written derivatives."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from intfast.batch import pack
from intfast.kernels.linear_objective import ObjectiveOutput
from intfast.kernels.objectives import Streams
from intfast.loss import (
    merge_stats,
    objective_of,
    policy_loss,
    policy_stats,
    read_stats,
    row_logprob,
    sft_loss,
)
from intfast.records import Example
from intfast.settings import BatchConfig, PolicyConfig

D, V = 7, 13


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def numpy_logprobs(hidden, weight, temperature=1.0):
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T / temperature
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def rl_examples(count=9, seed=0):
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        prompt, length = generator.integers(1, 5), generator.integers(1, 9)
        total = prompt + length
        weights = np.where(generator.random(length) < 0.8, 1 / length, 0.0)
        weights[-1] = 1 / length
        made.append(
            Example(
                token_ids=generator.integers(0, V, total).tolist(),
                weights=[0.0] * prompt + weights.tolist(),
                advantages=[float(generator.normal())] * total,
                sampler_logprobs=(-generator.random(total) * 3).tolist(),
                problem_id=str(index),
            )
        )
    return made


def embedding_model(seed=0):
    """Hidden states that depend on the input token and its position only."""
    parts = [random(V, D, seed=seed + 1), random(20, D, seed=seed + 2), random(V, D, seed=seed + 3)]
    return [part.requires_grad_() for part in parts]


def gradients(examples, max_tokens, loss, divisor=3.0):
    model = embedding_model()
    total = None
    for batch in pack(examples, BatchConfig(max_tokens=max_tokens)).batches:
        hidden = model[0][batch.token_ids_T] + model[1][batch.position_ids_T]
        loss_sum, stats = loss(hidden[batch.rows_N], model[2], batch)
        (loss_sum / divisor).backward()
        total = merge_stats(total, stats)
    return [part.grad for part in model], read_stats(total)


POLICIES = [
    PolicyConfig(),
    PolicyConfig(objective="gspo", correction="truncate", correction_level="sequence"),
    PolicyConfig(objective="cispo", correction="mask", correction_level="sequence-mean"),
    PolicyConfig(objective="reinforce", entropy=0.1, correction="mask", correction_low=0.1),
]


@pytest.mark.parametrize("config", [None, *POLICIES], ids=str)
def test_gradient_is_the_same_for_every_packing_and_order(config):
    def loss(hidden, weight, batch):
        if config is None:
            return sft_loss(hidden, weight, batch)
        return policy_loss(hidden, weight, batch, None, config, temperature=0.7)

    examples = rl_examples()
    if config is None:
        examples = [Example(token_ids=e.token_ids, weights=e.weights) for e in examples]
    whole, whole_stats = gradients(examples, 1000, loss)
    for shuffled, max_tokens in ((examples, 13), (examples[::-1], 1000), (examples[::-1], 20)):
        parts, stats = gradients(shuffled, max_tokens, loss)
        for left, right in zip(whole, parts, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)
        assert stats == pytest.approx(whole_stats, rel=1e-6)


def test_compaction_equals_the_dense_masked_loss():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden = random(len(batch.token_ids_T), D, seed=4).requires_grad_()
    weight = random(V, D, seed=5).requires_grad_()
    assert len(batch.rows_N) < len(hidden)
    loss_sum, _ = sft_loss(hidden[batch.rows_N], weight, batch)
    got = torch.autograd.grad(loss_sum, (hidden, weight))

    dense_weight_T = torch.zeros(len(hidden), dtype=torch.float64)
    dense_target_T = torch.zeros(len(hidden), dtype=torch.int64)
    dense_weight_T[batch.rows_N] = batch.weight_N.double()
    dense_target_T[batch.rows_N] = batch.target_N
    dense = torch.nn.functional.cross_entropy(hidden @ weight.T, dense_target_T, reduction="none")
    expected = (dense * dense_weight_T).sum()
    torch.testing.assert_close(loss_sum, expected)
    for left, right in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(left, right)


def test_nan_in_weightless_rows_does_not_matter():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden = random(len(batch.token_ids_T), D, seed=4)
    poisoned = torch.full_like(hidden, math.nan)
    poisoned[batch.rows_N] = hidden[batch.rows_N]
    results = []
    for states in (hidden, poisoned):
        states.requires_grad_()
        weight = random(V, D, seed=5).requires_grad_()
        loss_sum, _ = policy_loss(states[batch.rows_N], weight, batch, None, PolicyConfig())
        loss_sum.backward()
        results.append((loss_sum, states.grad, weight.grad))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
        assert right.isfinite().all()


def test_hidden_states_of_another_batch_are_refused():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    with pytest.raises(ValueError, match="rows of this batch"):
        sft_loss(random(3, D), random(V, D), batch)


def some_streams(num=40, seed=0, **changes):
    """(logprob_N, Streams) with ratios on both sides of every bound; sequences of 8 rows."""
    old = -random(num, seed=seed).abs()
    fields = {
        "weight_T": torch.ones(num, dtype=torch.float64),
        "advantage_T": random(num, seed=seed + 1),
        "old_T": old,
        "reference_T": old + 0.5 * random(num, seed=seed + 3),
        "sampler_T": old + 0.6 * random(num, seed=seed + 2),
        "sequence_T": torch.arange(num) // 8,
    }
    return old + 0.8 * random(num, seed=seed + 4), Streams(**fields | changes)


def test_golden_grpo_step_against_numpy():
    """Clip, dual clip, KL, entropy and correction through the head, with hand-written gradients."""
    config = PolicyConfig(
        clip_low=0.1, clip_high=0.3, dual_clip=1.5, kl=0.2, entropy=0.05,
        correction="mask", correction_low=0.4, correction_high=2.5,
    )  # fmt: skip
    temperature, num = 0.8, 60
    weights = [0.0] + [0.5 + 0.01 * t for t in range(num)]
    logprob, streams = some_streams(num)
    advantage = (streams.advantage_T * 64).round() / 64  # exact in fp32, also times 1.5
    tokens = (np.arange(num + 1) * 5 % V).tolist()
    example = Example(
        token_ids=tokens,
        weights=weights,
        advantages=[0.0, *advantage.tolist()],
        sampler_logprobs=[0.0, *streams.sampler_T.tolist()],
    )
    (batch,) = pack([example], BatchConfig()).batches
    hidden, weight = random(num, D, seed=8).requires_grad_(), random(V, D, seed=9).requires_grad_()
    current = row_logprob(hidden, weight, batch, temperature)
    old = current - (logprob - streams.old_T)  # ratios as in the streams
    sampler = old - (streams.old_T - streams.sampler_T)
    reference = old - (streams.old_T - streams.reference_T)
    object.__setattr__(batch, "sampler_logprob_N", sampler)
    loss_sum, stats = policy_loss(
        hidden, weight, batch, old, config, reference_logprob_N=reference, temperature=temperature
    )
    loss_sum.backward()

    h, w = hidden.detach().numpy(), weight.detach().numpy()
    logs = numpy_logprobs(h, w, temperature)
    p, y = np.exp(logs), np.asarray(tokens[1:])
    lp = logs[np.arange(num), y]
    old, sampler, reference = map(np.asarray, (old, sampler, reference))
    a = batch.advantage_N.double().numpy()
    wt = batch.weight_N.double().numpy()
    r, q, d = np.exp(lp - old), np.exp(old - sampler), reference - lp
    factor = np.where((q >= 0.4) & (q <= 2.5), q, 0.0)
    gain = np.minimum(r * a, np.clip(r, 0.9, 1.3) * a)
    gain = np.where(a < 0, np.maximum(gain, 1.5 * a), gain)
    entropy = -(p * logs).sum(1)
    loss = -factor * gain + 0.2 * (np.exp(d) - 1 - d) - 0.05 * entropy
    flat = ((a > 0) & (r > 1.3)) | ((a < 0) & ((r < 0.9) | (r > 1.5)))
    c = np.where(flat, 0.0, factor * r * a) - 0.2 * (1 - np.exp(d))
    onehot = np.eye(V)[y]
    dz = -c[:, None] * (onehot - p) + 0.05 * p * (logs + entropy[:, None])
    dz *= wt[:, None] / temperature

    np.testing.assert_allclose(loss_sum.item(), (wt * loss).sum(), rtol=1e-12)
    np.testing.assert_allclose(hidden.grad, dz @ w, atol=1e-13)
    np.testing.assert_allclose(weight.grad, dz.T @ h, atol=1e-12)
    read = read_stats(stats)
    expected = {
        "num_tokens": num,
        "ratio_mean": r.mean(),
        "clip_low_mean": ((a < 0) & (r < 0.9)).mean(),
        "clip_high_mean": ((a > 0) & (r > 1.3)).mean(),
        "clip_dual_mean": ((a < 0) & (r > 1.5)).mean(),
        "kl_mean": (np.exp(d) - 1 - d).mean(),
        "entropy_mean": entropy.mean(),
        "sampler_diff_mean": np.abs(old - sampler).mean(),
        "sampler_diff_max": np.abs(old - sampler).max(),
        "sampler_outside_mean": (np.abs(old - sampler) > 0.1).mean(),
        "sampler_ratio_mean": q.mean(),
        "sampler_ratio_min": q.min(),
        "sampler_ratio_max": q.max(),
        "corrected_mean": (factor == 0).mean(),
        "loss_sum": (wt * loss).sum(),
    }
    assert read == pytest.approx(expected, rel=1e-9)
    for name in ("clip_low_mean", "clip_high_mean", "clip_dual_mean", "corrected_mean"):
        assert 0 < read[name] < 1, f"{name}: the case must reach this branch"


def terms_of(config, logprob, streams, entropy=None):
    return objective_of(config, 5)(logprob, entropy, streams)


def configs():
    base = {"clip_low": 0.2, "clip_high": 0.4}
    for objective in ("grpo", "gspo"):
        yield PolicyConfig(objective=objective, **base)
        yield PolicyConfig(objective=objective, dual_clip=1.5, **base)
    yield PolicyConfig(objective="grpo", correction="mask", **base)
    sequence = {"correction": "mask", "correction_level": "sequence-mean", "correction_high": 1.1}
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
    bounds = {"correction_high": high} | ({"correction_low": low} if mode == "mask" else {})
    config = PolicyConfig(objective="reinforce", correction=mode, correction_level=level, **bounds)
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
def test_without_old_values_every_objective_is_the_policy_gradient(objective):
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden = random(len(batch.rows_N), D, seed=4)
    results = []
    for name in (objective, "reinforce"):
        weight = random(V, D, seed=5).requires_grad_()
        loss_sum, stats = policy_loss(hidden, weight, batch, None, PolicyConfig(objective=name))
        loss_sum.backward()
        results.append(weight.grad)
        assert read_stats(stats)["ratio_mean"] == 1.0
    if objective == "gspo":
        # weights and advantages are constant within a sequence, up to its weightless tokens
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


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


def test_missing_streams_are_refused():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden, weight = random(len(batch.rows_N), D), random(V, D, seed=1)
    reference = torch.zeros(len(batch.rows_N))
    cases = [
        (PolicyConfig(), {"advantage_N": None}, None, "Examples with advantages"),
        (PolicyConfig(correction="mask"), {"sampler_logprob_N": None}, None, "sampler_logprobs"),
        (PolicyConfig(kl=0.1), {}, None, "got none"),
        (PolicyConfig(), {}, reference, "got some"),
    ]
    for config, change, given, message in cases:
        changed = replace(batch, **change)
        with pytest.raises(ValueError, match=message):
            policy_loss(hidden, weight, changed, None, config, reference_logprob_N=given)


def test_scoring_keeps_no_graph():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden = random(len(batch.rows_N), D).requires_grad_()
    logprob = row_logprob(hidden, random(V, D, seed=1), batch, 0.7)
    truth = numpy_logprobs(hidden.detach(), random(V, D, seed=1), 0.7)
    assert not logprob.requires_grad
    np.testing.assert_allclose(logprob, truth[np.arange(len(truth)), batch.target_N], atol=1e-13)


def test_stats_of_different_objectives_do_not_merge():
    with pytest.raises(ValueError, match="one objective"):
        merge_stats({"a_sum": torch.ones(())}, {"b_sum": torch.ones(())})
