"""Timing in turns, the stamp of a row, and the file that rows are appended to."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from intfast.safe_text import redact
from intfast.state.processor import processor

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
STAGED = Path(__file__).parent / "commit.txt"
"""In a copy that travels: its commit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark understands."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="where to run (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch decides)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="turns before them (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")


def times(
    variants: dict[str, Callable[[], Any]],
    args: argparse.Namespace,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; every round runs all of them, in turning order.

    One CPU thread is timed in CPU seconds, which other load does not stretch.
    """
    if clock is None:
        is_alone = not args.device.startswith("cuda") and args.threads == 1
        clock = time.process_time if is_alone else time.perf_counter
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.warmup + args.rounds):
        for name in names if turn % 2 else reversed(names):
            _finish_device_work(args.device)
            start = clock()
            variants[name]()
            _finish_device_work(args.device)
            if turn >= args.warmup:
                seconds[name].append(clock() - start)
    return seconds


def _finish_device_work(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} by linear interpolation."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {f"p{q}": float(f"{tensor.quantile(q / 100).item():.4g}") for q in (20, 50, 80)}


def figures(seconds: dict[str, list[float]], ours: str, device: str) -> dict[str, Any]:
    """How many times as fast `ours` is as each other variant, round by round; on a GPU also ms.

    Prints them, with the times on any device.
    """
    found: dict[str, Any] = {}
    for name, values in seconds.items():
        ms = percentiles([1e3 * s for s in values])
        print(f"  {name:28} {ms['p50']:9.4g} ms   (p20 {ms['p20']:.4g}, p80 {ms['p80']:.4g})")
        if device.startswith("cuda"):
            found[f"{name}_ms"] = ms
    for name, values in seconds.items():
        if name != ours:
            ratio = percentiles([s / o for s, o in zip(values, seconds[ours], strict=True)])
            text = f"{ratio['p50']:.3g} times as fast as {name}"
            print(f"  {ours}: {text} (p20 {ratio['p20']:.3g}, p80 {ratio['p80']:.3g})")
            found[f"speedup_over_{name}"] = ratio
    return found


def gate(name: str, error: float, bound: float) -> None:
    """Refuse to time two things that do not compute the same; raises RuntimeError."""
    print(f"  gate: {name}: {error:.2g} (at most {bound:.2g})")
    # Written so that NaN fails.
    if not error <= bound:
        raise RuntimeError(f"{name}: {error:.3g} is above {bound:.3g}; no time is reported")


def run(
    module: ModuleType, args: argparse.Namespace, program: str = "python -m benchmarks"
) -> None:
    """Run a benchmark (`NAME`, `run(args)`) and store its rows."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.device.startswith("cuda"):
        print("On a CPU: these are not GPU figures, and no times are stored.")
    for row in module.run(args):
        append(module.NAME, row, args, program)


def main(module: ModuleType) -> None:
    """The command line of one benchmark alone, for a machine that has only torch and Triton."""
    program = f"python -m benchmarks.{module.NAME}"
    parser = argparse.ArgumentParser(prog=program, description=module.__doc__)
    add_arguments(parser)
    module.add_arguments(parser)
    run(module, parser.parse_args(), program)


def append(
    benchmark: str,
    row: dict[str, Any],
    args: argparse.Namespace,
    program: str = "python -m benchmarks",
) -> None:
    """Stamp a row and append it to the file of this device."""
    device = device_name(args.device)
    settings = {k: v for k, v in vars(args).items() if k not in ("name", "results")}
    stamp = {
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        # The rows of the same call before this one are no change of the code.
        "dirty": bool(_git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")),
        # Where the row goes has no part in what it says, and may name a private folder.
        "command": re.sub(r" --results[ =]\S+", "", redact(f"{program} {' '.join(sys.argv[1:])}")),
        "device": device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "arguments": settings,
    }
    is_gpu = args.device.startswith("cuda")
    file = args.results / f"{_slug(device) if is_gpu else 'cpu'}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(stamp | row) + "\n")
    print(f"  appended to {file}")


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU where the system tells it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor()["model"]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*command: str) -> str:
    # A machine without git, or a copy without its history, still runs benchmarks; its rows say so,
    # or which commit `python -m benchmarks.gpu stage` copied.
    if STAGED.exists():
        return STAGED.read_text().strip() if command[0] == "rev-parse" else ""
    if shutil.which("git") is None:
        return "no git"
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "no git"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
