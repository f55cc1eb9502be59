"""The derivative of every objective, alone and through the head, and a golden GRPO step."""

import numpy as np
import pytest
import torch
from kernels_common import inputs
from objective_cases import OBJECTIVES, plain, streams_for

from intfast.kernels import objectives
from intfast.kernels import truth as definition
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import Cispo, PolicyClip, SequenceClip, Streams

each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:70])


def streams_of(objective, logprob_T):
    s = streams_for(logprob_T)
    if isinstance(objective, SequenceClip):
        # its derivative is per token only where these are equal within the sequence
        advantage_T = (s.sequence_T - 0.5).to(logprob_T)
        s = s._replace(weight_T=torch.ones_like(logprob_T), advantage_T=advantage_T)
    return s


def surrogate(objective, at_logprob, s):
    """The objective as a differentiable function, with what it holds constant held constant."""
    if not isinstance(objective, Cispo):
        return lambda logprob, entropy: objective(logprob, entropy, s).loss_T
    ratio = (at_logprob - s.old_T).exp().clamp(objective.low, objective.high)
    return lambda logprob, entropy: -ratio * s.advantage_T * logprob


def test_every_objective_is_here():
    kinds = {type(objective) for objective in OBJECTIVES}
    written = {value for value in vars(objectives).values() if hasattr(value, "whole_batch")}
    assert written - {objectives.Objective} == kinds


@each_objective
def test_coefficients_against_autograd(objective):
    logprob = (-3 * torch.rand(40, dtype=torch.float64) - 0.05).requires_grad_()
    entropy = torch.rand(40, dtype=torch.float64).requires_grad_()
    s = streams_of(objective, logprob.detach())
    terms = objective(logprob.detach(), entropy.detach(), s)
    want = plain(objective, logprob, entropy, s)
    torch.testing.assert_close(terms.loss_T, want.detach())
    grads = torch.autograd.grad(
        (s.weight_T * want).sum(), (logprob, entropy), allow_unused=True, materialize_grads=True
    )
    got = terms.dentropy_T if terms.dentropy_T is not None else torch.zeros(40).double()
    torch.testing.assert_close(s.weight_T * terms.dlogprob_T, grads[0])
    torch.testing.assert_close(s.weight_T * got, grads[1])


class Written(torch.autograd.Function):
    """The loss by one function, its derivatives by the objective."""

    @staticmethod
    def forward(ctx, logprob, entropy, objective, loss, s):
        terms = objective(logprob, entropy, s)
        slope = terms.dentropy_T
        ctx.slopes = terms.dlogprob_T, torch.zeros_like(entropy) if slope is None else slope
        ctx.weight = s.weight_T
        return (s.weight_T * loss(logprob, entropy)).sum()

    @staticmethod
    def backward(ctx, grad):
        return *(grad * ctx.weight * slope for slope in ctx.slopes), None, None, None


@each_objective
def test_gradcheck_of_every_objective(objective):
    logprob = -3 * torch.rand(40, dtype=torch.float64) - 0.05
    entropy = torch.rand(40, dtype=torch.float64)
    s = streams_of(objective, logprob)
    loss = surrogate(objective, logprob, s)

    def call(logprob, entropy):
        return Written.apply(logprob, entropy, objective, loss, s)

    assert torch.autograd.gradcheck(call, (logprob.requires_grad_(), entropy.requires_grad_()))


@each_objective
@pytest.mark.parametrize("chunk_bytes", [10**9, 600])
def test_gradcheck_through_the_head(objective, chunk_bytes):
    """Hidden states and weight to the weighted sum, in fp64; CISPO against its surrogate."""
    hidden, weight, target = inputs(9, 4, 7, dtype=torch.float64)
    pair = hidden.requires_grad_(), weight.requires_grad_()
    near, _ = definition.linear_logprob(hidden.detach(), weight.detach(), target)
    s = streams_of(objective, near)
    options = {"chunk_bytes": chunk_bytes, "temperature": 0.9, "softcap": 5.0}
    if not isinstance(objective, Cispo):

        def call(h, w):
            return linear_objective(h, w, target, objective, s, **options).loss

        assert torch.autograd.gradcheck(call, pair)
        return
    got = torch.autograd.grad(linear_objective(*pair, target, objective, s, **options).loss, pair)
    plain_options = {"temperature": 0.9, "softcap": 5.0}
    at, _ = definition.linear_logprob(*pair, target, **plain_options)
    loss = surrogate(objective, at.detach(), s)

    def call(h, w):
        logprob, entropy = definition.linear_logprob(h, w, target, **plain_options)
        return (s.weight_T * loss(logprob, entropy)).sum()

    assert torch.autograd.gradcheck(call, pair)
    for x, y in zip(got, torch.autograd.grad(call(*pair), pair), strict=True):
        torch.testing.assert_close(x, y)


def test_golden_grpo_step_in_numpy():
    rng = np.random.default_rng(3)
    T, D, V, G = 24, 6, 11, 4
    hidden, weight = rng.normal(size=(T, D)), rng.normal(size=(V, D))
    target = rng.integers(0, V, T)
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    advantage = np.repeat((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), T // G)
    logits = hidden @ weight.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    logprob = np.log(p[np.arange(T), target])
    old = logprob + 0.3 * rng.normal(size=T)
    ratio = np.exp(logprob - old)
    clipped = np.clip(ratio, 0.8, 1.28)
    loss = -np.minimum(ratio * advantage, clipped * advantage).sum() / T
    free = np.where(advantage > 0, ratio <= 1.28, ratio >= 0.8)
    dlogits = -(free * ratio * advantage / T)[:, None] * (np.eye(V)[target] - p)
    h = torch.tensor(hidden, requires_grad=True)
    w = torch.tensor(weight, requires_grad=True)
    s = Streams(
        torch.full((T,), 1 / T, dtype=torch.float64), torch.tensor(advantage),
        old_T=torch.tensor(old),
    )  # fmt: skip
    out = linear_objective(h, w, torch.tensor(target), PolicyClip(0.2, 0.28), s)
    out.loss.backward()
    assert abs(out.loss.item() - loss) < 1e-12
    np.testing.assert_allclose(h.grad.numpy(), dlogits @ weight, atol=1e-12)
    np.testing.assert_allclose(w.grad.numpy(), dlogits.T @ hidden, atol=1e-12)
    assert (~free).sum() > 2
