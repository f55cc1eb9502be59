from itertools import pairwise

import numpy as np
import pytest
import torch
from kernels_common import DEVICE, FORMS, INTERPRETED, inputs, options

from intfast.kernels import reference
from intfast.kernels.launch import IGNORE, Head, plan_head
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import (
    Cispo,
    Corrected,
    CrossEntropy,
    EntropyBonus,
    Kl,
    PolicyClip,
    Reinforce,
    SequenceClip,
    Streams,
    Sum,
)
from intfast.kernels.span_cross_entropy import span_cross_entropy

SEQUENCES = 3


def streams_for(logprob_T, seed=1):
    made = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(len(logprob_T), generator=made).to(logprob_T)

    T = len(logprob_T)
    sequence_T = torch.arange(T, device=logprob_T.device) * SEQUENCES // T
    sampler_T = logprob_T + 0.5 * noise()
    sampler_T[2] = float("nan")
    return Streams(
        weight_T=noise().abs() + 0.1,
        advantage_T=noise(),
        old_T=logprob_T + 0.4 * noise(),
        reference_T=logprob_T + 0.4 * noise(),
        sampler_T=sampler_T,
        sequence_T=sequence_T,
    )


def plain(objective, logprob, entropy, s):
    """The loss per token as its paper states it; constants are detached, autograd does the rest."""
    if isinstance(objective, Sum):
        return sum(plain(part, logprob, entropy, s) for part in objective.parts)
    if isinstance(objective, CrossEntropy):
        return -logprob
    if isinstance(objective, EntropyBonus):
        return -objective.coefficient * entropy
    if isinstance(objective, Corrected):
        log_weight = torch.where(s.sampler_T.isnan(), 0, s.old_T - s.sampler_T)
        if objective.level != "token":
            member = torch.nn.functional.one_hot(s.sequence_T, SEQUENCES).to(logprob)
            member = member * (s.weight_T != 0)[:, None]
            total = log_weight @ member
            if objective.level == "geometric":
                total = total / member.sum(0)
            log_weight = total[s.sequence_T]
        weight = log_weight.exp()
        if objective.mode == "mask":
            weight = weight * ((weight >= objective.low) & (weight <= objective.high))
        else:
            weight = weight.clamp(objective.low, objective.high)
        return weight * plain(objective.inner, logprob, entropy, s)
    if isinstance(objective, Kl):
        d = s.reference_T - logprob
        return (
            objective.coefficient
            * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[objective.kind]
        )
    A = s.advantage_T
    if isinstance(objective, Reinforce):
        return -A * logprob
    ratio = (logprob - s.old_T).exp()
    if isinstance(objective, Cispo):
        return -ratio.detach().clamp(objective.low, objective.high) * A * logprob
    if isinstance(objective, SequenceClip):
        member = torch.nn.functional.one_hot(s.sequence_T, SEQUENCES).to(logprob)
        member = member * (s.weight_T != 0)[:, None]
        ratio = (((logprob - s.old_T) @ member) / member.sum(0)).exp()[s.sequence_T]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - objective.low, 1 + objective.high) * A)
    if getattr(objective, "dual", None) is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, objective.dual * A), surrogate)
    return -surrogate


OBJECTIVES = [
    CrossEntropy(),
    Reinforce(),
    PolicyClip(0.2, 0.3),
    PolicyClip(0.1, 0.28, dual=1.4),
    Cispo(0.7, 1.2),
    Kl(0.3, "k1"),
    Kl(0.3, "k2"),
    Kl(0.3, "k3"),
    EntropyBonus(0.2),
    Corrected(PolicyClip(), high=1.3, low=0.8),
    Corrected(PolicyClip(), high=1.3, low=0.8, mode="mask"),
    Corrected(Reinforce(), high=4.0, level="sequence", num_sequences=SEQUENCES),
    Corrected(Reinforce(), high=1.1, level="geometric", num_sequences=SEQUENCES),
    Sum((PolicyClip(), Kl(0.1, "k3"), EntropyBonus(0.05))),
    SequenceClip(SEQUENCES, 0.1, 0.1),
    SequenceClip(SEQUENCES, 0.02, 0.02, dual=1.05),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:70])
def test_coefficients_against_autograd_and_finite_differences(objective):
    logprob = (-3 * torch.rand(40, dtype=torch.float64) - 0.05).requires_grad_()
    entropy = torch.rand(40, dtype=torch.float64).requires_grad_()
    s = streams_for(logprob.detach())
    if isinstance(objective, SequenceClip):
        # its derivative is per token only where these are equal within the sequence
        s = s._replace(weight_T=torch.ones(40).double(), advantage_T=(s.sequence_T - 0.5).double())
    terms = objective(logprob.detach(), entropy.detach(), s)
    want = plain(objective, logprob, entropy, s)
    torch.testing.assert_close(terms.loss_T, want.detach())
    grads = torch.autograd.grad(
        (s.weight_T * want).sum(), (logprob, entropy), allow_unused=True, materialize_grads=True
    )
    got = terms.dentropy_T if terms.dentropy_T is not None else torch.zeros(40).double()
    torch.testing.assert_close(s.weight_T * terms.dlogprob_T, grads[0])
    torch.testing.assert_close(s.weight_T * got, grads[1])
    if not isinstance(objective, Cispo):  # its weight is a constant to autograd only
        step = 1e-6 * torch.randn(40, dtype=torch.float64)
        high = objective(logprob.detach() + step, entropy.detach(), s).loss_T
        low = objective(logprob.detach() - step, entropy.detach(), s).loss_T
        slope = (s.weight_T * (high - low)).sum() / 2
        assert abs(slope - (s.weight_T * terms.dlogprob_T * step).sum()) < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", [3, 10, 11, 13, 14])
def test_one_pass_equals_autograd(form, index):
    objective = OBJECTIVES[index]
    if form == "odds" and objective.entropy_gradient:
        pytest.skip("no gradient through the entropy")
    hidden, weight, target = inputs(34, 17, 40)
    logprob, _ = reference.linear_logprob(hidden, weight, target)
    s = streams_for(logprob)
    if isinstance(objective, SequenceClip):
        s = s._replace(weight_T=torch.ones_like(logprob), advantage_T=s.sequence_T - 0.5)
    else:
        s.weight_T[[4, 9]] = 0
        s.advantage_T[4] = float("nan")
    target[7], s.weight_T[7] = IGNORE, 0
    kwargs = {"temperature": 1.3}
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    live = s.weight_T != 0
    # where() inside autograd would still multiply the NaN by 0
    clean = s._replace(advantage_T=torch.where(s.advantage_T.isnan(), 0, s.advantage_T))
    wide = Streams(*(x.double() if x.is_floating_point() else x for x in clean))

    def loss(logprob, entropy):
        return (wide.weight_T * plain(objective, logprob, entropy, wide))[live].sum()

    truth = reference.linear_objective(h, w, target, loss, **kwargs)
    want = torch.autograd.grad(truth * -1.5, (h, w))
    results = []
    for chunk_bytes in (10**9, 7_000):
        h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_objective(
            h2, w2, target, objective, s, chunk_bytes=chunk_bytes, **kwargs, **options(form)
        )
        upstream = torch.tensor(-1.5, device=DEVICE)
        grads = torch.autograd.grad(out.loss, (h2, w2), upstream, retain_graph=True)
        again = torch.autograd.grad(out.loss, (h2, w2), upstream)
        assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
        torch.testing.assert_close(out.loss.double(), truth, atol=3e-5, rtol=3e-6)
        for x, y in zip(grads, want, strict=True):
            torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=3e-5)
        results.append(out)
        with torch.no_grad():
            quiet = linear_objective(
                hidden, weight, target, objective, s, chunk_bytes=chunk_bytes, **kwargs,
                **options(form),
            )  # fmt: skip
        torch.testing.assert_close(quiet.loss, out.loss.detach())
        torch.testing.assert_close(quiet.logprob_T, out.logprob_T)
    assert (results[0].logprob_T[~live] == 0).all()
    torch.testing.assert_close(results[0].logprob_T, results[1].logprob_T)


@pytest.mark.parametrize("form", FORMS)
def test_spans_equal_weights_and_main_gradient(form):
    hidden, weight, target = inputs(40, 17, 40)
    weights = torch.zeros(40)
    weights[3:9], weights[30:40] = 1, 1
    for spans, given in (([(3, 9), (30, 40)], weights), (weights * 0.37, weights * 0.37)):
        h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
        truth = reference.span_cross_entropy(h, w, target, given.to(DEVICE).double())
        want = torch.autograd.grad(truth, (h, w))
        h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = span_cross_entropy(h2, w2, target, spans, **options(form))
        got = torch.autograd.grad(loss, (h2, w2))
        main = torch.full_like(weight, 2.0)
        h3, w3 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        kwargs = {"main_grad_VD": main, "chunk_bytes": 3_000, **options(form)}
        span_cross_entropy(h3, w3, target, spans, **kwargs).backward()
        assert w3.grad is None
        pairs = [(loss, truth), *zip(got, want, strict=True), (h3.grad, want[0])]
        for x, y in [*pairs, (main - 2, want[1])]:
            torch.testing.assert_close(x.double(), y.detach(), atol=2e-5, rtol=1e-5)
        assert (got[0][10:29] == 0).all()


@pytest.mark.skipif(not INTERPRETED, reason="on CUDA the check is a device-side assertion")
def test_main_gradient_refuses_a_scaled_backward_and_spans_are_checked():
    hidden, weight, target = inputs(8, 8, 9)
    main = torch.zeros_like(weight)
    loss = span_cross_entropy(hidden.requires_grad_(), weight, target, [(1, 3)], main_grad_VD=main)
    with pytest.raises(ValueError, match="gradient 1"):
        (loss * 0.5).backward()
    for spans in ([(1, 9)], [(1, 4), (3, 5)], [(4, 2)]):
        with pytest.raises(ValueError, match="spans"):
            span_cross_entropy(hidden, weight, target, spans)
    with pytest.raises(ValueError, match=r"streams\.advantage_T"):
        linear_objective(hidden, weight, target, PolicyClip(), Streams(torch.ones(8)))
    nothing = span_cross_entropy(hidden, weight.requires_grad_(), target, [])
    nothing.backward()
    assert nothing == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_loss_never_reach_a_product(form, monkeypatch):
    from intfast.kernels import head

    seen = []
    real = head.forward

    def watched(inputs, start, end, keep):
        chunk = real(inputs, start, end, keep)
        seen.append(len(chunk.hidden_CD))
        return chunk

    monkeypatch.setattr(head, "forward", watched)
    hidden, weight, target = inputs(64, 8, 9)
    span_cross_entropy(hidden.requires_grad_(), weight, target, [(5, 8)], **options(form))
    assert seen == [3]


def test_chunks_keep_to_the_byte_budget():
    hidden, weight, target = inputs(1000, 4, 300)
    for budget in (1, 5_000, 240_000, 10**7):
        plan = plan_head(hidden, weight, target, Head(chunk_bytes=budget, impl="reference"))
        assert plan.chunk_rows * 300 * 8 <= budget or plan.chunk_rows == 1
        chunks = plan.chunks(1000)
        assert chunks[0][0] == 0 and chunks[-1][1] == 1000
        assert all(a[1] == b[0] for a, b in pairwise(chunks))


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


def test_compiles_without_graph_breaks_and_with_fake_tensors():
    hidden, weight, target = inputs(12, 8, 9)
    s = Streams(torch.ones(12, device=DEVICE), torch.linspace(-1, 1, 12, device=DEVICE))

    def step(h, w):
        return linear_objective(h, w, target, PolicyClip(), s, impl="reference").loss

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want = torch.autograd.grad(step(h, w), (h, w))
    got = torch.autograd.grad(
        torch.compile(step, fullgraph=True, backend="aot_eager")(h, w), (h, w)
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
