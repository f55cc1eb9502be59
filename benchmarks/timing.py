"""Times of steps in turns with CUDA events, and the memory that a step needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Step = Callable[[], object]

# Larger than any L2: what a cold step reads comes from memory.
FLUSH_BYTES = 256 << 20
# Cycles that the device waits so that the host can queue the events and the step behind it.
BACKLOG_CYCLES = 2_000_000
# Longer steps hide the host's work behind their own first kernels.
SHORT_SECONDS = 2e-3


@dataclass(frozen=True)
class Sample:
    """How often and how each step is timed."""

    device: str
    rounds: int
    warmup: int
    cold: bool


def first_call(step: Step, device: str) -> float:
    """Seconds of a first call: compilation and warm-up, which no other figure contains."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(steps: dict[str, Step], sample: Sample) -> dict[str, list[float]]:
    """Seconds of each step in each round; every round runs all of them, in turning order.

    A hot step runs right after an untimed call of itself, a cold one after the caches were
    overwritten.
    """
    names = list(steps)
    timer = _CudaTimer(sample) if sample.device.startswith("cuda") else _host_seconds
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(sample.warmup + sample.rounds):
        for name in names if turn % 2 else reversed(names):
            if not sample.cold:
                steps[name]()
            value = timer(steps[name])
            if turn >= sample.warmup:
                seconds[name].append(value)
    return seconds


def peak_bytes(step: Step, device: str) -> int | None:
    """Most memory above what was there before, returned gradients included; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _host_seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class _CudaTimer:
    def __init__(self, sample: Sample) -> None:
        self.cold = sample.cold
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=sample.device)
        self.long: set[Step] = set()

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.cold:
            self.scratch.zero_()
        if step not in self.long:
            # Without a backlog a short kernel would be timed at the host's launch rate.
            torch.cuda._sleep(BACKLOG_CYCLES)
        start.record()
        step()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) * 1e-3
        if seconds > SHORT_SECONDS:
            self.long.add(step)
        return seconds
