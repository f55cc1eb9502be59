"""The losses of a batch against NumPy fp64: packing, compaction, a golden step, statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_cases import random, some_streams

from intfast.batch import pack
from intfast.config import BatchConfig, PolicyConfig
from intfast.loss import merge_stats, policy_loss, read_stats, row_logprob, sft_loss
from intfast.records import Example

D, V = 7, 13


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
    PolicyConfig(
        objective="reinforce", entropy=0.1, correction="mask", correction_bounds=(0.1, 2.0)
    ),
]


@pytest.mark.parametrize("config", [None, *POLICIES], ids=str)
def test_gradient_is_the_same_for_every_packing_and_order(config):
    def loss(hidden, weight, batch):
        if config is None:
            return sft_loss(hidden, weight, batch)
        return policy_loss(hidden, weight, batch, config, temperature=0.7)

    examples = rl_examples()
    if config is None:
        examples = [Example(token_ids=e.token_ids, weights=e.weights) for e in examples]
    whole, whole_stats = gradients(examples, 1000, loss)
    for shuffled, max_tokens in ((examples, 13), (examples[::-1], 1000), (examples[::-1], 20)):
        parts, stats = gradients(shuffled, max_tokens, loss)
        for left, right in zip(whole, parts, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)
        assert stats == pytest.approx(whole_stats, rel=1e-12)


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
        loss_sum, _ = policy_loss(states[batch.rows_N], weight, batch, PolicyConfig())
        loss_sum.backward()
        results.append((loss_sum, states.grad, weight.grad))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
        assert right.isfinite().all()


def test_hidden_states_of_another_batch_are_refused():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    with pytest.raises(ValueError, match="rows of this batch"):
        sft_loss(random(3, D), random(V, D), batch)


def test_golden_grpo_step_against_numpy():
    """Clip, dual clip, KL, entropy and correction through the head, with hand-written gradients."""
    config = PolicyConfig(
        clip_low=0.1, clip_high=0.3, dual_clip=1.5, kl=0.2, entropy=0.05,
        correction="mask", correction_bounds=(0.4, 2.5),
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
    batch = replace(
        batch, sampler_logprob_N=sampler, old_logprob_N=old, reference_logprob_N=reference
    )
    loss_sum, stats = policy_loss(hidden, weight, batch, config, temperature)
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


@pytest.mark.parametrize("objective", ["grpo", "cispo", "reinforce", "gspo"])
def test_without_old_values_every_objective_is_the_policy_gradient(objective):
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden = random(len(batch.rows_N), D, seed=4)
    results = []
    for name in (objective, "reinforce"):
        weight = random(V, D, seed=5).requires_grad_()
        loss_sum, stats = policy_loss(hidden, weight, batch, PolicyConfig(objective=name))
        loss_sum.backward()
        results.append(weight.grad)
        assert read_stats(stats)["ratio_mean"] == 1.0
    if objective == "gspo":
        # weights and advantages are constant within a sequence, up to its weightless tokens
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_missing_streams_are_refused():
    (batch,) = pack(rl_examples(), BatchConfig()).batches
    hidden, weight = random(len(batch.rows_N), D), random(V, D, seed=1)
    cases = [
        (PolicyConfig(), {"advantage_N": None}, "advantage_T"),
        (PolicyConfig(correction="mask"), {"sampler_logprob_N": None}, "sampler_T"),
        (PolicyConfig(kl=0.1), {}, "reference_T"),
    ]
    for config, change, message in cases:
        with pytest.raises(ValueError, match=message):
            policy_loss(hidden, weight, replace(batch, **change), config)


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
