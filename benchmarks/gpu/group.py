"""Checks and figures of one kind in a process of their own: a CUDA error poisons its process.

python -m benchmarks.gpu.group GROUP [device=cpu] [out=DIR] [key=value ...]

Each check prints "CHECK name ok|FAIL text", each figure "FIGURE name value"; a row of all of them
is appended to out/. On a CPU everything is small, and its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, timing
from intfast.model.decoder import Architecture, Decoder

SHAPES = {
    "4b": {"hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 9728},
    "0.6b": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 3072},
    "tiny": {
        "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
        "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 300,
    },
}  # fmt: skip
LAYERS = {"4b": 36, "0.6b": 28}


class Group:
    """What the checks of a group share."""

    def __init__(self, name: str, device: str, out: Path, words: dict[str, str]) -> None:
        self.name, self.device, self.out, self.words = name, device, out, words
        self.is_cuda = device == "cuda"
        self.failed: list[str] = []
        self.figures: dict[str, Any] = {}

    @contextmanager
    def checking(self, name: str) -> Iterator[list[str]]:
        """One check: an exception fails it and stops nothing; what is appended is printed."""
        start, said = time.perf_counter(), []
        try:
            yield said
            self.wait()
        except Exception as error:
            self.failed.append(name)
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = [
                f"{type(error).__name__}: {str(error)[:400]!r} at {place.filename}:{place.lineno}"
            ]
        status = "FAIL" if name in self.failed else "ok"
        seconds = time.perf_counter() - start
        print(f"CHECK {name} {status} {' '.join(said)} [{seconds:.1f} s]", flush=True)

    def figure(self, name: str, **values: Any) -> None:
        """Print and keep what was measured."""
        self.figures[name] = values
        print(f"FIGURE {name} {json.dumps(values)}", flush=True)

    def wait(self) -> None:
        """For the device."""
        timing.synchronize(self.device)

    def seconds(self, step: Callable[[], Any], rounds: int = 3, warmup: int = 1) -> float:
        """Median of a step, the device included."""
        found = []
        for _ in range(warmup + rounds):
            self.wait()
            start = time.perf_counter()
            step()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[warmup:])

    def store(self) -> None:
        """Append the row."""
        words = {"device": self.device, "results": self.out}
        setting = {"group": self.name, **self.words}
        row = {"setting": setting, "figures": self.figures | {"failed": self.failed}}
        harness.append("gpu", row, argparse.Namespace(**words), "python -m benchmarks.gpu.group")


def architecture(shape: str = "tiny", **changes: Any) -> Architecture:
    """A Qwen3 of one of SHAPES with other keys of its config.json."""
    keys = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936,
        "num_hidden_layers": LAYERS.get(shape), "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40_960, "tie_word_embeddings": True,
    }  # fmt: skip
    return Architecture.from_hf(keys | SHAPES[shape] | changes)


def filled(
    config: Architecture,
    dtype: torch.dtype,
    device: str,
    kernels: str = "torch",
    rounded: torch.dtype | None = None,
) -> Decoder:
    """A decoder of random weights, the same on every device for small ones.

    rounded: a type that the weights are rounded to first
    """
    decoder = Decoder(config, dtype, device, kernels)
    place = "cpu" if config.hidden_size < 1024 else device
    made = torch.Generator(place).manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            mean, spread = (1.0, 0.1) if parameter.ndim == 1 else (0.0, parameter.shape[-1] ** -0.5)
            x = torch.empty(parameter.shape, device=place).normal_(mean, spread, generator=made)
            parameter.copy_(x.to(rounded or x.dtype))
    return decoder


def relative(found: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact one."""
    exact = exact.double().cpu()
    return float((found.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30))


def groups() -> dict[str, Callable[[Group], None]]:
    """All groups by name."""
    # Here, as both import this file.
    from benchmarks.gpu import checks, figures

    return {**checks.GROUPS, **figures.GROUPS}


def main(arguments: list[str]) -> int:
    """Run one group; the exit status is 1 when a check failed."""
    name, words = arguments[0], dict(word.split("=", 1) for word in arguments[1:])
    group = Group(name, words.pop("device", "cuda"), Path(words.pop("out", "gpu-out")), words)
    groups()[name](group)
    group.store()
    print(f"GROUP {name}: {len(group.failed)} failed {group.failed}")
    return 1 if group.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
