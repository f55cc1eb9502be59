"""Checkpoints of a stage, written beside the steps that follow them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intfast.state import checkpoint


class Saver:
    """Saves one checkpoint after the other, in the order in which they are given.

    beside: the state is copied to host memory, pinned and kept for the next one, and written and
    hashed by a thread while training goes on. A kill then costs the steps since the save before.
    """

    def __init__(self, stage: Path, *, beside: bool) -> None:
        self.stage, self.beside = stage, beside
        self._copies: dict[str, Tensor] = {}
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[Any] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save a step, after the save before has ended; raises what either of them raises."""
        self.check(wait=True)
        if not self.beside:
            checkpoint.save(self.stage, step, tensors, state)
            return
        for name, tensor in tensors.items():
            if name not in self._copies:
                copy_of = torch.empty_like(tensor, device="cpu")
                self._copies[name] = copy_of.pin_memory() if tensor.is_cuda else copy_of
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        # What is computed next waits on the device for these copies; the thread waits here.
        done = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._writing = self._writer.submit(self._write, done, step, copy.deepcopy(dict(state)))

    def _write(self, done: torch.cuda.Event | None, step: int, state: dict[str, Any]) -> None:
        if done is not None:
            done.synchronize()
        checkpoint.save(self.stage, step, self._copies, state)

    def check(self, *, wait: bool = False) -> None:
        """Raise what the last save raised, once it has ended; `wait` until it has."""
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()
