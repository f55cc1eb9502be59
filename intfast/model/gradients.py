"""Gradients of an update: added up over micro-batches in fp32, whole, or dealt to the ranks.

Whole ones are reduced once an update. Dealt ones are reduced to parts layer by layer, as backward
leaves a layer: no rank holds more than its parts and one layer, and all take part in every
micro-batch of any of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from intfast import ranks
from intfast.kernels.add_gradient import add_gradient
from intfast.model import shards
from intfast.model.shards import Shards


class Gradients:
    """What backward left for some parameters; those of 16 bits are taken away from them."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], own: Shards | None, dealt: bool
    ) -> None:
        """own: as of the Optimizer."""
        self._parameters, self._shards = parameters, own
        self.dealt = dealt
        self._sums: dict[str, Tensor] = {}
        """Of 16-bit parameters, in fp32; where they are dealt, what waits for its layer."""
        self._parts: dict[str, Tensor] = {}
        """This rank's parts of what was dealt, added up."""
        self.squares: dict[str, Tensor] = {}
        """Sums of squares of the gradients that were added up on CUDA."""
        layers: dict[str, list[str]] = {}
        for name in parameters:
            layers.setdefault(".".join(name.split(".")[:3]), []).append(name)
        # In the order of backward: the head, the layers from the last on, the embedding.
        self._layers = [*layers.values()][::-1]
        self._next = 0
        """The layer that is dealt next."""
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._adding(name))
            for name, parameter in parameters.items()
            if dealt or not is_wide(parameter)
        ]

    def _adding(self, name: str) -> Callable[[Tensor], None]:
        """A hook that moves a parameter's gradient into its sum, and deals what is complete."""

        def add(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            total = self._sums.get(name)
            if is_wide(parameter):
                self._sums[name] = grad if total is None else total.add_(grad)
            else:
                self._sums[name], squares = add_gradient(grad, total)
                if squares is not None:
                    self.squares[name] = squares
            while self.dealt and self._layers[self._next :]:
                if not self._sums.keys() >= set(self._layers[self._next]):
                    break
                self._deal_layer()

        return add

    def _deal_layer(self) -> None:
        for name in self._layers[self._next]:
            part = self._reduced(name, self._sums.pop(name, None))
            self._parts[name] = self._parts[name].add_(part) if name in self._parts else part
        self._next += 1

    def meet(self) -> None:
        """Behind the backward of a micro-batch, or in place of one that only other ranks have."""
        while self.dealt and self._layers[self._next :]:
            self._deal_layer()
        self._next = 0

    def own(self) -> dict[str, Tensor]:
        """What all micro-batches of all ranks added up to: this rank's parts."""
        if ranks.now().world == 1:
            return self.whole()
        if self.dealt:
            # They were of what this rank alone added up.
            self.squares = {}
            return {name: self._parts[name] for name in self._parameters if name in self._parts}
        whole, found = self.whole(), {}
        # A rank without a micro-batch takes part with zeros, in the order of all.
        names = set().union(*ranks.now().gather([*whole]))
        for name in [name for name in self._parameters if name in names]:
            # Freed one by one.
            self._parameters[name].grad = self._sums[name] = None
            found[name] = self._reduced(name, whole.pop(name, None))
        self.zero()
        return found

    def _reduced(self, name: str, whole: Tensor | None) -> Tensor:
        """This rank's part of the sum over ranks; None are zeros."""
        if whole is None:
            parameter = self._parameters[name]
            dtype = parameter.dtype if is_wide(parameter) else torch.float32
            whole = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        mine = ranks.now().reduce(whole)
        if self._shards is not None and shards.is_partial(name):
            ranks.now().tp_sum(mine)
        return mine

    def whole(self) -> dict[str, Tensor]:
        """What the micro-batches of this rank added up to, where nothing was dealt."""
        found = {name: self._sums.get(name, p.grad) for name, p in self._parameters.items()}
        return {name: grad for name, grad in found.items() if grad is not None}

    def zero(self) -> None:
        """Drop all, and their memory."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._sums, self._parts, self.squares = {}, {}, {}

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self.zero()


def is_wide(parameter: nn.Parameter) -> bool:
    """Whether it is its own master."""
    return parameter.dtype in (torch.float32, torch.float64)
