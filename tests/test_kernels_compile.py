"""The ops as torch.library sees them: schemas, fake tensors, torch.compile."""

import itertools
import shutil

import pytest
import torch
from kernels_common import HAS_TRITON, INTERPRETED, PATHS, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from intfast.kernels import group_advantages as groups
from intfast.kernels.group_advantages import TokenLayout, group_advantages
from intfast.kernels.head import chunks
from intfast.kernels.head.plan import Head, plan_head
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import PolicyClip, Streams
from intfast.kernels.span_cross_entropy import span_cross_entropy

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tests/test_kernels_gpu.py has the device")
GROUP_PATHS = ["plain", *(["triton"] if HAS_TRITON else [])]


def chunk_arguments(path, entropy="value", keep=True):
    hidden, weight, target = inputs(5, 8, 40)
    plan = plan_head(hidden, weight, target, Head(path=path, entropy=entropy, temperature=0.8))
    return hidden, weight, target, plan.recipe, keep


@pytest.mark.parametrize("path", PATHS)
def test_operators_keep_their_schemas(path):
    for keep, entropy in itertools.product((True, False), ("none", "value")):
        torch.library.opcheck(chunks._chunk, chunk_arguments(path, entropy, keep))
    arguments = chunk_arguments(path)
    hidden, weight, target = arguments[:3]
    *_, stats, kept = chunks._run_chunk(*arguments)
    main = torch.ones_like(weight)
    for weight_grad, need_hidden in ((None, True), (main, True), (main, False)):
        slope = torch.linspace(-1, 1, 5)
        torch.library.opcheck(
            chunks._chunk_gradient,
            (kept.clone(), stats, slope, None, hidden, weight, target, weight_grad, arguments[3],
             need_hidden, False),
        )  # fmt: skip


@pytest.mark.parametrize("path", GROUP_PATHS)
def test_group_advantages_keep_their_schema(path):
    rewards = torch.tensor([1.0, 0.0, float("nan"), 0.5, 0.5])
    layout = torch.tensor([0, 2, 4, 5, 9, 9]), torch.ones(9)
    for tokens in (layout, (None, None)):
        torch.library.opcheck(
            groups._group_advantages,
            (rewards, torch.tensor([0, 3, 5]), *tokens, "mean", "group", 1e-4, 0.5, path),
        )


T = 12
ROWS = torch.tensor([1, 2, 5, 9])


def logprob_step(hidden, weight, target, **kwargs):
    return linear_logprob(hidden, weight, target, **kwargs)[0].square().sum()


def objective_step(hidden, weight, target, **kwargs):
    s = Streams(torch.linspace(0.1, 1, T), torch.linspace(-1, 1, T))
    return linear_objective(hidden, weight, target, PolicyClip(), s, **kwargs).loss


def span_step(hidden, weight, target, **kwargs):
    kwargs.setdefault("rows_R", ROWS)
    return span_cross_entropy(hidden, weight, target, torch.ones(T), **kwargs)


STEPS = [logprob_step, objective_step, span_step]


def outcome(step, target, **kwargs):
    """(value, gradients, main gradient) of a step from fresh leaves."""
    hidden, weight, _ = inputs(T, 8, 40)
    pair = hidden.requires_grad_(), weight.requires_grad_()
    main = kwargs.pop("main", None)
    if main is not None:
        kwargs["main_grad_VD"] = main = torch.full_like(weight.detach(), main)
    value = step(*pair, target, **kwargs)
    value.backward()
    return [x for x in (value.detach(), hidden.grad, weight.grad, main) if x is not None]


@pytest.mark.parametrize("main", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [10**9, 5 * 40 * 8])
@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.__name__)
def test_compiles_whole_and_gives_the_same(step, chunk_bytes, main):
    target = inputs(T, 8, 40)[2]
    kwargs = {"path": "plain", "chunk_bytes": chunk_bytes, "main": main}
    want = outcome(step, target, **kwargs)
    torch._dynamo.reset()
    got = outcome(torch.compile(step, fullgraph=True, backend="aot_eager"), target, **kwargs)
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor_and_with_autocast():
    target = inputs(T, 8, 40)[2]
    want = outcome(logprob_step, target, path="plain")
    torch._dynamo.reset()
    step = torch.compile(logprob_step, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = outcome(step, target, path="plain")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.skipif("odds" not in PATHS, reason="needs triton")
@pytest.mark.parametrize("path", ["odds", "rows"])
def test_triton_paths_compile_around_the_operators(path):
    target = inputs(T, 8, 40)[2]
    want = outcome(objective_step, target, path=path)
    torch._dynamo.reset()
    step = torch.compile(objective_step, fullgraph=True, backend="aot_eager")
    for x, y in zip(outcome(step, target, path=path), want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("step", [logprob_step, objective_step], ids=lambda s: s.__name__)
def test_fake_tensors_of_a_model_cost_no_memory(step):
    with FakeTensorMode():
        hidden = torch.empty(T, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(151_936, 4096, dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(T, dtype=torch.int64)
        loss = step(hidden, weight, target, path="plain")
        grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and loss.dtype == torch.float32
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (hidden, weight)]


@pytest.mark.parametrize("path", GROUP_PATHS)
def test_group_advantages_compile(path):
    rewards = torch.tensor([1.0, 0.0, float("nan"), 0.5, 0.5])
    layout = TokenLayout(torch.tensor([0, 2, 4, 5, 9, 9]), torch.ones(9))

    def call(rewards, offsets, weight):
        found = group_advantages(rewards, offsets, layout._replace(weight_T=weight), path=path)
        return found.advantage_T * found.weight_T / found.counts.active_tokens

    arguments = rewards, torch.tensor([0, 3, 5]), layout.weight_T
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, call(*arguments))
