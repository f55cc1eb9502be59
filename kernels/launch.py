"""What the ops with one Triton path share: the choice of the path, and the size of a launch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .head.plan import HAS_TRITON, needs_triton

if HAS_TRITON:
    import triton.language as tl
    from triton import jit
else:
    # The kernels stay functions that nothing calls.
    tl = None

    def jit(function):
        return function


Path = Literal["auto", "plain", "triton"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def takes_triton(path: Path, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """Whether the Triton path runs: "auto" takes it on CUDA; ValueError where it cannot."""
    if path not in get_args(Path):
        raise ValueError(f"path: expected one of {get_args(Path)}, got {path!r}")
    if path == "plain" or (path == "auto" and not tensor.is_cuda):
        return False
    needs_triton(path, tensor.device)
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"path={path!r}: the Triton kernel is made for {names}, got {tensor.dtype}; "
            "use path='plain'"
        )
    return True


def generates() -> bool:
    """Whether inference mode is on, where few calls count; not while torch.compile traces."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def programs(num_rows: int, device: torch.device, each: int) -> int:
    """How many programs share the rows of a kernel that sums over them: `each` per multiprocessor.

    Each leaves one partial sum behind.
    """
    if device.type != "cuda":
        return min(num_rows, 3)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_rows, each * processors)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`: a block of Triton's."""
    return 1 << max(0, size - 1).bit_length()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its last axis has gaps: rows are read in one piece."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
