"""Flows that share an engine: their order, graders that are late, engines that lose samples."""

from types import SimpleNamespace

import pytest

from intfast.engine import queue
from intfast.engine.queue import Queue


class Late:
    """A draw of some samples whose verdicts come when `ready` says so."""

    def __init__(self, name, num, ready=lambda name: True):
        self.name, self.left, self._ready = name, num, ready
        self.requests_P = [SimpleNamespace(name=name, seeds=range(num))] if num else []

    def end(self, p, g, completion):
        self.left -= 1

    def is_done(self):
        return self._ready(self.name)

    def result(self):
        return f"{self.name} done"


def flow(name, *sizes, log=None):
    for n, size in enumerate(sizes):
        found = yield f"{name}{n}", size
        assert found == f"{name}{n} done"
        if log is not None:
            log.append(found)


def asked(queue, room):
    return [request.name for request in queue.more(room)]


def make(flows, ready=lambda name: True):
    return Queue(flows, lambda wanted: Late(*wanted, ready))


def test_older_flows_go_first_and_new_ones_begin_where_there_is_room():
    found = make([flow("a", 2, 2, 1), flow("b", 1), flow("c", 1)])
    assert asked(found, 2) == ["a0"]
    assert asked(found, 1) == ["b0"]
    found.ended(0, 0, None)
    assert asked(found, 0) == []
    found.ended(0, 1, None)
    # The second draw of a before anything of c; a draw is never split.
    assert asked(found, 1) == ["a1"]
    assert asked(found, 5) == ["c0"]
    for request, sample in ((1, 0), (2, 1), (2, 0), (3, 0)):
        found.ended(request, sample, None)
    assert asked(found, 5) == ["a2"]
    found.ended(4, 0, None)
    found.finish()


def test_of_two_that_wait_the_older_goes_first():
    found = make([flow("a", 1, 1), flow("b", 1, 1), flow("c", 1)])
    assert asked(found, 2) == ["a0", "b0"]
    for request in (1, 0):
        found.ended(request, 0, None)
    assert [asked(found, 1) for _ in range(3)] == [["a1"], ["b1"], ["c0"]]


def test_an_engine_that_runs_does_not_wait_for_a_grader_and_one_that_is_idle_does():
    log = []
    found = make([flow("a", 1, 1, log=log), flow("b", 1)], ready=lambda name: name != "a0")
    assert asked(found, 2) == ["a0", "b0"]
    found.ended(0, 0, None)
    assert asked(found, 2) == [] and log == []
    found.ended(1, 0, None)
    assert asked(found, 2) == ["a1"] and log == ["a0 done"]


def test_what_waits_for_a_grader_is_bounded(monkeypatch):
    monkeypatch.setattr(queue, "MAX_UNREAD", 3)
    found = make((flow(f"{n}:", 1) for n in range(9)), ready=lambda name: False)
    assert len(asked(found, 4)) == 4
    for request in range(3):
        found.ended(request, 0, None)
    assert asked(found, 9) == []
    found.ended(3, 0, None)
    # Idle: it waits for one grade at a time, until a flow may begin.
    assert len(asked(found, 1)) == 1


def test_a_flow_may_have_to_wait_and_draws_may_be_empty():
    begun = []

    def flows():
        yield flow("a", 0, 1)
        while not begun:
            yield None
        yield flow("b", 1)

    found = make(flows())
    assert asked(found, 9) == ["a1"]
    begun.append(1)
    assert asked(found, 9) == ["b0"]


def test_an_engine_that_ends_early_is_found_out():
    found = make([flow("a", 1), flow("b", 1)])
    assert asked(found, 1) == ["a0"]
    with pytest.raises(RuntimeError, match="ended while 1 requests waited"):
        found.finish()
