from itertools import pairwise

import pytest
import torch
from kernels_common import DEVICE, FORMS, INTERPRETED, inputs, options
from objective_cases import OBJECTIVES, plain, streams_for

from intfast.kernels import reference
from intfast.kernels.launch import IGNORE, Head, plan_head
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import PolicyClip, SequenceClip, Streams
from intfast.kernels.span_cross_entropy import span_cross_entropy


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
