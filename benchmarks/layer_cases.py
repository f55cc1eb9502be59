"""The elementwise ops of a layer in the kernel benchmark: inputs, steps, peers, truth and bytes.

A step is one forward and backward for given gradients of the results. The gate compares one result
and the first two gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import costs
from benchmarks.peers import LIGER, Peer, compiled
from benchmarks.timing import Step
from intfast.kernels import truth as definition
from intfast.kernels.add_rms_norm import add_rms_norm
from intfast.kernels.norm_rope import HeadNorms, norm_rope
from intfast.kernels.swiglu import swiglu

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Case

EPS = 1e-6
QUERY_HEADS, KV_HEADS = 32, 8
"""Of norm_rope: Qwen3-4B's."""


class Data(NamedTuple):
    """Leaves of one call, what is constant in it, and the gradients of its results."""

    leaves: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


def shapes(hidden: int) -> Callable[[str], list[tuple[int, int, int, float]]]:
    """Of an op whose rows have this width in Qwen3-4B."""
    return lambda size: [(64, 32, 0, 1.0) if size == "small" else (16_384, hidden, 0, 1.0)]


def cost(case: Case, dw: int) -> costs.Cost:
    """Each input read once and each result written once, forward and backward."""
    numbers = {
        "add_rms_norm": 8 * case.hidden,
        "norm_rope": (10 * QUERY_HEADS + 14 * KV_HEADS) * case.hidden // 2,
        "swiglu": 8 * case.hidden,
    }[case.op]
    return costs.Cost(0.0, 2.0 * numbers * case.rows)


def inputs(case: Case, device: str, seed: int) -> Data:
    """Random numbers of order one; bf16 on a GPU and fp32 on a CPU."""
    made = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    rows, width = case.rows, case.hidden

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device=device).to(dtype)

    constants: tuple[Tensor, ...] = ()
    if case.op == "add_rms_norm":
        leaves = (randn(rows, width), 1 + randn(width) / 4, randn(rows, width))
        upstream = (randn(rows, width), randn(rows, width))
    elif case.op == "norm_rope":
        leaves = (
            randn(rows, QUERY_HEADS + 2 * KV_HEADS, width), 1 + randn(width) / 4,
            1 + randn(width) / 4,
        )  # fmt: skip
        angle = (torch.arange(rows, device=device)[:, None, None] % 7).float()
        angle = angle * 10 ** -torch.linspace(0, 4, width // 2, device=device)
        constants = tuple(x.repeat(1, 1, 2).to(dtype) for x in (angle.cos(), angle.sin()))
        heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
        upstream = tuple(randn(rows, num, width) for num in heads)
    else:
        leaves, upstream = (randn(rows, 2 * width),), (randn(rows, width),)
    return Data(tuple(x.requires_grad_() for x in leaves), constants, upstream)


def _step(function: Callable, case: Case, data: Data) -> Step:
    def step() -> tuple[Tensor, ...]:
        results = _called(function, case, data)
        grads = torch.autograd.grad(results, data.leaves, data.upstream)
        # Of the norm the normalised row, which has passed through everything.
        return results[-1 if case.op == "add_rms_norm" else 0].detach(), *grads

    return step


def _called(function: Callable, case: Case, data: Data) -> tuple[Tensor, ...]:
    if case.op == "add_rms_norm":
        x, weight, delta = data.leaves
        return function(x, delta, weight, EPS)
    if case.op == "norm_rope":
        qkv, *weights = data.leaves
        return function(qkv, KV_HEADS, *data.constants, HeadNorms(*weights, EPS))
    return (function(*data.leaves),)


def ours(case: Case, data: Data, main: bool) -> Step:
    """The op as the layer calls it."""
    function = {"add_rms_norm": add_rms_norm, "norm_rope": norm_rope, "swiglu": swiglu}[case.op]
    return _step(function, case, data)


def theirs(peer: Peer, case: Case, indexed: bool, data: Data, main: bool) -> Step:
    """A peer's."""
    return _step(peer.load(), case, data)


def truth(case: Case, data: Data) -> tuple[Tensor, ...]:
    """In fp64."""
    wide = Data(*(tuple(x.detach().double() for x in part) for part in data))
    wide = wide._replace(leaves=tuple(x.requires_grad_() for x in wide.leaves))
    return _step(getattr(definition, case.op), case, wide)()


# Peers ------------------------------------------------------------------------------------------


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _eager_add_norm() -> Callable:
    def step(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        stream = x + delta
        return stream, _normalised(stream, weight, eps)

    return step


def _eager_norm_rope() -> Callable:
    def step(qkv: Tensor, num_kv: int, cos: Tensor, sin: Tensor, norms: HeadNorms):
        query, key, value = qkv.split((qkv.shape[1] - 2 * num_kv, num_kv, num_kv), 1)
        turned = []
        for x, weight in ((query, norms.query_K), (key, norms.key_K)):
            x = _normalised(x, weight, norms.eps)
            low, high = x.chunk(2, -1)
            turned.append(x * cos + torch.cat((-high, low), -1) * sin)
        return *turned, value

    return step


def _eager_swiglu() -> Callable:
    def step(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return step


def _liger_add_norm() -> Callable:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    def step(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, stream = LigerFusedAddRMSNormFunction.apply(
            x, delta, weight, eps, 0.0, "llama", False
        )
        return stream, normed

    return step


def _liger_norm_rope() -> Callable:
    from intfast.model.layer_ops import liger

    return liger().norm_rope


def _liger_swiglu() -> Callable:
    from intfast.model.layer_ops import liger

    return liger().swiglu


def _peers(eager: Callable[[], Callable], liger: Callable[[], Callable]) -> tuple[Peer, ...]:
    return (
        Peer("eager", eager),
        Peer("torch.compile", compiled(eager)),
        Peer("Liger", liger, **LIGER),
    )


PEERS = {
    "add_rms_norm": _peers(_eager_add_norm, _liger_add_norm),
    "norm_rope": _peers(_eager_norm_rope, _liger_norm_rope),
    "swiglu": _peers(_eager_swiglu, _liger_swiglu),
}
