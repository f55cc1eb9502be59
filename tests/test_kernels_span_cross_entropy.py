import pytest
import torch
from kernels_common import (
    DEVICE,
    INTERPRETED,
    LOGPROB_BUDGET,
    PATHS,
    assert_within,
    inputs,
)

from intfast.kernels import truth as definition
from intfast.kernels.head import chunks
from intfast.kernels.span_cross_entropy import span_cross_entropy


@pytest.mark.parametrize("path", PATHS)
def test_spans_equal_weights_and_main_gradient(path):
    hidden, weight, target = inputs(40, 17, 40)
    weights = torch.zeros(40)
    weights[3:9], weights[30:40] = 1, 1
    for spans, given in (([(3, 9), (30, 40)], weights), (weights * 0.37, weights * 0.37)):
        h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
        truth = definition.span_cross_entropy(h, w, target, given.to(DEVICE).double())
        want = torch.autograd.grad(truth, (h, w))
        pair = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        plain = definition.span_cross_entropy(*pair, target, given.to(DEVICE))
        eager = torch.autograd.grad(plain, pair)
        h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = span_cross_entropy(h2, w2, target, spans, path=path)
        got = torch.autograd.grad(loss, (h2, w2))
        main = torch.full_like(weight, 2.0)
        h3, w3 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        kwargs = {"main_grad_VD": main, "chunk_bytes": 3_000, "path": path}
        span_cross_entropy(h3, w3, target, spans, **kwargs).backward()
        assert w3.grad is None
        assert (loss.double() - truth).abs() <= LOGPROB_BUDGET * given.sum()
        for x, i in [(got[0], 0), (got[1], 1), (h3.grad, 0), (main - 2, 1)]:
            assert_within(x, eager[i], want[i], 2e-6)
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
    nothing = span_cross_entropy(hidden, weight.requires_grad_(), target, [])
    nothing.backward()
    assert nothing == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_loss_never_reach_a_product(path, monkeypatch):

    seen = []
    real = chunks.forward

    def watched(inputs, start, end, keep):
        chunk = real(inputs, start, end, keep)
        seen.append(len(chunk.hidden_CD))
        return chunk

    monkeypatch.setattr(chunks, "forward", watched)
    hidden, weight, target = inputs(64, 8, 9)
    span_cross_entropy(hidden.requires_grad_(), weight, target, [(5, 8)], path=path)
    assert seen == [3]
