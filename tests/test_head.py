"""The head against NumPy fp64 and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from intfast.head import head_logprob

D, V = 7, 13


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def numpy_logprobs(hidden, weight, temperature=1.0):
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T / temperature
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
def test_head_equals_numpy_and_its_gradient(rows_per_chunk, temperature):
    hidden = random(11, D, seed=1).requires_grad_()
    weight = random(V, D, seed=2).requires_grad_()
    target = torch.arange(11) % V
    bytes_ = rows_per_chunk * V * 8
    logprob, entropy = head_logprob(hidden, weight, target, temperature, True, bytes_)
    truth = numpy_logprobs(hidden.detach(), weight.detach(), temperature)
    np.testing.assert_allclose(logprob.detach(), truth[np.arange(11), target], atol=1e-13)
    np.testing.assert_allclose(entropy.detach(), -(np.exp(truth) * truth).sum(1), atol=1e-13)

    def both(h, w):
        return head_logprob(h, w, target, temperature, True, bytes_)

    assert gradcheck(both, (hidden, weight))
    assert gradcheck(lambda h: both(h, weight.detach())[1], (hidden,))
    assert gradcheck(lambda w: both(hidden.detach(), w)[0], (weight,))


def test_head_in_bf16_has_the_error_of_its_inputs_only():
    hidden = random(33, 64, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = random(50, 64, seed=2, dtype=torch.bfloat16).requires_grad_()
    target = torch.arange(33) % 50
    logprob, entropy = head_logprob(hidden, weight, target, 1.0, True, 4 * 50 * 8)
    assert logprob.dtype == entropy.dtype == torch.float32
    truth = numpy_logprobs(hidden.detach().double(), weight.detach().double())
    np.testing.assert_allclose(
        logprob.detach().numpy(), truth[np.arange(33), target], atol=1e-5, rtol=1e-6
    )
    (logprob.sum() + entropy.sum()).backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = head_logprob(*wide, target, 1.0, True)
    (exact[0].sum() + exact[1].sum()).backward()
    for narrow, reference in zip((hidden, weight), wide, strict=True):
        assert narrow.grad.dtype == torch.bfloat16
        error = (narrow.grad.double() - reference.grad).abs().max()
        assert error < 2**-7 * reference.grad.abs().max()


def test_head_leaves_incoming_gradient_and_frozen_weight_alone():
    hidden, weight = random(5, D).requires_grad_(), random(V, D, seed=1)
    logprob, _ = head_logprob(hidden, weight, torch.arange(5), 1.0, False)
    incoming = random(5, seed=3)
    kept = incoming.clone()
    logprob.backward(incoming)
    assert torch.equal(incoming, kept)
    assert weight.grad is None


def test_head_takes_views_and_no_rows():
    hidden = random(D, 5).T
    weight = random(V, 2 * D, seed=1)[:, ::2]
    target = torch.arange(5)
    logprob, _ = head_logprob(hidden, weight, target)
    truth = numpy_logprobs(hidden, weight)
    np.testing.assert_allclose(logprob, truth[np.arange(5), target], atol=1e-13)
    none, _ = head_logprob(hidden[:0], weight, target[:0])
    assert none.shape == (0,)


def test_head_refuses_misfits():
    with pytest.raises(ValueError, match="cast or compact them alike"):
        head_logprob(random(3, D), random(V, D).float(), torch.arange(3))
    with pytest.raises(ValueError, match="cast or compact them alike"):
        head_logprob(random(3, D), random(V, D), torch.arange(4))
    with pytest.raises(ValueError, match="expected a number > 0"):
        head_logprob(random(3, D), random(V, D), torch.arange(3), 0.0)
