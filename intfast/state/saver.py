"""Checkpoints of a stage, written beside the steps that follow them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intfast import ranks
from intfast.state import checkpoint


class Saver:
    """Saves one checkpoint after the other, in the order in which they are given.

    beside: the state is copied to host memory, pinned and kept for the next one, and written and
    hashed by a thread while training goes on. A kill then costs the steps since the save before.
    Of several ranks each copies and writes its parts; `check`, by all, makes them a checkpoint.
    """

    def __init__(self, stage: Path, *, beside: bool) -> None:
        self.stage, self.beside = stage, beside
        self._copies: dict[str, Tensor] = {}
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[Any] | None = None

    def save(
        self, step: int, tensors: Mapping[str, checkpoint.Stored], state: Mapping[str, Any]
    ) -> None:
        """Save a step, after the save before has ended; raises what either of them raises."""
        self.check(wait=True)
        if not self.beside:
            checkpoint.save(self.stage, step, tensors, state)
            return
        copies: dict[str, checkpoint.Stored] = {}
        for name, tensor in checkpoint.own(tensors).items():
            made = tensor.detach()
            if name not in self._copies:
                copy_of = torch.empty_like(made, device="cpu")
                self._copies[name] = copy_of.pin_memory() if made.is_cuda else copy_of
            copies[name] = kept = self._copies[name].copy_(made, non_blocking=True)
            if isinstance(tensor, ranks.Part):
                copies[name] = tensor._replace(make=kept.detach)
        # What is computed next waits on the device for these copies; the thread waits here.
        done = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._step = step
        if ranks.now().world > 1:
            checkpoint.begin(self.stage, step)
        state = copy.deepcopy(dict(state))
        self._writing = self._writer.submit(self._write, done, step, copies, state)

    def _write(
        self,
        done: torch.cuda.Event | None,
        step: int,
        copies: Mapping[str, checkpoint.Stored],
        state: dict[str, Any],
    ) -> Any:
        if done is not None:
            done.synchronize()
        # Several ranks meet where they train, and not in a thread that comes at its own time.
        write = checkpoint.write if ranks.now().world > 1 else checkpoint.save
        return write(self.stage, step, copies, state)

    def check(self, *, wait: bool = False) -> None:
        """Raise what the last save raised, once it has ended on all ranks; `wait` until it has."""
        if self._writing is None:
            return
        if wait or not ranks.now().agree(not self._writing.done()):
            writing, self._writing = self._writing, None
            wrote = writing.result()
            if ranks.now().world > 1:
                checkpoint.commit(self.stage, self._step, wrote)
