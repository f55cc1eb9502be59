"""What starting vLLM changes in this process, recorded before and put back after.

Left as vLLM leaves it, because it needs it while it runs: its own VLLM_* variables, the process
group of this one process (made only where there was none), on CUDA its current stream, on a CPU
the no-op functions of torch.accelerator and memory bound to one NUMA node.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch.backends import cuda as backends


def _set_environment(values: Mapping[str, str]) -> None:
    for name in _environment().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}


def _cuda_random() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


# Name -> (read, write). The function that sets threads comes first: vLLM replaces it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "set_num_threads": (
        lambda: torch.set_num_threads,
        lambda function: setattr(torch, "set_num_threads", function),
    ),
    "threads": (torch.get_num_threads, lambda number: torch.set_num_threads(number)),
    "environment": (_environment, _set_environment),
    "python random state": (random.getstate, random.setstate),
    "numpy random state": (numpy.random.get_state, numpy.random.set_state),
    "torch random state": (torch.get_rng_state, torch.set_rng_state),
    "cuda random states": (
        _cuda_random,
        lambda states: states and torch.cuda.set_rng_state_all(states),
    ),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn attention": (backends.cudnn_sdp_enabled, backends.enable_cudnn_sdp),
    "flash attention": (backends.flash_sdp_enabled, backends.enable_flash_sdp),
    "efficient attention": (backends.mem_efficient_sdp_enabled, backends.enable_mem_efficient_sdp),
    "math attention": (backends.math_sdp_enabled, backends.enable_math_sdp),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "gc thresholds": (gc.get_threshold, lambda numbers: gc.set_threshold(*numbers)),
    "gc frozen": (lambda: gc.get_freeze_count() > 0, lambda frozen: frozen or gc.unfreeze()),
    "excepthook": (lambda: sys.excepthook, lambda hook: setattr(sys, "excepthook", hook)),
}


def state() -> dict[str, Any]:
    """Every setting that `preserved` puts back, as it is now."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


@contextmanager
def preserved(environment: Mapping[str, str]) -> Iterator[None]:
    """Run the body with these variables set; afterwards every setting is as it was before."""
    before = state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            os.environ.update(environment)
            yield
    finally:
        for name, (_, write) in _SETTINGS.items():
            write(before[name])
