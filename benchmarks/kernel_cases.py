"""What the kernel benchmark runs: shapes, inputs, our variants and the peers', and the fp64 truth.

A step returns a tuple that starts with what the gate compares: a head step (loss, gradient of the
hidden states, gradient of the weight), a log-prob step (logprob_N,), an advantage step
(advantage_T,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import costs, peers
from benchmarks.timing import Step
from intfast.kernels import truth as definition
from intfast.kernels.group_advantages import TokenLayout, group_advantages
from intfast.kernels.head.plan import IGNORE
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import PolicyClip, Streams
from intfast.kernels.span_cross_entropy import span_cross_entropy

OPS = (
    "span_cross_entropy",
    "linear_objective",
    "linear_logprob",
    "linear_logprob_gradient",
    "group_advantages",
)
SHARES = (0.10, 0.05, 0.02)
TRUTH_ROWS = 1024
GROUP, SAMPLE_TOKENS = 8, 128


@dataclass(frozen=True)
class Case:
    """One op on one shape; `share` of the rows carry loss."""

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
    def has_gradient(self) -> bool:
        """Whether its steps differentiate."""
        return self.op not in ("group_advantages", "linear_logprob")

    def cost(self, dw: int) -> costs.Cost:
        """The cost card; a step that differentiates a log-prob makes the logits twice."""
        if self.op == "group_advantages":
            return costs.advantages(self.rows, self.rows // GROUP, SAMPLE_TOKENS * self.rows)
        shape = (self.live, self.hidden, self.vocabulary)
        if self.op == "linear_logprob":
            return costs.head_forward(*shape)
        return costs.head_step(*shape, products=4 if self.op.endswith("gradient") else 3, dw=dw)


def cases(ops: list[str], shapes: str) -> list[Case]:
    """The cases in the order in which a budget should be spent."""
    if shapes == "small":
        heads = [(256, 64, 1000, share) for share in (1.0, *SHARES)]
        samples = 64
    else:
        # kernels of section 7: the reference model first, its sparse cases, then the other shapes
        heads = [(4096, 2560, 151_936, 1.0)]
        heads += [(16_384, 2560, 151_936, share) for share in (1.0, 0.05, 0.10, 0.02)]
        heads += [(4096, 4096, 128_256, 1.0), (16_384, 4096, 128_256, 1.0)]
        widths = [(h, v) for v in (151_936, 128_256, 32_000) for h in (2560, 4096, 2048)]
        heads += [(n, h, v, 1.0) for n in (4096, 16_384, 65_536) for h, v in widths]
        heads += [(65_536, 2560, 151_936, share) for share in SHARES]
        samples = 512
    found = [Case(op, *head) for head in dict.fromkeys(heads) for op in ops if op in OPS[:4]]
    if "group_advantages" in ops:
        found.insert(0, Case("group_advantages", samples, 0, 0))
    dense_only = ("linear_logprob", "linear_logprob_gradient")
    return [case for case in found if case.share == 1.0 or case.op not in dense_only]


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


class Variant(NamedTuple):
    """One way to compute a case."""

    name: str
    build: Callable[[], Step]
    ours: bool = False


def variants(case: Case, data: Data, asked: tuple[peers.Peer, ...], main: bool) -> list[Variant]:
    """Ours and the peers' steps; `main` adds the weight's gradient to an fp32 buffer."""
    if case.op == "linear_logprob":
        found = [Variant("intfast", lambda: _our_logprob(data), ours=True)]
        return found + [Variant(p.name, lambda p=p: _peer_logprob(p, data)) for p in asked]
    found = [Variant("intfast", lambda: _our_step(case, data, main), ours=True)]
    modes = ("all rows", "indexed") if case.share < 1 else ("",)
    for peer in asked:
        for mode in modes:
            # Liger's policy loss wants whole sequences.
            if (peer.name, mode) == ("Liger GRPO", "indexed"):
                continue
            name = f"{peer.name} {mode}".strip()
            build = functools.partial(_peer_step, peer, case, data, main, mode == "indexed")
            found.append(Variant(name, build))
    return found


def peers_of(op: str) -> tuple[peers.Peer, ...]:
    """The peers that have something to compare with an op."""
    return {
        "span_cross_entropy": peers.CROSS_ENTROPY,
        "linear_objective": peers.POLICY,
        "group_advantages": (),
    }.get(op, peers.LOGPROB)


def _our_loss(case: Case, data: Data, main: bool) -> Tensor:
    options = {
        "rows_R": data.rows_R if case.share < 1 else None,
        "main_grad_VD": data.main_VD if main else None,
    }
    head = data[:3]
    if case.op == "span_cross_entropy":
        # CUDA weights need the index, also where it is all rows.
        options["rows_R"] = data.rows_R
        return span_cross_entropy(*head, data.weight_N, **options)
    if case.op == "linear_objective":
        objective = PolicyClip(peers.CLIP, peers.CLIP)
        streams = Streams(data.weight_N, data.advantage_N, data.old_N)
        return linear_objective(*head, objective, streams, entropy="none", **options).loss
    logprob_N, _ = linear_logprob(*head, entropy="none", **options)
    return -logprob_N.sum()


def _our_step(case: Case, data: Data, main: bool) -> Step:
    def step() -> tuple[Tensor, ...]:
        loss = _our_loss(case, data, main)
        if main:
            (hidden_grad,) = torch.autograd.grad(loss, data.hidden_ND)
            return loss.detach(), hidden_grad, data.main_VD
        return loss.detach(), *torch.autograd.grad(loss, (data.hidden_ND, data.weight_VD))

    return step


def _peer_step(peer: peers.Peer, case: Case, data: Data, main: bool, indexed: bool) -> Step:
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


def _our_logprob(data: Data) -> Step:
    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return linear_logprob(*data[:3], entropy="value")

    return step


def _peer_logprob(peer: peers.Peer, data: Data) -> Step:
    call = peer.load()

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return call(*data[:3])

    return step


def head_truth(case: Case, data: Data) -> tuple[Tensor, ...]:
    """What the steps of a case should return, in fp64, a few rows at a time."""
    weight_VD = data.weight_VD.detach().double().requires_grad_()
    loss, hidden_grads, logprobs = 0.0, [], []
    weight_grad = torch.zeros_like(weight_VD)
    for rows in _slices(case.rows):
        hidden_CD = data.hidden_ND[rows].detach().double().requires_grad_()
        logprob_C, _ = definition.linear_logprob(hidden_CD, weight_VD, data.target_N[rows])
        if case.op == "linear_logprob":
            logprobs.append(logprob_C.detach())
            continue
        part = _true_loss(case, logprob_C, data, rows)
        hidden_grad, weight_part = torch.autograd.grad(part, (hidden_CD, weight_VD))
        loss, weight_grad = loss + part.detach(), weight_grad.add_(weight_part)
        hidden_grads.append(hidden_grad)
    if logprobs:
        return (torch.cat(logprobs),)
    return loss, torch.cat(hidden_grads), weight_grad


def _true_loss(case: Case, logprob_C: Tensor, data: Data, rows: slice) -> Tensor:
    weight_C = data.weight_N[rows].double()
    if case.op != "linear_objective":
        return -(weight_C * logprob_C).sum()
    ratio_C, advantage_C = (logprob_C - data.old_N[rows]).exp(), data.advantage_N[rows].double()
    clipped_C = ratio_C.clamp(1 - peers.CLIP, 1 + peers.CLIP)
    return -(weight_C * torch.minimum(ratio_C * advantage_C, clipped_C * advantage_C)).sum()


def _slices(rows: int) -> Iterator[slice]:
    return (slice(start, start + TRUTH_ROWS) for start in range(0, rows, TRUTH_ROWS))


def advantage_variants(case: Case, device: str, seed: int) -> tuple[list[Variant], tuple]:
    """Steps of the advantage op, and the truth."""
    made = torch.Generator().manual_seed(seed)
    rewards_N = torch.randint(2, (case.rows,), generator=made).float()
    offsets_P1 = torch.arange(0, case.rows + 1, GROUP)
    token_offsets_N1 = SAMPLE_TOKENS * torch.arange(case.rows + 1)
    truth_N = definition.group_advantages(rewards_N.double(), offsets_P1)
    truth = (truth_N.repeat_interleave(SAMPLE_TOKENS).to(device),)
    rewards_N, offsets_P1, token_offsets_N1 = (
        value.to(device) for value in (rewards_N, offsets_P1, token_offsets_N1)
    )
    layout = TokenLayout(token_offsets_N1, torch.ones(SAMPLE_TOKENS * case.rows, device=device))

    def ours(path: str) -> Step:
        def step() -> tuple[Tensor, ...]:
            return (group_advantages(rewards_N, offsets_P1, layout, path=path).advantage_T,)

        return step

    def eager() -> tuple[Tensor, ...]:
        # The way of trainers with groups of one size: reshape, then one gather for the tokens.
        reward_PG = rewards_N.view(-1, GROUP)
        spread_P1 = reward_PG.std(1, keepdim=True)
        advantage_N = ((reward_PG - reward_PG.mean(1, keepdim=True)) / (spread_P1 + 1e-4)).view(-1)
        return (advantage_N[:, None].expand(-1, SAMPLE_TOKENS).reshape(-1) * layout.weight_T,)

    return [
        Variant("intfast", lambda: ours("auto"), ours=True),
        Variant("intfast plain", lambda: ours("plain")),
        Variant("eager, equal groups", lambda: eager),
    ], truth
