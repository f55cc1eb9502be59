"""A training stage on its way: where it starts or continues, what of it is saved, and when."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from intfast.model.optim import Optimizer
from intfast.run import Run
from intfast.settings.numerics import OptimConfig
from intfast.state import checkpoint, interrupt


class Course:
    """The steps of one training stage; use as a context manager around them.

    Entering takes the weights and moments of the newest checkpoint, or the weights `start`.
    A request to stop that passes through saves what was finished since.
    """

    def __init__(
        self, run: Run, name: str, start: str, config: OptimConfig, total_updates: int
    ) -> None:
        """name: what the weights are called in the end; total_updates: for the schedule."""
        self.run = run
        self.name = name
        self.start = start
        self.config = config
        self.total_updates = total_updates
        self.step = self.saved = 0
        """Steps finished, and those that the newest checkpoint holds."""
        self.state: dict[str, Any] = {}
        """What the stage keeps besides weights and moments; plain JSON."""

    def __enter__(self) -> Course:
        run = self.run
        found = checkpoint.latest(run.stage_folder(self.name), run.metrics.say)
        if found is None:
            run.hold(self.start)
        else:
            run.restore(found[1])
        run.changed(f"{self.name} in training")
        self.optimizer = Optimizer(run.decoder.named_parameters(), self.config, self.total_updates)
        if found is not None:
            self.step, tensors, state = found
            self.optimizer.load_state_tensors(_under("optim.", tensors), state.pop("optim"))
            self.saved, self.state = self.step, state
            run.metrics.say(f"{self.name}: continues after step {self.step}")
        run.metrics.forget_after(self.name, self.step)
        return self

    def finished_step(self, *, save: bool, **state: Any) -> None:
        """Count a step that is in the weights, with the state after it.

        The first step is saved as well: a disk that is full shows now and not hours later.
        """
        self.step += 1
        self.state = state
        if save or self.step == 1:
            self.save()
        interrupt.check()

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        tensors, counters = self.optimizer.state_tensors()
        model = {f"model.{key}": p for key, p in self.run.decoder.named_parameters()}
        optim = {f"optim.{key}": tensor for key, tensor in tensors.items()}
        folder = self.run.stage_folder(self.name)
        with self.run.metrics.phase("save"):
            checkpoint.save(folder, self.step, model | optim, self.state | {"optim": counters})
        self.saved = self.step

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, interrupt.Stopped):
            if self.saved < self.step:
                self.save()
            kept = f"step {self.saved} is saved" if self.saved else "no step was finished"
            self.run.metrics.say(f"{self.name}: stopped; {kept}")
        self.optimizer.close()
        if kind is None:
            self.run.changed(self.name)


def finished(run: Run, name: str) -> bool:
    """Whether a training stage is done: its last checkpoint says so."""
    folder = checkpoint.newest(run.stage_folder(name), run.metrics.say)
    if folder is None or not checkpoint.read_state(folder)["finished"]:
        return False
    # The last save may have been killed before it removed the checkpoints that it replaced.
    checkpoint.prune(folder.parent, int(folder.name[5:]))
    return True


def _under(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
