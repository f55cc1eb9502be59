"""Ranks that hold one model together, as threads of one process: one runs at a time.

They meet as ranks.Ranks do, but see at once when they do not ask for the same.
"""

import threading

import torch

LIMIT_S = 60


class Rank:
    """What the layers and the loss head know of ranks.Ranks."""

    def __init__(self, meeting, tp_rank, tp):
        self.meeting, self.tp_rank, self.tp = meeting, tp_rank, tp
        self.is_main, self.dp_rank = tp_rank == 0, 0

    def __deepcopy__(self, memo):
        return self

    def part(self, tensor):
        return tensor

    def _all(self, tensor, what):
        found = self.meeting.exchange(self.tp_rank, (what, tensor.clone()))
        asked = [(name, x.shape, x.dtype) for name, x in found]
        assert all(one == asked[0] for one in asked), f"ranks ask for different things: {asked}"
        assert tensor.is_contiguous()
        return torch.stack([x for _, x in found])

    def tp_sum(self, tensor):
        return tensor.copy_(self._all(tensor, "sum").sum(0))

    def tp_summing(self, tensor):
        # Only at the end, so that whoever does not wait has the wrong numbers.
        return lambda: self.tp_sum(tensor)

    def tp_max(self, tensor):
        return tensor.copy_(self._all(tensor, "max").amax(0))

    def tp_gather(self, mine, shapes):
        found = self.meeting.exchange(self.tp_rank, ("gather", mine.clone()))
        assert [list(x.shape) for _, x in found] == [list(shape) for shape in shapes]
        return [x for _, x in found] if self.is_main else [mine]


class Meeting:
    """Where the threads exchange what each has."""

    def __init__(self, num):
        self.barrier = threading.Barrier(num, timeout=LIMIT_S)
        self.turn, self.slots = threading.Lock(), [None] * num

    def exchange(self, rank, mine):
        self.slots[rank] = mine
        self._wait()
        found = [*self.slots]
        self._wait()
        return found

    def _wait(self):
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


def together(num, work):
    """What `work(rank)` gives on each of `num` ranks; raises the first error of any."""
    meeting, found, errors = Meeting(num), [None] * num, []

    def run(rank):
        with meeting.turn:
            try:
                found[rank] = work(Rank(meeting, rank, num))
                ended = meeting.exchange(rank, ("end", torch.zeros(())))
                assert {what for what, _ in ended} == {"end"}, "a rank ended before the others"
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        broken = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        raise (broken or errors)[0]
    return found
