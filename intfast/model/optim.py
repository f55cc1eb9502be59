"""AdamW on fp32 master weights that writes the model's own storage in place.

A bf16 or fp16 parameter gets an fp32 master, and its gradients of all micro-batches are added up in
fp32; an fp32 parameter is its own master. The storage that the engine reads never moves. On CUDA a
step is one pass over masters, moments and gradients (`kernels/adamw.py`).

Of several ranks each has a part of the masters and moments of every parameter. A step: its part of
the sum of all gradients, AdamW on its part, and every rank's part of the weights in place. Where
gradients are dealt as well, a layer's are reduced to parts as soon as backward has left it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intfast import ranks
from intfast.config import OptimConfig
from intfast.kernels.adamw import adamw, joined, split
from intfast.model import shards
from intfast.model.gradients import Gradients, is_wide
from intfast.model.shards import Shards

BETAS = (0.9, 0.999)
"""Decays of the two moments."""
EPS = 1e-8
"""Added to the root of the second moment."""
BLOCK = 256
"""Squares of a gradient that fp32 adds up."""
MAX_SKIPPED = 5
"""Steps in a row with a non-finite loss or gradient after which the run stops."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one step did."""

    lr: float
    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """The loss or the norm was not finite; no weight and no moment changed."""
    cause: str = ""
    """What was not finite, when skipped."""

    def row(self) -> dict[str, Any]:
        """What a row of metrics.jsonl says of the step; `cause` only where it was skipped."""
        row = {"lr": self.lr, "grad_norm": self.grad_norm, "skipped": int(self.skipped)}
        return row | ({"cause": self.cause} if self.skipped else {})


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of step 0, 1, ...; the peak at the end of the warm-up, the floor after all."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "constant":
        return config.lr
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.floor + (1 - config.floor) * shape)


class Optimizer:
    """One update of all trainable parameters per `step`, after any number of `backward` calls.

    A step with a non-finite loss or gradient changes no weight and no moment, but counts in the
    schedule; so do those that a caller passes over by setting `num_steps`, the place in it.
    Call `close` before another Optimizer takes the same parameters.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        total_steps: int,
        own: Shards | None = None,
        *,
        state: str = "fp32",
        dealt: bool = False,
    ) -> None:
        """parameters: as of `named_parameters()`; those that need no gradient are left alone.

        own     what of the model they are, where several ranks hold one together
        state   as `model.optimizer_state`
        dealt   gradients, to several ranks: then all call `meet` once for every micro-batch of any,
                behind its backward where they have it
        raises  ValueError on no or repeated parameters, total_steps < 1, masters of fp16 to split
        """
        if total_steps < 1:
            raise ValueError(
                f"total_steps: expected an integer >= 1, got {total_steps}; "
                "check epochs, steps and batch size"
            )
        self.config, self._shards = config, own
        self.total_steps = total_steps
        self.num_steps = 0
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self._parameters = _trainable(parameters)
        self._narrow = [n for n, p in self._parameters.items() if not is_wide(p)]
        self._splits, self._is_short = state != "fp32", state == "short"
        self._masters = {name: self._master(name) for name in self._parameters}
        self._gradients = Gradients(self._parameters, own, dealt and ranks.now().dp > 1)
        self.meet = self._gradients.meet
        # Made now and not at the first step, so that memory and the saved names never change.
        self._means = {name: self._moment(name) for name in self._parameters}
        self._squares = {name: self._moment(name) for name in self._parameters}

    def _master(self, name: str) -> Tensor:
        """The own part: of a wide parameter in its storage, of a 16-bit one in fp32, or split."""
        own = self._own(name)
        if name not in self._narrow:
            return own
        if not self._splits:
            return own.float().clone()
        if own.dtype != torch.bfloat16:
            raise ValueError(
                f"{name}: expected bfloat16, whose bits are the upper half of fp32, got {own.dtype}"
                '; use model.optimizer_state = "fp32"'
            )
        return torch.zeros_like(own, dtype=torch.int16)

    def _moment(self, name: str) -> Tensor:
        """Zeros, for the own part."""
        own = self._own(name)
        if name not in self._narrow:
            return torch.zeros_like(own)
        return torch.zeros_like(own, dtype=torch.bfloat16 if self._is_short else torch.float32)

    @torch.no_grad()
    def step(self, *, loss: float = 0.0, diagnose: Callable[[], str] = str) -> StepStats:
        """Clip, update the masters, write the parameters in place, and free the gradients.

        loss            of the whole update; where it is not finite, the step is skipped
        diagnose        called when the step is skipped, after the gradients were freed; what it
                        returns names the origin in StepStats.cause and in the error
        raises          RuntimeError after MAX_SKIPPED skipped steps in a row;
                        ValueError without any gradient
        """
        grads = self._gradients.own()
        if not grads:
            raise ValueError("step: expected gradients, got none; call backward before step")
        lr = learning_rate(self.num_steps, self.total_steps, self.config)
        grad_norm = self._norm(grads)
        self.num_steps += 1
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):
            cause = self._skip(loss, grad_norm, grads, diagnose)
            return StepStats(lr=lr, grad_norm=grad_norm, skipped=True, cause=cause)
        self._skipped_in_a_row = 0
        limit = self.config.max_grad_norm
        # Vectors, which are norms and biases, do not decay.
        for decays in (True, False):
            names = [name for name in grads if (self._parameters[name].ndim > 1) == decays]
            adamw(
                [self._masters[name] for name in names],
                [grads[name] for name in names],
                [self._means[name] for name in names],
                [self._squares[name] for name in names],
                [self._own(name) if name in self._narrow else None for name in names],
                step=self.num_steps - self.num_skipped,
                lr=lr,
                betas=BETAS,
                eps=EPS,
                weight_decay=self.config.weight_decay if decays else 0.0,
                grad_scale=limit / grad_norm if grad_norm > limit > 0 else 1.0,
                part=ranks.now().dp_rank,
            )
        for name in grads:
            ranks.now().spread(self._parameters[name].data)
        self.zero_grad()
        return StepStats(lr=lr, grad_norm=grad_norm, skipped=False)

    def _own(self, name: str) -> Tensor:
        """This rank's part of a parameter, in its storage."""
        return ranks.now().part(self._parameters[name].data)

    def _norm(self, grads: dict[str, Tensor]) -> float:
        """The global norm; what the sums of gradients left behind is not computed again."""
        if ranks.now().tp_rank:
            # What is whole on every rank counts on the first.
            grads = {name: grad for name, grad in grads.items() if shards.is_dealt(name)}
        left = [squares.sum(dtype=torch.float64) for squares in self._gradients.squares.values()]
        rest = [grad for name, grad in grads.items() if name not in self._gradients.squares]
        if rest:
            left.append(total_norm(rest).square())
        return ranks.now().sum(torch.stack(left).sum()).sqrt().item()

    def _skip(
        self,
        loss: float,
        grad_norm: float,
        grads: dict[str, Tensor],
        diagnose: Callable[[], str],
    ) -> str:
        """Count and explain a refused step; the cause."""
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        order = [*self._parameters]
        # Every rank looked at its parts.
        bad = filter(None, ranks.now().gather(_first_non_finite(grads)))
        name = max(bad, key=order.index, default="")
        found = f"loss {loss}, gradient norm {grad_norm}" + (f", first in {name}" if name else "")
        self.zero_grad()
        # Every rank computes the same micro-batches again: nothing is dealt.
        dealt, self._gradients.dealt = self._gradients.dealt, False
        with torch.enable_grad():
            origins = ranks.now().gather(diagnose())
        self._gradients.dealt = dealt
        origin = "; ".join(dict.fromkeys(filter(None, origins)))
        cause = f"{origin} ({found})" if origin else found
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise RuntimeError(
                f"update {self.num_steps - 1}: not finite for {self._skipped_in_a_row} updates in "
                f"a row: {cause}; the weights are those before "
                "them. Resume from the last checkpoint with a lower optim.lr or "
                'optim.max_grad_norm, or with model.dtype = "float32"'
            )
        return cause

    def stretched(self, was: int) -> str:
        """What it makes of the rate that so many steps were planned before; "" for nothing."""
        old, new = (learning_rate(self.num_steps, n, self.config) for n in (was, self.total_steps))
        said = f"; with more steps than planned the learning rate goes on at {new:.3g}"
        return "" if new == old else f"{said}, not {old:.3g}"

    def non_finite_gradient(self) -> str:
        """Name of the parameter nearest to the loss whose gradient is not finite; "" for none."""
        return _first_non_finite(self._gradients.whole())

    def zero_grad(self) -> None:
        """Drop all gradients, and their memory."""
        self._gradients.zero()

    def close(self) -> None:
        """Take the hooks off the parameters; the optimizer cannot be used afterwards."""
        self._gradients.close()
        self._parameters, self._masters = {}, {}

    def state_tensors(self) -> tuple[dict[str, Tensor | ranks.Part], dict[str, int]]:
        """(tensors by name, counters): all that an exact resume needs besides the fp32 weights.

        The tensors are the live ones, not copies, or what makes the own part of one when it is
        written: split masters are saved as fp32. The counters are plain JSON.
        """
        tensors: dict[str, Tensor | ranks.Part] = {}
        for key, tensor in self._state().items():
            name = key.partition(".")[2]
            if tensor.dtype == torch.int16 or ranks.now().world > 1:
                make, dtype = tensor.detach, tensor.dtype
                if dtype == torch.int16:
                    make, dtype = partial(joined, self._own(name), tensor), torch.float32
                tensor = ranks.Part(make, self._parameters[name].shape, dtype)
            tensors[key] = shards.stored(self._shards, name, tensor)
        return tensors, {
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def _state(self) -> dict[str, Tensor]:
        """The live tensors: whole ones, or parts."""
        tensors = {f"master.{name}": self._masters[name] for name in self._narrow}
        tensors |= {f"exp_avg.{name}": mean for name, mean in self._means.items()}
        return tensors | {f"exp_avg_sq.{name}": square for name, square in self._squares.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Continue from what `state_tensors` gave; also writes the parameters that have a master.

        Raises ValueError, before any change, when names, shapes or dtypes differ.
        """
        own, own_counters = self.state_tensors()
        wrong = sorted(own.keys() ^ tensors.keys()) + sorted(own_counters.keys() ^ counters.keys())
        wrong += [
            name
            for name in sorted(own.keys() & tensors.keys())
            if (own[name].shape, own[name].dtype) != (tensors[name].shape, tensors[name].dtype)
        ]
        if wrong:
            raise ValueError(
                f"optimizer state: expected {len(own)} tensors of this model, got {len(tensors)}; "
                f"{len(wrong)} names are missing, unknown or of another shape or dtype, first "
                f"{wrong[:3]}; resume with the model and dtype of the checkpoint"
            )
        for key, tensor in self._state().items():
            name = key.partition(".")[2]
            mine = shards.own(self._shards, name, tensors[key].detach())
            found = ranks.now().part(mine).to(tensor.device)
            if tensor.dtype == torch.int16:
                split(found, self._own(name), tensor)
            else:
                tensor.copy_(found)
        self.num_steps = counters["num_steps"]
        self.num_skipped = counters["num_skipped"]
        self._skipped_in_a_row = counters["skipped_in_a_row"]
        for name in self._narrow:
            if not self._splits:
                self._own(name).copy_(self._masters[name])
            ranks.now().spread(self._parameters[name].data)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all numbers of all tensors together, 0-dim fp64.

    A CPU's fp32 sum of 40 million squares is off by 3e-3. Here fp32 holds those of BLOCK numbers,
    and their sums are added in fp64: as fast, without a wide copy of the gradients.
    """
    parts = []
    for flat in (grad.flatten() for grad in grads):
        whole = len(flat) // BLOCK * BLOCK
        parts.append(torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1))
        parts.append(torch.linalg.vector_norm(flat[whole:])[None])
    return torch.linalg.vector_norm(torch.cat(parts).double())


def _trainable(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if name in found or id(parameter) in names:
            raise ValueError(
                f"parameters: expected each once, got {name!r} again (first as "
                f"{names.get(id(parameter), name)!r}); list tied weights once"
            )
        found[name] = parameter
        names[id(parameter)] = name
    if not found:
        raise ValueError(
            "parameters: expected one that requires a gradient, got none; unfreeze the model"
        )
    return found


def _first_non_finite(grads: dict[str, Tensor]) -> str:
    """The name nearest to the loss whose gradient is not finite; "" for none."""
    return next((n for n, g in reversed(grads.items()) if not g.isfinite().all()), "")
