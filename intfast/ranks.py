"""Several processes that are one run: the same program and the same records on every rank.

`torchrun` starts them. Three things are dealt, and gathered at once in the order of one process:
samples to draw and grade, micro-batches of an update, elements of the optimizer's state. Rank 0
alone writes and prints. One process is the same object, with nothing to wait for.

Where `ranks.tp` neighbours hold one copy of the model between them (model/shards.py), they are
dealt the same: what is dealt, is dealt to the copies.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
NEVER_S = 7 * 24 * 3600.0
"""How long to wait for the others where no watchdog limits it."""


class Refused(ValueError):
    """What the ranks found together and cannot work with; all raise it, and rank 0 says it."""


class Lost(RuntimeError):
    """Another rank ended, or did not come to where this one waits."""


class Part(NamedTuple):
    """A tensor in a checkpoint, or to be put into one, that is made when it is asked for."""

    make: Callable[[], Tensor]
    """To be written: this rank's part, flat where there are several. Read: the whole."""
    shape: torch.Size
    """Of the whole."""
    dtype: torch.dtype
    pieces_R: Sequence[Sequence[tuple[int, int, int, int]]] = ()
    """(dim, start, stop, where in the shard) of what each rank of a copy has; () for all of it."""

    def shard_shape(self, rank: int) -> list[int]:
        """Of what a rank of a copy has."""
        sizes = list(self.shape)
        for dim in {piece[0] for piece in self.pieces_R[rank]} if self.pieces_R else ():
            sizes[dim] = sum(piece[2] - piece[1] for piece in self.pieces_R[rank])
        return sizes

    def joined(self, shard: Callable[[int], Tensor]) -> Tensor:
        """The whole, of the shards of the ranks of a copy."""
        if not self.pieces_R:
            return shard(0)
        whole = None
        for rank, pieces in enumerate(self.pieces_R):
            mine = shard(rank)
            whole = mine.new_empty(self.shape) if whole is None else whole
            for dim, start, stop, at in pieces:
                whole.narrow(dim, start, stop - start).copy_(mine.narrow(dim, at, stop - start))
        return whole

    def detach(self) -> Tensor:
        """Made now, as a tensor gives itself."""
        return self.make()


class Ranks:
    """This process among those of the run; what is named after waiting must be called by all."""

    def __init__(
        self, rank: int = 0, world: int = 1, local: int = 0, neighbours: int = 1, tp: int = 1
    ) -> None:
        """local: its number on its machine; neighbours: ranks there, itself included.

        tp: neighbours in rank that hold one copy of the model; dp: how many copies there are.
        """
        self.rank, self.world, self.local, self.neighbours = rank, world, local, neighbours
        self.tp, self.dp = tp, world // tp
        self.dp_rank, self.tp_rank = divmod(rank, tp)
        self._groups: dict[str, Any] = {"dp": None, "tp": None}
        """The process groups of those dealt to, and of one copy; None is the world."""
        self.parent = os.getppid()
        """torchrun, which ends the others when one ends."""
        self.waiting = False
        """Whether it waits for other ranks: then it is not stuck."""

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """What stands before its messages: nothing on rank 0."""
        return "" if self.is_main else f"rank {self.rank}: "

    # --- dealing: the same arithmetic on every rank, without waiting ---

    def deal(self, sizes: Sequence[int]) -> list[list[int]]:
        """The items of each `dp_rank`, rising: the largest first, each to the rank with least."""
        load, shares = [0] * self.dp, [[] for _ in range(self.dp)]
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            rank = min(range(self.dp), key=lambda r: (load[r], r))
            load[rank] += sizes[index]
            shares[rank].append(index)
        return [sorted(share) for share in shares]

    def share(self, items_P: Sequence[Sequence[T]]) -> tuple[list[list[int]], list[list[T]]]:
        """The own places of each group, and what is there: dealt one by one over all groups, since
        samples of one group are more alike in length than groups are."""
        mine_P, begin = [], 0
        for items in items_P:
            mine_P.append([g for g in range(len(items)) if (begin + g) % self.dp == self.dp_rank])
            begin += len(items)
        return mine_P, [[x[g] for g in mine] for x, mine in zip(items_P, mine_P, strict=True)]

    def part(self, tensor: Tensor) -> Tensor:
        """The own part of a contiguous tensor, flat, in its storage; of one process the tensor."""
        if self.dp == 1:
            return tensor
        size = tensor.numel() // self.dp
        return tensor.view(-1)[self.dp_rank * size : (self.dp_rank + 1) * size]

    # --- objects: over the CPU ---

    @contextmanager
    def _wait(self) -> Iterator[Any]:
        """torch.distributed, and a name for what it says when the others are gone."""
        import torch.distributed

        self.waiting = True
        try:
            yield torch.distributed
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0]
            raise Lost(
                f"lost the other ranks; the one that ended first says why ({said})"
            ) from error
        finally:
            self.waiting = False

    def gather(self, mine: T) -> list[T]:
        """What each rank has, in their order."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        with self._wait() as distributed:
            distributed.all_gather_object(found, mine)
        return found

    def together(self, mine_P: list[list[int]], found_P: list[list[T]]) -> list[list[T]]:
        """Groups of all samples from those that each rank made of its `share`."""
        if self.world == 1:
            return found_P
        whole: list[dict[int, T]] = [{} for _ in mine_P]
        # Of ranks that drew the same, what the first made of it: a grade may hang on a clock.
        for shares, parts in self.gather((mine_P, found_P))[:: self.tp]:
            for group, share, part in zip(whole, shares, parts, strict=True):
                group |= zip(share, part, strict=True)
        return [[group[g] for g in range(len(group))] for group in whole]

    def collect(self, shares: list[list[int]], made: list[Any]) -> list[Any]:
        """A tensor, or a dictionary of them, of every item, in order; `made` of the own share."""
        if self.world == 1:
            return made
        moved = [
            {k: x.cpu() for k, x in m.items()} if isinstance(m, dict) else m.cpu() for m in made
        ]
        parts = zip(shares, self.gather(moved)[:: self.tp], strict=True)
        found = {i: x for share, part in parts for i, x in zip(share, part, strict=True)}
        return [found[index] for index in range(len(found))]

    def agree(self, number: int = 0) -> int:
        """The largest number of any rank; nobody goes on before all are here."""
        if self.world == 1:
            return number
        import torch

        largest = torch.tensor(number)
        with self._wait() as distributed:
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    def first(self, work: Callable[[], T], model: bool = False) -> T:
        """What `work` gives on rank 0, which does it as one process would; the others wait.

        model: it runs the model; where ranks hold that together, all do the work.
        """
        if self.world == 1 or (model and self.tp > 1):
            return work()
        box: list[Any] = [None]
        if self.is_main:
            with alone():
                box = [work()]
        with self._wait() as distributed:
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def in_turn(self) -> Iterator[bool]:
        """Whether to write, inside: what is there was read by all before, and is by none after."""
        self.agree()
        yield self.is_main
        self.agree()

    def require(self, fault: str) -> None:
        """Raise Refused with the faults of all ranks, where one has any."""
        said = [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(fault)) if text]
        if said:
            raise Refused("\n".join(said))

    # --- tensors: where they are ---

    def sum(self, number: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            with self._wait() as distributed:
                distributed.all_reduce(number)
        return number

    def reduce(self, tensor: Tensor) -> Tensor:
        """The own part of the sum over ranks."""
        if self.dp == 1:
            return tensor
        mine = self.part(tensor).new_empty(tensor.numel() // self.dp)
        with self._wait() as distributed:
            _named(distributed, "reduce_scatter_single", "reduce_scatter_tensor")(
                mine, tensor.contiguous().view(-1), group=self._groups["dp"]
            )
        return mine

    def spread(self, tensor: Tensor) -> None:
        """Write every rank's part of a tensor in place: its storage stays."""
        if self.dp > 1:
            with self._wait() as distributed:
                _named(distributed, "all_gather_single", "all_gather_into_tensor")(
                    tensor.view(-1), self.part(tensor), group=self._groups["dp"]
                )

    # --- inside one copy of the model: a layer, the loss head; where tp > 1 ---

    def tp_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of this copy, in place."""
        self.tp_summing(tensor)()
        return tensor

    def tp_summing(self, tensor: Tensor) -> Callable[[], None]:
        """Begin `tp_sum`; what is returned waits for its end."""
        with self._wait() as distributed:
            work = distributed.all_reduce(tensor, group=self._groups["tp"], async_op=True)

        def end() -> None:
            with self._wait():
                work.wait()

        return end

    def tp_max(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks of this copy, number by number, in place."""
        with self._wait() as distributed:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._groups["tp"])
        return tensor

    def tp_gather(self, mine: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """On rank 0 what the ranks of its copy have, in these shapes; the own elsewhere."""
        others = [mine.new_empty(shape) for shape in shapes[1:]] if self.is_main else []
        with self._wait() as distributed:
            if self.dp_rank == 0 and self.tp_rank:
                distributed.send(mine.contiguous(), dst=0)
            for rank, other in enumerate(others, 1):
                distributed.recv(other, src=rank)
        return [mine, *others]

    def require_same(self, what: str, mine: Callable[[], str]) -> None:
        """Raise RuntimeError where the ranks of this copy have other texts: they fell apart."""
        if self.tp == 1:
            return
        digest, found = hashlib.sha256(mine().encode()).hexdigest(), [""] * self.tp
        with self._wait() as distributed:
            distributed.all_gather_object(found, digest, group=self._groups["tp"])
        if len({*found}) > 1:
            first = self.rank - self.tp_rank
            raise RuntimeError(
                f"ranks {first} to {first + self.tp - 1} hold one model together, but have not the "
                f"same {what}: one of them is at fault; the same command continues from the last "
                "checkpoint"
            )

    def __deepcopy__(self, memo: Any) -> Ranks:
        """What holds it may be copied: a process group is no value."""
        return self


def _named(distributed: Any, new: str, old: str) -> Callable[..., Any]:
    """A collective by its name since torch 2.13, or by the one before."""
    return getattr(distributed, new, None) or getattr(distributed, old)


_ONE = Ranks()
_now = _ONE


def now() -> Ranks:
    """This process among the ranks of the run; inside `alone`, and without torchrun, by itself."""
    return _now


def launched(tp: int = 1) -> Ranks:
    """What torchrun says of this process; by itself where there is none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return _ONE
    return Ranks(*(int(os.environ[name]) for name in names), tp)


def require_one() -> None:
    """Raise Refused where torchrun started several: for commands that are of one process."""
    if (num := launched().world) > 1:
        raise Refused(f"this command is of one process, got {num} ranks; start it without torchrun")


@contextmanager
def alone() -> Iterator[None]:
    """This process works as if there were no other, while inside."""
    global _now
    before, _now = _now, _ONE
    try:
        yield
    finally:
        _now = before


@contextmanager
def joined(device: Callable[[], torch.device], watchdog_s: float, tp: int = 1) -> Iterator[Ranks]:
    """The world that torchrun started, while inside; nothing at all where there is one rank.

    device  of this rank, or what it raises: Refused on all ranks, with the words of each, once
    tp      ranks that hold one copy of the model; Refused where the world is not made of such
    """
    global _now
    found = launched(tp)
    if found.world % tp:
        raise Refused(
            f"ranks.tp = {tp} needs a number of ranks that it divides, got {found.world}; start "
            f"them with torchrun --standalone --nproc-per-node {tp} -m intfast.train ..."
        )
    if found.world == 1:
        yield found
        return
    import torch
    import torch.distributed as distributed

    where, fault = None, ""
    try:
        where = device()
    except (ValueError, RuntimeError) as error:
        fault = str(error)
    limit = timedelta(seconds=2 * watchdog_s or NEVER_S)
    if found.neighbours == found.world:
        # One machine: no other can reach what listens here.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # Before there is a group, which would need the device.
    store, rank, world = next(distributed.rendezvous("env://", timeout=limit))
    store.set(f"fault/{rank}", fault)
    faults = [store.get(f"fault/{number}").decode() for number in range(world)]
    if any(faults):
        same = faults[0] if len({*faults}) == 1 else ""
        said = [f"rank {number}: {text}" for number, text in enumerate(faults) if text]
        raise Refused(same or "\n".join(said))
    options = {"store": store, "rank": rank, "world_size": world, "timeout": limit}
    if where.type == "cuda":
        torch.cuda.set_device(where)
        distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=where, **options)
    else:
        distributed.init_process_group("gloo", **options)
    if tp > 1:
        rows = [[*range(start, start + tp)] for start in range(0, found.world, tp)]
        for name, groups in (("tp", rows), ("dp", [*map(list, zip(*rows, strict=True))])):
            made = distributed.new_subgroups_by_enumeration(groups, timeout=limit)
            found._groups[name] = made[0]
    _now = found
    try:
        yield found
        found.agree()
        # Not after an error: the others are elsewhere, and torchrun ends them. vLLM ends its own
        # groups as the process exits, and then the world.
        if "vllm" not in sys.modules:
            distributed.destroy_process_group()
    finally:
        _now = _ONE
