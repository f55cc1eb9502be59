"""The ops of an update in the kernel benchmark: AdamW's step, and gradients that add up.

A step changes its own copy of the state in place, so the gate, which looks at the second call,
compares with the truth after two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks import costs
from benchmarks.peers import Peer
from benchmarks.timing import Step
from intfast.kernels import truth as definition
from intfast.kernels.adamw import adamw
from intfast.kernels.add_gradient import add_gradient

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Case

RULE = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SCALE = 1.0
"""Of the gradients. No other one: the plain path would leave them scaled for the next call."""
NUM_BYTES = {"adamw": 30, "add_gradient": 10}
"""Of a parameter: 16-bit weights and gradients, fp32 masters, moments and sums."""


class Data(NamedTuple):
    """A parameter's state; `grad` is of a micro-batch and as narrow as the weight."""

    master: Tensor
    mean: Tensor
    square: Tensor
    total: Tensor
    """The sum of gradients, in fp32."""
    grad: Tensor

    def copy(self) -> Data:
        """With memory of its own."""
        return Data(*(tensor.clone() for tensor in self))


def shapes(size: str) -> list[tuple[int, int, int, float]]:
    """Rows and columns of a weight."""
    return [(64, 32, 0, 1.0) if size == "small" else (16_384, 2560, 0, 1.0)]


def cost(case: Case, dw: int) -> costs.Cost:
    """All that is known of a parameter read once, and written once."""
    return costs.Cost(0.0, float(NUM_BYTES[case.op] * case.rows * case.hidden))


def inputs(case: Case, device: str, seed: int) -> Data:
    """Random numbers of order one; the narrow type is bf16."""
    made = torch.Generator(device).manual_seed(seed)
    shape = (case.rows, case.hidden)
    master, mean, square, total, grad = (
        torch.randn(shape, generator=made, device=device) for _ in range(5)
    )
    return Data(master, mean, square.square(), total, grad.bfloat16())


def ours(case: Case, data: Data, main: bool) -> Step:
    """The op as the optimizer calls it."""
    return _step(adamw if case.op == "adamw" else _add, case, data)


def theirs(peer: Peer, case: Case, indexed: bool, data: Data, main: bool) -> Step:
    """A peer's."""
    return _step(peer.load(), case, data)


def _step(function: Callable, case: Case, data: Data) -> Step:
    own, calls = data.copy(), [0]
    narrow = own.master.to(own.grad.dtype)

    def update() -> tuple[Tensor, ...]:
        calls[0] += 1
        columns = ([x] for x in (own.master, own.total, own.mean, own.square, narrow))
        function(*columns, step=calls[0], grad_scale=SCALE, **RULE)
        return own.master, own.mean, own.square

    def add() -> tuple[Tensor, ...]:
        function(own.grad, own.total)
        return (own.total,)

    return update if case.op == "adamw" else add


def truth(case: Case, data: Data) -> tuple[Tensor, ...]:
    """In fp64, after two steps."""
    wide = Data(*(tensor.double() for tensor in data))
    if case.op == "add_gradient":
        return (wide.total + 2 * wide.grad,)
    state = wide.master, wide.mean, wide.square
    for step in (1, 2):
        master, mean, square = state
        state = definition.adamw(
            master, wide.total, mean, square, step=step, grad_scale=SCALE, **RULE
        )
    return state


def _add(grad: Tensor, total: Tensor) -> None:
    add_gradient(grad, total)


# Peers ------------------------------------------------------------------------------------------


def _eager_adamw() -> Callable:
    def step(masters, grads, means, squares, narrow, **settings):
        torch._foreach_mul_(grads, settings["grad_scale"])
        adamw(masters, grads, means, squares, narrow, path="plain", **settings)

    return step


def _eager_add() -> Callable:
    def step(grad: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total.add_(grad)
        return total, torch.linalg.vector_norm(total)

    return step


PEERS = {
    "adamw": (Peer("eager", _eager_adamw),),
    "add_gradient": (Peer("eager", _eager_add),),
}
