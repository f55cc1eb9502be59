"""Checkpoints written beside the steps that follow them."""

import threading
from types import SimpleNamespace

import pytest
import torch

from intfast.state import checkpoint
from intfast.state.saver import Saver


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written until `opened` is set; `begun` are the steps whose writing has begun."""
    found = SimpleNamespace(opened=threading.Event(), begun=[])
    save = checkpoint.save

    def held(stage, step, tensors, state):
        found.begun.append(step)
        assert found.opened.wait(30)
        return save(stage, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save", held)
    return found


def tensors(value: float):
    return {"w": torch.full((3, 4), value), "h": torch.full((5,), value, dtype=torch.bfloat16)}


def test_what_is_written_is_the_state_of_its_step(tmp_path, gate):
    live, state = tensors(1.0), {"cursor": [1]}
    saver = Saver(tmp_path, beside=True)
    saver.save(1, live, state)
    for tensor in live.values():
        tensor.fill_(9.0)
    state["cursor"].append(2)
    saver.check()
    assert checkpoint.newest(tmp_path, print) is None
    gate.opened.set()
    saver.check(wait=True)
    step, found, kept = checkpoint.latest(tmp_path, print)
    assert step == 1 and kept == {"cursor": [1]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(1.0).items())


def test_one_save_after_the_other(tmp_path, gate):
    saver = Saver(tmp_path, beside=True)
    saver.save(1, tensors(1.0), {})
    second = threading.Thread(target=saver.save, args=(2, tensors(2.0), {}))
    second.start()
    second.join(0.3)
    # Its copies would overwrite those that are being written.
    assert second.is_alive() and gate.begun == [1]
    gate.opened.set()
    second.join(30)
    saver.check(wait=True)
    assert gate.begun == [1, 2]
    step, found, _ = checkpoint.latest(tmp_path, print)
    assert step == 2 and torch.equal(found["w"], tensors(2.0)["w"])


@pytest.mark.parametrize("late", ["check", "wait", "save"])
def test_an_error_of_writing_reaches_the_steps(tmp_path, late):
    saver = Saver(tmp_path, beside=True)
    saver.save(1, tensors(float("nan")), {})
    saver._writing.exception()  # until it has ended
    calls = {
        "check": saver.check,
        "wait": lambda: saver.check(wait=True),
        "save": lambda: saver.save(2, tensors(2.0), {}),
    }
    with pytest.raises(ValueError, match="step 1: expected finite tensors"):
        calls[late]()
    saver.save(3, tensors(3.0), {})
    saver.check(wait=True)
    assert checkpoint.latest(tmp_path, print)[0] == 3


def test_without_a_thread_it_is_saved_at_once(tmp_path):
    saver = Saver(tmp_path, beside=False)
    saver.save(1, tensors(1.0), {"cursor": 1})
    assert saver._writing is None and checkpoint.latest(tmp_path, print)[2] == {"cursor": 1}
