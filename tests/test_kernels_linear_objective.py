from itertools import pairwise

import pytest
import torch
from kernels_common import DEVICE, LOGPROB_BUDGET, PATHS, assert_within, inputs
from objective_cases import OBJECTIVES, plain, streams_for

from intfast.kernels import truth as definition
from intfast.kernels.head.plan import IGNORE, Head, plan_head
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import EntropyBonus, PolicyClip, SequenceClip, Streams, Sum


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [3, 10, 11, 13, 14])
def test_one_pass_equals_autograd(path, index):
    objective = OBJECTIVES[index]
    if path == "odds" and objective.entropy_gradient:
        pytest.skip("no gradient through the entropy")
    hidden, weight, target = inputs(34, 17, 40)
    logprob, _ = definition.linear_logprob(hidden, weight, target)
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

    seen = []

    def loss(logprob, entropy):
        seen.append((logprob, entropy))
        like = Streams(*(x.to(logprob) if x.is_floating_point() else x for x in clean))
        return (like.weight_T * plain(objective, logprob, entropy, like))[live].sum()

    truth = definition.linear_objective(h, w, target, loss, **kwargs)
    want = torch.autograd.grad(truth * -1.5, (h, w), retain_graph=True)
    # What the loss may be off when each log-prob and entropy is off by what it is promised to be.
    slopes = torch.autograd.grad(truth, seen[0], allow_unused=True)
    budget = LOGPROB_BUDGET * sum(slope.abs().sum() for slope in slopes if slope is not None)
    pair = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    plainly = definition.linear_objective(*pair, target, loss, **kwargs)
    eager = torch.autograd.grad(plainly * -1.5, pair)
    results = []
    for chunk_bytes in (10**9, 7_000):
        h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_objective(
            h2, w2, target, objective, s, chunk_bytes=chunk_bytes, **kwargs, path=path
        )
        upstream = torch.tensor(-1.5, device=DEVICE)
        grads = torch.autograd.grad(out.loss, (h2, w2), upstream, retain_graph=True)
        again = torch.autograd.grad(out.loss, (h2, w2), upstream)
        assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
        assert (out.loss.double() - truth).abs() <= budget
        for x, in_fp32, y in zip(grads, eager, want, strict=True):
            assert_within(x, in_fp32, y, 2e-6)
        results.append(out)
        with torch.no_grad():
            quiet = linear_objective(
                hidden, weight, target, objective, s, chunk_bytes=chunk_bytes, **kwargs,
                path=path,
            )  # fmt: skip
        torch.testing.assert_close(quiet.loss, out.loss.detach())
        torch.testing.assert_close(quiet.logprob_T, out.logprob_T)
    assert (results[0].logprob_T[~live] == 0).all()
    torch.testing.assert_close(results[0].logprob_T, results[1].logprob_T)


def test_chunks_keep_to_the_byte_budget():
    hidden, weight, target = inputs(1000, 4, 300)
    for budget in (1, 5_000, 240_000, 10**7):
        plan = plan_head(hidden, weight, target, Head(chunk_bytes=budget, path="plain"))
        assert plan.chunk_rows * 300 * 8 <= budget or plan.chunk_rows == 1
        chunks = plan.chunks(1000)
        assert chunks[0][0] == 0 and chunks[-1][1] == 1000
        assert all(a[1] == b[0] for a, b in pairwise(chunks))


def test_a_missing_stream_is_named():
    hidden, weight, target = inputs(8, 8, 9)
    with pytest.raises(ValueError, match=r"streams\.advantage_T"):
        linear_objective(
            hidden, weight, target, PolicyClip(), Streams(torch.ones(8, device=DEVICE))
        )


@pytest.mark.parametrize("objective", [PolicyClip(), Sum((PolicyClip(), EntropyBonus(0.1)))])
def test_a_stream_wider_than_the_log_probs_is_refused_by_name(objective):
    hidden, weight, target = inputs(8, 8, 9)
    ones = torch.ones(8, device=DEVICE)
    for name in ("weight_T", "advantage_T", "old_T"):
        values = {"weight_T": ones, "advantage_T": ones, "old_T": -ones}
        values[name] = values[name].double()
        message = rf"streams\.{name}: expected \(8,\) torch.float32.*got \(8,\) torch.float64"
        with pytest.raises(ValueError, match=message):
            linear_objective(hidden, weight, target, objective, Streams(**values))
    narrow = Streams(ones.bfloat16(), ones.half(), -ones.bfloat16())
    assert linear_objective(hidden, weight, target, objective, narrow).loss.dtype == torch.float32


def test_hidden_states_with_a_batch_axis_are_blamed_for_it():
    hidden, weight, target = inputs(8, 8, 9)
    with pytest.raises(ValueError, match=r"expected hidden \(T, D\).*got \(2, 4, 8\).*flatten"):
        linear_objective(
            hidden.view(2, 4, 8), weight, target, PolicyClip(), Streams(torch.ones(8).to(DEVICE))
        )
