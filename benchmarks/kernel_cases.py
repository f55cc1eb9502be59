"""What the kernel benchmark runs, a record per op: shapes, inputs, steps, peers and the truth.

`python -m benchmarks kernels [OP]` and `pytest benchmarks --benchmark-only -k OP` both run `OPS`.

A step returns a tuple that starts with what the gate compares: a head step (loss, gradient of the
hidden states, gradient of the weight), a log-prob step (logprob_N,), an advantage step
(advantage_T,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import costs, layer_cases, peers, update_cases
from benchmarks.timing import Step
from intfast.kernels import truth as definition
from intfast.kernels.group_advantages import TokenLayout, group_advantages
from intfast.kernels.head.plan import IGNORE
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import PolicyClip, Streams
from intfast.kernels.span_cross_entropy import span_cross_entropy

SHARES = (0.10, 0.05, 0.02)
TRUTH_ROWS = 1024
GROUP, SAMPLE_TOKENS = 8, 128


@dataclass(frozen=True)
class Case:
    """One op on one shape; `share` of the rows carry loss. Advantages have samples for rows.

    A layer's ops have no vocabulary; `hidden` is the width of a row, or of a head for norm_rope.
    """

    op: str
    rows: int
    hidden: int
    vocabulary: int
    share: float = 1.0

    @property
    def live(self) -> int:
        """Rows that carry loss."""
        return max(1, round(self.rows * self.share))

    @property
    def label(self) -> str:
        """Short and without spaces, for the names of pytest-benchmark."""
        sizes = [size for size in (self.rows, self.hidden, self.vocabulary) if size]
        share = f"-{100 * self.share:g}%" if self.share < 1 else ""
        return f"{self.op}-{'x'.join(map(str, sizes))}{share}"


Shape = tuple[int, int, int, float]
"""The fields of a `Case` after its op."""


@dataclass(frozen=True)
class Op:
    """All that the benchmark knows of one op."""

    shapes: Callable[[str], list[Shape]]
    """"small" or "full" -> shapes in the order in which a budget should be spent."""
    cost: Callable[[Case, int], costs.Cost]
    """The cost card; the number is `costs.FRESH` or `costs.ADDED`."""
    inputs: Callable[[Case, str, int], Any]
    """(case, device, seed) -> what the steps below read."""
    truth: Callable[[Case, Any], tuple[Tensor, ...]]
    """What a step should return, in fp64."""
    ours: Callable[[Case, Any, bool], Step]
    """(case, inputs, whether the weight's gradient is added to an fp32 buffer) -> step."""
    theirs: Callable[[peers.Peer, Case, bool, Any, bool], Step]
    """(peer, case, whether on rows that were indexed beforehand, then as `ours`) -> step."""
    peers: tuple[peers.Peer, ...]
    has_gradient: bool = True
    """Of a head's weight, which may be added to a buffer; a layer's ops always have theirs."""


class Variant(NamedTuple):
    """One way to compute a case."""

    name: str
    build: Callable[[Any, bool], Step]
    """(inputs, main) -> step."""
    ours: bool = False


def cases(ops: list[str], size: str) -> list[Case]:
    """The cases of some ops, shape by shape."""
    shapes = {name: OPS[name].shapes(size) for name in ops}
    every = dict.fromkeys(shape for found in shapes.values() for shape in found)
    return [Case(name, *shape) for shape in every for name in ops if shape in shapes[name]]


def variants(case: Case, asked: tuple[peers.Peer, ...]) -> list[Variant]:
    """Ours and the peers'; with loss on a share of the rows, peers run on all and on those."""
    op = OPS[case.op]
    found = [Variant("intfast", functools.partial(op.ours, case), ours=True)]
    modes = ("all rows", "indexed") if case.share < 1 else ("",)
    for peer in asked:
        for mode in modes:
            # Liger's policy loss wants whole sequences.
            if (peer.name, mode) == ("Liger GRPO", "indexed"):
                continue
            build = functools.partial(op.theirs, peer, case, mode == "indexed")
            found.append(Variant(f"{peer.name} {mode}".strip(), build))
    return found


# The loss head ----------------------------------------------------------------------------------


def _heads(size: str) -> list[Shape]:
    if size == "small":
        return [(256, 64, 1000, share) for share in (1.0, *SHARES)]
    # The reference model first, its sparse cases, then the other shapes.
    heads = [(4096, 2560, 151_936, 1.0)]
    heads += [(16_384, 2560, 151_936, share) for share in (1.0, 0.05, 0.10, 0.02)]
    heads += [(4096, 4096, 128_256, 1.0), (16_384, 4096, 128_256, 1.0)]
    widths = [(h, v) for v in (151_936, 128_256, 32_000) for h in (2560, 4096, 2048)]
    heads += [(n, h, v, 1.0) for n in (4096, 16_384, 65_536) for h, v in widths]
    heads += [(65_536, 2560, 151_936, share) for share in SHARES]
    return list(dict.fromkeys(heads))


def _dense_heads(size: str) -> list[Shape]:
    return [shape for shape in _heads(size) if shape[3] == 1.0]


def _head_cost(case: Case, dw: int, products: int = 3) -> costs.Cost:
    return costs.head_step(case.live, case.hidden, case.vocabulary, products=products, dw=dw)


def _logprob_cost(case: Case, dw: int) -> costs.Cost:
    return costs.head_forward(case.live, case.hidden, case.vocabulary)


class Data(NamedTuple):
    """Inputs of the head ops; nothing here is changed by a step but `main_VD`."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    """IGNORE where a row carries no loss."""
    rows_R: Tensor
    weight_N: Tensor
    advantage_N: Tensor
    old_N: Tensor
    main_VD: Tensor


def make_data(case: Case, device: str, seed: int) -> Data:
    """Random inputs of order one; some targets likely, bf16 on a GPU and fp32 on a CPU."""
    made = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    rows, hidden, vocabulary = case.rows, case.hidden, case.vocabulary

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device=device)

    weight_VD = randn(vocabulary, hidden).to(dtype)
    target_N = torch.randint(vocabulary, (rows,), generator=made, device=device)
    hidden_ND = 2 * randn(rows, hidden) / hidden**0.5
    hidden_ND += 12 * randn(rows, 1).abs() * weight_VD[target_N] / hidden
    order = torch.randperm(rows, generator=made, device=device)
    rows_R = order[: case.live].sort().values
    weight_N = torch.zeros(rows, device=device)
    weight_N[rows_R] = 1.0
    target_N = torch.where(weight_N != 0, target_N, IGNORE)
    hidden_ND, weight_VD = hidden_ND.to(dtype).requires_grad_(), weight_VD.requires_grad_()
    with torch.no_grad():
        old_N, _ = linear_logprob(hidden_ND, weight_VD, target_N, entropy="none")
    return Data(
        hidden_ND, weight_VD, target_N, rows_R, weight_N,
        # One advantage per sequence of 1,024 tokens, as in a padded batch.
        randn(-(-rows // 1024)).repeat_interleave(1024)[:rows].contiguous(),
        old_N + 0.2 * randn(rows),
        torch.zeros(vocabulary, hidden, device=device),
    )  # fmt: skip


def _span_loss(case: Case, data: Data, **options) -> Tensor:
    # CUDA weights need the index, also where it is all rows.
    return span_cross_entropy(*data[:3], data.weight_N, rows_R=data.rows_R, **options)


def _policy_loss(case: Case, data: Data, **options) -> Tensor:
    objective = PolicyClip(peers.CLIP, peers.CLIP)
    streams = Streams(data.weight_N, data.advantage_N, data.old_N)
    rows_R = data.rows_R if case.share < 1 else None
    return linear_objective(
        *data[:3], objective, streams, entropy="none", rows_R=rows_R, **options
    ).loss


def _logprob_loss(case: Case, data: Data, **options) -> Tensor:
    logprob_N, _ = linear_logprob(*data[:3], entropy="none", **options)
    return -logprob_N.sum()


def _our_step(loss_of: Callable[..., Tensor], case: Case, data: Data, main: bool) -> Step:
    def step() -> tuple[Tensor, ...]:
        loss = loss_of(case, data, main_grad_VD=data.main_VD if main else None)
        if main:
            (hidden_grad,) = torch.autograd.grad(loss, data.hidden_ND)
            return loss.detach(), hidden_grad, data.main_VD
        return loss.detach(), *torch.autograd.grad(loss, (data.hidden_ND, data.weight_VD))

    return step


def _peer_step(peer: peers.Peer, case: Case, indexed: bool, data: Data, main: bool) -> Step:
    call = peer.load()
    streams = (data.advantage_N, data.old_N, data.weight_N)

    def loss() -> Tensor:
        hidden_ND, target_N, extra = data.hidden_ND, data.target_N, streams
        if indexed:
            hidden_ND, target_N = hidden_ND[data.rows_R], target_N[data.rows_R]
            extra = tuple(stream[data.rows_R] for stream in extra)
        if case.op == "linear_objective":
            return call(hidden_ND, data.weight_VD, target_N, *extra)
        value = call(hidden_ND, data.weight_VD, target_N)
        return value if isinstance(value, Tensor) else -value[0].sum()

    def step() -> tuple[Tensor, ...]:
        value = loss()
        hidden_grad, weight_grad = torch.autograd.grad(value, (data.hidden_ND, data.weight_VD))
        if main:
            weight_grad = data.main_VD.add_(weight_grad)
        return value.detach(), hidden_grad, weight_grad

    return step


def _our_logprob(case: Case, data: Data, main: bool) -> Step:
    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return linear_logprob(*data[:3], entropy="value")

    return step


def _peer_logprob(peer: peers.Peer, case: Case, indexed: bool, data: Data, main: bool) -> Step:
    call = peer.load()

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return call(*data[:3])

    return step


def _head_truth(
    loss_of: Callable[[Tensor, Data, slice], Tensor], case: Case, data: Data
) -> tuple[Tensor, ...]:
    # A few rows at a time: fp64 logits of all of them would be gigabytes.
    weight_VD = data.weight_VD.detach().double().requires_grad_()
    loss, hidden_grads = 0.0, []
    weight_grad = torch.zeros_like(weight_VD)
    for rows in _slices(case.rows):
        hidden_CD = data.hidden_ND[rows].detach().double().requires_grad_()
        logprob_C, _ = definition.linear_logprob(hidden_CD, weight_VD, data.target_N[rows])
        part = loss_of(logprob_C, data, rows)
        hidden_grad, weight_part = torch.autograd.grad(part, (hidden_CD, weight_VD))
        loss, weight_grad = loss + part.detach(), weight_grad.add_(weight_part)
        hidden_grads.append(hidden_grad)
    return loss, torch.cat(hidden_grads), weight_grad


def _true_likelihood(logprob_C: Tensor, data: Data, rows: slice) -> Tensor:
    return -(data.weight_N[rows].double() * logprob_C).sum()


def _true_policy(logprob_C: Tensor, data: Data, rows: slice) -> Tensor:
    ratio_C, advantage_C = (logprob_C - data.old_N[rows]).exp(), data.advantage_N[rows].double()
    clipped_C = ratio_C.clamp(1 - peers.CLIP, 1 + peers.CLIP)
    gain_C = torch.minimum(ratio_C * advantage_C, clipped_C * advantage_C)
    return -(data.weight_N[rows].double() * gain_C).sum()


def _logprob_truth(case: Case, data: Data) -> tuple[Tensor, ...]:
    weight_VD = data.weight_VD.detach().double()
    parts = [
        definition.linear_logprob(data.hidden_ND[c].detach().double(), weight_VD, data.target_N[c])
        for c in _slices(case.rows)
    ]
    return (torch.cat([logprob_C for logprob_C, _ in parts]),)


def _slices(rows: int) -> Iterator[slice]:
    return (slice(start, start + TRUTH_ROWS) for start in range(0, rows, TRUTH_ROWS))


# Group advantages -------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Groups of one size, 0/1 rewards, samples of one length."""

    rewards_N: Tensor
    offsets_P1: Tensor
    layout: TokenLayout


def _samples(size: str) -> list[Shape]:
    return [(64 if size == "small" else 512, 0, 0, 1.0)]


def _advantage_cost(case: Case, dw: int) -> costs.Cost:
    return costs.advantages(case.rows, case.rows // GROUP, SAMPLE_TOKENS * case.rows)


def _make_groups(case: Case, device: str, seed: int) -> Groups:
    made = torch.Generator().manual_seed(seed)
    rewards_N = torch.randint(2, (case.rows,), generator=made).float()
    token_offsets_N1 = SAMPLE_TOKENS * torch.arange(case.rows + 1)
    weight_T = torch.ones(SAMPLE_TOKENS * case.rows, device=device)
    return Groups(
        rewards_N.to(device),
        torch.arange(0, case.rows + 1, GROUP).to(device),
        TokenLayout(token_offsets_N1.to(device), weight_T),
    )


def _advantage_truth(case: Case, groups: Groups) -> tuple[Tensor, ...]:
    advantage_N = definition.group_advantages(groups.rewards_N.double(), groups.offsets_P1)
    return (advantage_N.repeat_interleave(SAMPLE_TOKENS),)


def _our_advantages(case: Case, groups: Groups, main: bool) -> Step:
    return lambda: (group_advantages(*groups).advantage_T,)


def _peer_advantages(
    peer: peers.Peer, case: Case, indexed: bool, groups: Groups, main: bool
) -> Step:
    call = peer.load()
    weight_T = groups.layout.weight_T
    return lambda: (call(groups.rewards_N, GROUP, SAMPLE_TOKENS, weight_T),)


def _update_op(name: str) -> Op:
    return Op(
        update_cases.shapes, update_cases.cost, update_cases.inputs, update_cases.truth,
        update_cases.ours, update_cases.theirs, update_cases.PEERS[name], has_gradient=False,
    )  # fmt: skip


def _layer_op(name: str, hidden: int) -> Op:
    return Op(
        layer_cases.shapes(hidden), layer_cases.cost, layer_cases.inputs, layer_cases.truth,
        layer_cases.ours, layer_cases.theirs, layer_cases.PEERS[name], has_gradient=False,
    )  # fmt: skip


OPS = {
    "group_advantages": Op(
        _samples, _advantage_cost, _make_groups, _advantage_truth, _our_advantages,
        _peer_advantages, peers.ADVANTAGES, has_gradient=False,
    ),
    "adamw": _update_op("adamw"),
    "add_gradient": _update_op("add_gradient"),
    "add_rms_norm": _layer_op("add_rms_norm", 2560),
    "norm_rope": _layer_op("norm_rope", 128),
    "swiglu": _layer_op("swiglu", 9728),
    "span_cross_entropy": Op(
        _heads, _head_cost, make_data, functools.partial(_head_truth, _true_likelihood),
        functools.partial(_our_step, _span_loss), _peer_step, peers.CROSS_ENTROPY,
    ),
    "linear_objective": Op(
        _heads, _head_cost, make_data, functools.partial(_head_truth, _true_policy),
        functools.partial(_our_step, _policy_loss), _peer_step, peers.POLICY,
    ),
    "linear_logprob": Op(
        _dense_heads, _logprob_cost, make_data, _logprob_truth,
        _our_logprob, _peer_logprob, peers.LOGPROB, has_gradient=False,
    ),
    # Makes the logits twice, where a loss that is known per token makes them once.
    "linear_logprob_gradient": Op(
        _dense_heads, functools.partial(_head_cost, products=4), make_data,
        functools.partial(_head_truth, _true_likelihood),
        functools.partial(_our_step, _logprob_loss), _peer_step, peers.LOGPROB,
    ),
}  # fmt: skip
