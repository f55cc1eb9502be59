"""A CUDA device that is not there: tensors say cuda:0 and hold data of the CPU, or none at all.

    with FakeCuda() as device:
        ...                      # torch.zeros(3, device="cuda"), the trainer, whatever there is

Every operator passes through one place, which raises on mixed devices as CUDA does, notes each
wait of the host for the device with the line that caused it, and adds up launches and bytes.
Operators that only CUDA has are computed by twins that assert what theirs demand. So this tests
the Python of the CUDA path and its traffic, not its numbers and not its time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks import fake_twins as twins
from intfast.engine.graphs import Graphs
from intfast.kernels import adamw, add_gradient
from intfast.kernels.head.plan import HAS_TRITON

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
CARD = SimpleNamespace(name="Fake H100", total_memory=80 * 10**9, multi_processor_count=132)

# Why the host waits: for a number, or for how long a result is.
READS = dict.fromkeys(("_local_scalar_dense", "is_nonzero", "equal"), "look")
READS |= dict.fromkeys(("nonzero", "masked_select", "_unique2"), "unknown length")
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# They launch nothing, as the views do that a schema tells.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
NO_LAUNCH |= {"_unsafe_view", "squeeze_", "unsqueeze_", "t_", "transpose_"}
OVERWRITES = {"copy_", "fill_", "zero_"}
"""Of a mutated argument, written and not read."""


class Launch(NamedTuple):
    """One operator that runs on the device."""

    name: str
    bytes: int
    """Of its inputs and outputs, each moved once; a mutated one is read and written."""
    where: str


class FakeTensor(torch.Tensor):
    """What a CUDA tensor looks like to Python; to torch's C++ it is a CPU tensor with no data."""

    data_of_it: Tensor
    watch: FakeCuda
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, watch: FakeCuda) -> FakeTensor:
        """data: on the CPU or on "meta"."""
        # Autograd would send a true CUDA tensor to a thread of a device that is not there.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(),
                dtype=data.dtype, device="cpu",
            )  # fmt: skip
        made.data_of_it, made.watch = data, watch
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        """Of the data on the CPU."""
        return self.data_of_it.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made: Tensor = FakeTensor(self.data_of_it.detach().clone(), self.watch)
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        fakes = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, FakeTensor)]
        return fakes[0].watch.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"FakeTensor({tuple(self.shape)}, {self.dtype}, {CUDA})"


class FakeCuda:
    """The device, while it is entered: what torch.cuda says, and what was seen.

    waits     how often the host waited, by (kind, "file:line function") of the nearest own frame
    launches  every Launch in order, while `counting`
    """

    def __init__(self, data: Literal["cpu", "meta"] = "cpu", counting: bool = False) -> None:
        """data: "meta" computes nothing, for shapes of any size."""
        self.data, self.counting = torch.device(data), counting
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: list[Launch] = []
        self.in_graph = False

    def __enter__(self) -> FakeCuda:
        self.opened = ExitStack()
        for place, name, value in self._patches():
            self.opened.enter_context(mock.patch.object(place, name, value))
        self.opened.enter_context(_Dispatch(self))
        self.opened.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def _patches(self) -> list[tuple[Any, str, Any]]:
        cuda = torch.cuda
        # What trainer, engine and torch's own optimizers and checkpointing ask of a device.
        answers = {
            "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
            "get_device_capability": (9, 0), "get_device_name": CARD.name, "empty_cache": None,
            "get_device_properties": CARD, "max_memory_allocated": 0, "memory_allocated": 0,
            "mem_get_info": (78 * 10**9, CARD.total_memory), "reset_peak_memory_stats": None,
            "is_current_stream_capturing": False, "is_bf16_supported": True,
            "get_rng_state_all": [], "set_rng_state_all": None, "_exchange_device": 0,
            "_maybe_exchange_device": 0,
        }  # fmt: skip
        made = [
            (cuda, name, lambda *_, value=value, **__: value) for name, value in answers.items()
        ]
        if HAS_TRITON:
            from triton.runtime.jit import JITFunction

            made.append((JITFunction, "run", self._triton))
        return [
            *made,
            (cuda, "synchronize", lambda *_: self.wait("synchronize")),
            # What the host waits for in a thread of its own does not hold up the trainer.
            (cuda, "current_stream", lambda *_: mock.Mock()),
            (Graphs, "capture", lambda graphs, step: lambda: self._replay(step)),
            (adamw, "_triton", self._adamw),
            (add_gradient, "_triton", self._add_gradient),
            # Noise of dropout, which no model here has.
            (checkpoint, "get_device_states", lambda *_: ([], [])),
            (checkpoint, "set_device_states", lambda *_, **__: None),
        ]

    def tensor(self, data: Tensor) -> FakeTensor:
        """A tensor on the device with this content."""
        return FakeTensor(data.detach().to(self.data, copy=True), self)

    def wait(self, kind: str) -> None:
        """Note that the host waits."""
        if self.in_graph:
            raise RuntimeError(f"{kind} at {_place()}: not permitted when stream is capturing")
        self.waits[kind, _place()] += 1

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operator, watched."""
        flat = tree_flatten((args, kwargs))[0]
        fakes = [x for x in flat if isinstance(x, FakeTensor)]
        if not fakes:
            return self._made_here(func, args, kwargs)
        name = func._schema.name.split("::")[1]
        self._check_devices(func, name, args, flat)
        if name in READS or self._has_unknown_length(func, name, args, kwargs):
            self.wait(READS.get(name, "unknown length"))
        args, kwargs = tree_map(_data, (args, kwargs))
        if "device" in kwargs:
            kwargs |= {"device": self.data, "pin_memory": None}
        # Data is data: whether a gradient is wanted was settled above this.
        with torch.inference_mode(False), torch.no_grad():
            out = twins.run(func, args, kwargs)
        if self.counting:
            self._count(func, name, args, kwargs, out)
        # What was changed in place is the tensor that it was.
        known = {id(x.data_of_it): x for x in fakes}

        def wrapped(x: Any) -> Any:
            if type(x) is not Tensor:
                return x
            return known[id(x)] if id(x) in known else FakeTensor(x, self)

        return tree_map(wrapped, out)

    def _has_unknown_length(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name in INDEXED:
            return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        is_repeat = name == "repeat_interleave" and kwargs.get("output_size") is None
        # Repeats in a tensor are known to the device alone.
        return is_repeat and func._overloadname in ("Tensor", "self_Tensor")

    def _made_here(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator without a tensor of the device, which may make one."""
        device = kwargs.get("device")
        if device is None or device.type != "cuda":
            return func(*args, **kwargs)
        if any(isinstance(x, Tensor) for x in args):
            self.wait("copy from the host")
        return FakeTensor(func(*args, **kwargs | {"device": self.data}), self)

    def _triton(self, *args: Any, **kwargs: Any) -> None:
        """A Triton kernel that no operator hides, as Liger's: counted, and never computed."""
        if self.data.type != "meta":
            raise NotImplementedError("a Triton kernel outside of an operator has no twin")
        tensors = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, FakeTensor)}
        if self.counting:
            moved = _bytes(list(tensors.values()))
            self.launches.append(Launch("triton", moved, _place()))

    def _replay(self, step: Callable[[], None]) -> None:
        """A step as its graph repeats it: computed, but nothing in it may wait."""
        self.in_graph = True
        try:
            step()
        finally:
            self.in_graph = False

    def _adamw(self, columns: Any, *, part: int, **how: Any) -> None:
        """AdamW's step; the kernel demands what is asserted here."""
        assert all(x is None or x.is_contiguous() for column in columns for x in column)
        assert all(x.dtype == torch.float32 for x in columns[1])
        with torch.inference_mode(False):
            for tensors in zip(*tree_map(_data, columns), strict=True):
                adamw._short(tensors, part=part, **how)

    def _add_gradient(self, grad: Tensor, total: Tensor, fresh: bool) -> Tensor:
        """A gradient added to its sum."""
        assert grad.is_contiguous() and total.is_contiguous() and total.dtype == torch.float32
        with torch.inference_mode(False):
            if fresh:
                _data(total).zero_()
            _data(total).add_(_data(grad))
            return FakeTensor(_data(total).square().sum()[None], self)

    def _check_devices(self, func: Any, name: str, args: Any, flat: list[Any]) -> None:
        # A number in a 0-dim tensor of the CPU is a number to CUDA as well.
        strangers = [x for x in flat if type(x) in (Tensor, torch.nn.Parameter) and x.ndim]
        if not strangers:
            return
        if name == "copy_":
            to_cuda = isinstance(args[0], FakeTensor)
            pinned = any(getattr(x, "is_pinned_copy", False) for x in strangers)
            # (into, from, non_blocking)
            if pinned and args[2:] == (True,):
                return
            self.wait("copy from the host" if to_cuda else "copy to the host")
        elif name in INDEXED and isinstance(args[0], FakeTensor):
            self.wait("index on the host")
        else:
            tensors = [x for x in flat if isinstance(x, Tensor)]
            said = ", ".join(f"{tuple(x.shape)} on {x.device.type}" for x in tensors)
            raise RuntimeError(f"{func}: expected all tensors on one device, got {said}")

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        schema = func._schema
        aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
        if name in NO_LAUNCH or any(not alias.is_write for alias in aliases):
            return
        moved = 0
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            times = 2 if writes and name not in OVERWRITES else 1
            moved += times * _bytes(value)
        moved += 0 if aliases else _bytes(out)
        self.launches.append(Launch(name, moved, _place()))


class _Dispatch(TorchDispatchMode):
    """Sees the operators without a tensor of the device among their arguments, too."""

    def __init__(self, watch: FakeCuda) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.watch.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What is settled before any operator: where a tensor is made, and moves between devices."""

    def __init__(self, watch: FakeCuda) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        first, watch = args[0] if args else None, self.watch
        if name == "pin_memory":
            made = first.clone()
            made.is_pinned_copy = True
            return made
        if name in ("to", "cuda", "cpu") and isinstance(first, Tensor):
            return self._move(func, name, args, kwargs)
        if name == "tolist" and isinstance(first, FakeTensor):
            watch.wait("look")
            return first.data_of_it.tolist()
        if name == "numpy" and isinstance(first, FakeTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use .cpu() first")
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        if torch.device(device).type != "cuda":
            return func(*tree_map(_data, args), **kwargs)
        if name in ("tensor", "as_tensor"):
            watch.wait("copy from the host")
        made = func(*args, **kwargs | {"device": "cpu" if first is None else watch.data})
        return made if isinstance(made, FakeTensor) else FakeTensor(made.detach(), watch)

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        x, rest = args[0], list(args[1:])
        device = {"cuda": CUDA, "cpu": torch.device("cpu")}.get(name, kwargs.pop("device", None))
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):
                device, rest[i] = value.device, value.dtype
            elif isinstance(value, str | torch.device):
                device = rest.pop(i)
                break
        here = isinstance(x, FakeTensor)
        if device is None or (torch.device(device).type == "cuda") == here:
            return func(x, *rest, **kwargs) if rest or kwargs else x
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{tuple(x.shape)}: a move between devices with a gradient")
        pinned = getattr(x, "is_pinned_copy", False) and kwargs.pop("non_blocking", False)
        if not pinned:
            self.watch.wait("copy to the host" if here else "copy from the host")
        kwargs.pop("non_blocking", None)
        data = _data(x).detach()
        data = data.to(*rest, **kwargs) if rest or kwargs else data
        return data.clone() if here else self.watch.tensor(data)


def _place() -> str:
    """The file, line and function of the nearest frame of the trainer or its ops."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)):
            path = Path(file).relative_to(ROOT)
            if path.parts[0] in ("intfast", "kernels"):
                return f"{path}:{frame.f_lineno} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def _data(x: Any) -> Any:
    return x.data_of_it if isinstance(x, FakeTensor) else x


def _bytes(value: Any) -> int:
    tensors = (x for x in tree_flatten(value)[0] if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)
