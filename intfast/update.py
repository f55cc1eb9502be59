"""One optimizer step over packed micro-batches, and the training stage that it belongs to.

A `Stage` starts from named weights or goes on from its newest checkpoint, and saves what was
finished when a stop passes through it; `update` is the step that SFT and RL share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from intfast import loss, ranks
from intfast.batch import Packed
from intfast.config import OptimConfig
from intfast.model import shards
from intfast.model.decoder import Decoder
from intfast.model.optim import Optimizer
from intfast.run import Run
from intfast.state import checkpoint, interrupt
from intfast.state.saver import Saver

LossOf = Callable[..., tuple[Tensor, loss.Stats]]
"""(hidden_ND, head_weight_VD, batch, **head_options) -> (loss sum, statistics)."""


# --- a stage -----------------------------------------------------------------------------------


class Stage:
    """A training stage that can be interrupted; use as a context manager around its steps.

    Entering takes the weights and moments of the newest checkpoint, or the weights `initial`.
    When a request to stop ends it, what was finished since is saved.
    """

    def __init__(
        self, run: Run, name: str, initial: str, config: OptimConfig, steps: int, updates: int = 1
    ) -> None:
        """name: what the weights are called in the end; the schedule: steps of so many updates."""
        self.run, self.name, self.initial = run, name, initial
        self.config, self.total_updates, self.updates = config, steps * updates, updates
        self.step = self.saved = 0
        """Steps finished, and those that the newest checkpoint holds."""
        self.state: dict[str, Any] = {}
        """What the stage keeps besides weights and moments; plain JSON."""

    def __enter__(self) -> Stage:
        run, folder = self.run, self.run.stage_folder(self.name)
        found = checkpoint.latest(folder, run.metrics.say)
        # On a CPU a thread that hashes would take a core from the steps.
        self.saver = Saver(folder, beside=run.device.type == "cuda")
        if found is None:
            run.hold(self.initial)
        else:
            run.restore(found[1])
        # Nobody may take these weights for those of a finished stage, an evaluation least of all.
        run.changed(f"{self.name} in training")
        # After the weights: fp32 masters are made from what the parameters hold now.
        self.optimizer = Optimizer(
            run.decoder.named_parameters(), self.config, self.total_updates, run.decoder.shards,
            state=run.config.model.optimizer_state,
            dealt=run.config.ranks.gradients == "dealt",
        )  # fmt: skip
        if found is not None:
            self.step, tensors, state = found
            moments = {
                k.removeprefix("optim."): x for k, x in tensors.items() if k.startswith("optim.")
            }
            self.optimizer.load_state_tensors(moments, state.pop("optim"))
            longer = self.optimizer.stretched(state.pop("total", self.total_updates))
            self.saved, self.state = self.step, state
            run.metrics.say(f"{self.name}: continues after step {self.step}{longer}")
        # Rows of steps that ran but were not saved: those steps come again.
        run.metrics.forget_after(self.name, self.step)
        return self

    def finish_step(self, *, save: bool, **state: Any) -> None:
        """Count a step that is in the weights, with the state after it.

        The first step is saved as well: a disk that is full shows now and not hours later.
        """
        self.step += 1
        # The schedule is one of steps: updates that this one did not make are passed over.
        self.optimizer.num_steps = self.step * self.updates
        self.state = state  # where the stream of problems stands, for one
        if save or self.step == 1:
            self.save()
        self.saver.check(wait=self.step == 1)
        interrupt.check(meets=True)

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        tensors, counters = self.optimizer.state_tensors()
        model = {f"model.{key}": p for key, p in shards.state(self.run.decoder).items()}
        optim = {f"optim.{key}": tensor for key, tensor in tensors.items()}
        with self.run.metrics.phase("save"):
            # Weights and moments and counters in one folder that appears whole or not at all.
            more = {"optim": counters, "total": self.optimizer.total_steps}
            self.saver.save(self.step, model | optim, self.state | more)
        self.saved = self.step

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An error saves nothing: what it left half done must not be continued from.
        if kind is not None and issubclass(kind, interrupt.Stopped):
            if self.saved < self.step:
                self.save()
            self.saver.check(wait=True)
            kept = f"step {self.saved} is saved" if self.saved else "no step was finished"
            self.run.metrics.say(f"{self.name}: stopped; {kept}")
        # Its hooks would feed the next optimizer of the same parameters.
        self.optimizer.close()
        if kind is None or ranks.now().world == 1:
            # Where one rank fails the others are elsewhere, and none can wait for all.
            self.saver.check(wait=True)
        if kind is None:
            self.run.changed(self.name)


def is_finished(run: Run, name: str, steps: int = 0) -> bool:
    """Whether a training stage is done: its last checkpoint says so, and has so many steps."""
    folder = checkpoint.newest(run.stage_folder(name), run.metrics.say)
    if folder is None or not checkpoint.read_state(folder)["finished"]:
        return False
    step = int(folder.name[5:])
    # The last save may have been killed before it removed the checkpoints that it replaced.
    checkpoint.prune(folder.parent, step)
    return step >= steps


# --- an update ---------------------------------------------------------------------------------


def update(stage: Stage, packed: Packed, divisor: float, loss_of: LossOf) -> dict[str, Any]:
    """One optimizer step on the micro-batches of `packed`; returns what its row says of it.

    divisor  of the loss of every micro-batch alike: a count taken over all of them, so that any
             packing into micro-batches gives the same gradient
    """
    run, decoder = stage.run, stage.run.decoder
    # Dealt to ranks by their tokens; divisor, schedule and the order of the sum are of all.
    shares = ranks.now().deal([sum(batch.lengths) for batch in packed.batches])
    made: list[loss.Stats] = []
    for index in shares[ranks.now().dp_rank]:
        # A sign of life for the watchdog; a stop waits until the step is whole.
        interrupt.beat()
        # Not ahead of time: the copy overlaps with the micro-batch before it.
        batch = packed.batches[index].to(run.device)
        # The last layer computes only the rows that carry loss.
        hidden_ND = decoder(*batch.inputs())
        loss_sum, stats = loss_of(hidden_ND, decoder.head_weight_VD, batch, **decoder.head_options)
        # Divided before the sum over micro-batches, not by the number of them: their sizes differ.
        (loss_sum / divisor).backward()
        stage.optimizer.meet()
        # Stays on the device: reading it here would wait once a micro-batch.
        made.append(stats)
    for _ in range(max(map(len, shares)) - len(made)):
        stage.optimizer.meet()  # in the micro-batches that others have more
    total: loss.Stats | None = None
    for stats in ranks.now().collect(shares, made):
        total = loss.merge_stats(total, stats)
    # The only wait for the device before the gradient norm.
    values = loss.read_stats(total)
    values["loss"] = values.pop("loss_sum") / divisor
    stepped = stage.optimizer.step(
        loss=values["loss"], diagnose=lambda: _first_non_finite(stage, packed, divisor, loss_of)
    )
    # The engine reads the parameters that the step wrote; its caches are of the old ones.
    run.sampler.engine.weights_changed()
    # One dictionary for one row of metrics.jsonl.
    return values | stepped.row()


@torch.no_grad()
def logprobs(
    decoder: Decoder, packed: Packed, device: torch.device, temperature: float
) -> list[Tensor]:
    """logprob_N (fp32) of the targets of every micro-batch, without gradient."""
    shares = ranks.now().deal([sum(batch.lengths) for batch in packed.batches])
    found = []
    head_VD, options = decoder.head_weight_VD, decoder.head_options
    for index in shares[ranks.now().dp_rank]:
        batch = packed.batches[index].to(device)
        hidden_ND = decoder(*batch.inputs())
        found.append(loss.row_logprob(hidden_ND, head_VD, batch, temperature, **options))
    return ranks.now().collect(shares, found)


def with_logprobs(packed: Packed, stream: str, found: list[Tensor]) -> Packed:
    """`packed` with one of the Batch's streams of log-probs filled: "old" or "reference"."""
    batches = [
        replace(batch, **{f"{stream}_logprob_N": logprob_N.to(batch.target_N.device)})
        for batch, logprob_N in zip(packed.batches, found, strict=True)
    ]
    return replace(packed, batches=tuple(batches))


def _first_non_finite(stage: Stage, packed: Packed, divisor: float, loss_of: LossOf) -> str:
    """The stage, the micro-batch and its first bad tensor, by computing the update once more.

    The update itself looks at one number, the gradient norm; this runs only when that is not
    finite, changes no weight, and leaves no gradient.
    """
    run, optimizer, num = stage.run, stage.optimizer, len(packed.batches)
    decoder = run.decoder
    for index, batch in enumerate(packed.batches):
        batch = batch.to(run.device)
        hidden_ND = decoder(*batch.inputs())
        loss_sum, _ = loss_of(hidden_ND, decoder.head_weight_VD, batch, **decoder.head_options)
        bad = "" if hidden_ND.isfinite().all() else "the hidden states"
        bad = bad or ("" if loss_sum.isfinite().all() else "the loss")
        if not bad:
            (loss_sum / divisor).backward()
            # Ranks that hold the model together must go on together: any shard may be the bad one.
            name = max(ranks.now().gather(optimizer.non_finite_gradient()))
            bad = f"the gradient of {name}" if name else ""
            optimizer.zero_grad()
        if bad:
            return f"{stage.name}: {bad} of micro-batch {index + 1} of {num}"
    return (
        f"{stage.name}: nothing when the {num} micro-batches were computed again one by one: their "
        "sum overflows, or the hardware is at fault"
    )
