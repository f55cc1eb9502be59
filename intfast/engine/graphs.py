"""Decode steps as CUDA graphs: one launch where a step of a large model has more than a thousand.

A graph repeats what the device did, on the tensors it did it to. So a step may depend on nothing
that the host knows but its shape, and must leave its results in tensors that stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

KEPT = 8
"""Graphs that are kept; rows and slots of later steps do not come back to the shapes of early ones.
"""


class Graphs:
    """The graphs of one function by its arguments. All share one pool of memory."""

    def __init__(self) -> None:
        self._pool = None
        self._replays: dict[tuple[int, ...], Callable[[], None] | None] = {}

    def run(self, step: Callable[..., None], *shape: int) -> None:
        """`step(*shape)`: as it is the first time, captured the second, replayed from then on."""
        if shape not in self._replays:
            # Not under capture: kernels are compiled, libraries loaded and workspaces made here.
            self._replays[shape] = None
            step(*shape)
            return
        if self._replays[shape] is None:
            self._replays[shape] = self.capture(lambda: step(*shape))
            captured = [key for key, replay in self._replays.items() if replay is not None]
            for key in captured[:-KEPT]:
                del self._replays[key]
        self._replays[shape]()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What repeats the step; the step itself is recorded here and not done."""
        graph = torch.cuda.CUDAGraph()
        # Nothing of a step lives on after it, so that the next graph may use the same memory.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay
