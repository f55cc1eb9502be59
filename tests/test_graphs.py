"""Decode steps as graphs, on a CPU: what a graph would repeat is recorded here op by op.

A recording knows tensors and nothing else, as a CUDA graph does: a number that the host passed in
is repeated as it was.
"""

from __future__ import annotations

import pytest
import torch
from engine_cases import CONTEXT, mixed_requests, native
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from intfast.engine import generation, graphs


class Recording(TorchDispatchMode):
    """Ops in their order with the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        self.ops.append((op, args, kwargs or {}, outputs))
        return found

    def replay(self):
        for op, args, kwargs, outputs in self.ops:
            found = op(*args, **kwargs)
            found = found if isinstance(found, (tuple, list)) else (found,)
            for kept, new in zip(outputs, found, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Recorded(graphs.Graphs):
    """Graphs of a generation: recorded, undone, and then replayed."""

    def __init__(self, made):
        super().__init__()
        self.made, self.replays = made, 0

    def capture(self, step):
        kept = [self.made.state_CR, self.made.token_RN, self.made.logprob_RN, self.made.done_R]
        before = [(x, x.clone()) for x in [*kept, self.made.cache.slots]]
        recording = Recording()
        with recording:
            step()
        # A capture only writes down what there is to do.
        for tensor, value in before:
            tensor.copy_(value)

        def replay():
            self.replays += 1
            recording.replay()

        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    make_model(path, "qwen3", max_position_embeddings=CONTEXT)
    return path


def test_replayed_steps_draw_what_computed_ones_do(folder, monkeypatch):
    requests = mixed_requests(24)
    want = native(folder, max_rows=48).generate(requests)
    made, allocate = [], generation.Generation._allocate

    def with_graphs(self, samplings):
        allocate(self, samplings)
        self.graphs = Recorded(self)
        made.append(self.graphs)

    monkeypatch.setattr(generation.Generation, "_allocate", with_graphs)
    monkeypatch.setattr(generation, "GRAPH_SLOTS", 64)
    found = native(folder, max_rows=48).generate(requests)
    assert found == want
    # Most of the steps, or the test shows nothing.
    lengths = [len(c.token_ids) for group in want for c in group]
    assert made[0].replays > 0.5 * max(lengths)


def test_the_recording_notices_what_the_host_decides_in_a_step(folder, monkeypatch):
    """A step that read its number from the host would repeat the one of the capture."""
    state = {"calls": 0, "out": torch.zeros(8)}

    def step(place):
        state["out"][state["calls"]] += 1
        state["calls"] += 1

    made = type("Made", (), {})()
    made.state_CR = made.token_RN = made.logprob_RN = made.done_R = state["out"]
    made.cache = type("Cache", (), {"slots": torch.zeros(1)})()
    found = Recorded(made)
    for _ in range(5):
        found.run(step, 0)
    assert state["out"].tolist() == [1, 4, 0, 0, 0, 0, 0, 0]


def test_early_graphs_are_dropped():
    class Counted(graphs.Graphs):
        def capture(self, step):
            return lambda: done.append(1)

    done, found = [], Counted()
    for slots in range(1, 20):
        for _ in range(3):
            found.run(lambda rows, slots: done.append(1), 32, slots)
    assert len(done) == 3 * 19
    assert sum(replay is not None for replay in found._replays.values()) == graphs.KEPT
