"""What every op promises beside its values: whole outputs, untouched inputs, the same bits twice,
and offsets in 64 bits."""

import ast
import re
from pathlib import Path

import pytest
import torch
from kernels_common import DEVICE, HAS_TRITON, PATHS, assert_within, inputs

from intfast.kernels import truth as definition
from intfast.kernels.group_advantages import TokenLayout, group_advantages
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import EntropyBonus, Kl, PolicyClip, SequenceClip, Streams, Sum
from intfast.kernels.span_cross_entropy import span_cross_entropy

KERNELS = Path(__file__).parents[1] / "kernels"
T = 12


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def streams(logprob_T):
    made = torch.Generator().manual_seed(5)
    noise = [torch.randn(T, generator=made).to(DEVICE) for _ in range(3)]
    weight_T = noise[0].abs() + 0.1
    weight_T[[2, 10]] = 0
    sequence_T = torch.arange(T, device=DEVICE) * 3 // T
    return Streams(weight_T, noise[1], logprob_T + 0.2 * noise[2], logprob_T, None, sequence_T)


def clip(path):
    return Sum((PolicyClip(), Kl(0.1), *([] if path == "odds" else [EntropyBonus(0.1)])))


# op -> (differentiable result) from (hidden, weight, target, streams, path, options)
CALLS = {
    "logprob": lambda h, w, t, s, f, o: linear_logprob(h, w, t, **o)[0],
    "entropy": lambda h, w, t, s, f, o: linear_logprob(h, w, t, entropy="gradient", **o)[1],
    "objective": lambda h, w, t, s, f, o: linear_objective(h, w, t, clip(f), s, **o).loss,
    "sequences": lambda h, w, t, s, f, o: (
        linear_objective(h, w, t, SequenceClip(3, 0.1, 0.1), s, **o).loss
    ),
    "spans": lambda h, w, t, s, f, o: span_cross_entropy(h, w, t, [(1, 4), (9, 12)], **o),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_outputs_whole_inputs_untouched_and_the_same_twice(op, main, path):
    if op == "entropy" and path == "odds":
        pytest.skip("no gradient through the entropy")
    hidden, weight, target = inputs(T, 18, 40)
    held_streams = streams(definition.linear_logprob(hidden, weight, target)[0])
    pair = hidden.requires_grad_(), weight.requires_grad_()
    held = [*pair, target, *(s for s in held_streams if s is not None)]
    before = [x.detach().clone() for x in held]
    runs = []
    for chunk_bytes in (10**9, 10**9, 2_500, 2_500):
        buffer = torch.ones(weight.shape, device=DEVICE) if main else None
        extra = {"chunk_bytes": chunk_bytes, "main_grad_VD": buffer, "path": path}
        made = CALLS[op](*pair, target, held_streams, path, extra)
        upstream = torch.ones_like(made)
        given = upstream.clone()
        # retained: what the graph holds must serve twice, except where it was added to a buffer
        grads = torch.autograd.grad(made, pair[:1] if main else pair, upstream, retain_graph=True)
        assert torch.equal(upstream, given)
        runs.append([made.detach(), *grads, *([buffer] if main else [])])
        if not main:
            again = torch.autograd.grad(made, pair, upstream)
            assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
    for run in runs:
        assert all(torch.isfinite(x).all() for x in run)
    for first, second in (runs[:2], runs[2:]):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("path", ["plain", *(["triton"] if HAS_TRITON else [])])
def test_group_advantages_leave_nothing_unwritten(path):
    rewards = torch.tensor([1.0, 0.0, float("nan"), 0.5, 0.5, float("nan")], device=DEVICE)
    offsets = torch.tensor([0, 3, 3, 5, 6], device=DEVICE)
    starts = torch.tensor([0, 2, 4, 5, 9, 9, 11], device=DEVICE)
    weight = torch.linspace(0, 1, 11, device=DEVICE)
    held = (rewards, offsets, starts, weight)
    before = [x.clone() for x in held]
    runs = [
        group_advantages(rewards, offsets, TokenLayout(starts, weight), path=path) for _ in range(2)
    ]
    for value, again in zip(*(run[:3] for run in runs), strict=True):
        assert torch.isfinite(value).all() and torch.equal(value, again)
    for x, y in zip(held, before, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    assert [int(c) for c in runs[0].counts] == [0, 1, 1, 4, 7]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("into_grad", [True, False])
def test_main_gradient_of_tied_embeddings(path, into_grad):
    """One parameter is both ends of the model: the head adds to the buffer, the embedding after."""
    _, weight, target = inputs(T, 16, 40)
    ids = (target + 3) % 40

    def loss_of(tied, head):
        return head(torch.tanh(tied[ids]), tied)

    def plain(leaf):
        loss = loss_of(leaf, lambda h, w: -definition.linear_logprob(h, w, target)[0].sum())
        return torch.autograd.grad(loss, leaf)[0]

    want = plain(weight.double().requires_grad_())
    eager = plain(weight.clone().requires_grad_())

    tied = weight.clone().requires_grad_()
    buffer = torch.ones_like(weight)
    if into_grad:
        tied.grad = buffer
    everything = {"main_grad_VD": buffer, "chunk_bytes": 2_000, "path": path}
    for _ in range(2):  # two micro-batches
        loss_of(
            tied, lambda h, w: span_cross_entropy(h, w, target, [(0, T)], **everything)
        ).backward()
    got = buffer if into_grad else buffer + tied.grad
    assert tied.grad is buffer or not into_grad
    assert_within(got.double() - 1, 2 * eager, 2 * want, 2e-6)


# Offsets in 64 bits -----------------------------------------------------------------------------
#
# In a jit function, a product of two runtime values (a row and a stride, a tile and a count) that
# enters an address must have a 64-bit factor. A factor is 64-bit where it is cast, or a name that
# was assigned such a value, or a parameter that every caller in the file gives such a value.


def jit_functions(source):
    for node in ast.parse(source).body:
        decorated = isinstance(node, ast.FunctionDef) and node.decorator_list
        if decorated and "jit" in ast.unparse(node.decorator_list[0]):
            yield node


def wide_names(function, calls):
    names = set()
    for index, argument in enumerate(function.args.args):
        given = [call.args[index] for call, _ in calls if index < len(call.args)]
        callers = [known for _, known in calls]
        if given and all(is_wide(g, known) for g, known in zip(given, callers, strict=True)):
            names.add(argument.arg)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_wide(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def is_wide(node, names):
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "to" and ast.unparse(node.args[0]) == "tl.int64"
    if isinstance(node, ast.Subscript):
        return is_wide(node.value, names)
    if isinstance(node, ast.BinOp):
        return is_wide(node.left, names) or is_wide(node.right, names)
    return False


def is_runtime(node):
    """Whether a factor is known at run time only: constants and tile sizes are small."""
    named = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return bool({name for name in named if not name.isupper() or len(name) == 1} - {"tl"})


def narrow_offsets(source):
    """(line, text) of every product of two runtime values that feeds an address in 32 bits."""
    functions = list(jit_functions(source))
    known = {f.name: wide_names(f, []) for f in functions}
    for _ in range(2):  # helpers of helpers
        for f in functions:
            calls = [
                (node, known[caller.name])
                for caller in functions
                for node in ast.walk(caller)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == f.name
            ]
            known[f.name] = wide_names(f, calls)
    found = []
    for function in functions:
        pointers = {a.arg for a in function.args.args if a.arg.endswith("_ptr")}
        for node in ast.walk(function):
            loaded = "tl.load" in ast.unparse(node)
            if isinstance(node, ast.Assign) and names_in(node.value) & pointers and not loaded:
                pointers |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                if not names_in(node) & pointers:
                    continue
                for part in ast.walk(node):
                    product = isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult)
                    if not product or is_wide(part, known[function.name]):
                        continue
                    if is_runtime(part.left) and is_runtime(part.right):
                        found.append((part.lineno, ast.unparse(part)))
    return sorted(set(found))


def names_in(node):
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


SOURCES = sorted(p for p in KERNELS.rglob("*.py") if any(jit_functions(p.read_text())))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_offsets_are_products_of_64_bits(path):
    assert narrow_offsets(path.read_text()) == []


def test_the_check_of_offsets_finds_every_missing_cast():
    found = 0
    for path in SOURCES:
        source = path.read_text()
        # what casts without a stride are counts
        casts = [
            m.start() for m in re.finditer(r"\.to\(tl\.int64\)", source) if "stride_" in source
        ]
        for at in casts:
            changed = source[:at] + source[at + len(".to(tl.int64)") :]
            assert narrow_offsets(changed), f"{path.name}: line {source.count(chr(10), 0, at) + 1}"
        found += len(casts)
    assert found >= 20
