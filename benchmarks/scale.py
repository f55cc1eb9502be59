"""An update by layout: a world of one under torchrun, and two ranks, against one process.

Every layout trains the same model on the same batch. Before anything is timed, a world of one must
have the weights of one process to the bit, and two ranks to rounding. A row holds ratios: of the
CPU time of a rank's update, of the part of it that reduces, steps and gathers, and of the memory
that torch's allocator held at most. Ranks that share a CPU show what dealing costs, not what it
gains.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quickstart_task import base
from intfast import loss, ranks, update
from intfast.batch import pack
from intfast.config import BatchConfig, OptimConfig
from intfast.model import optim
from intfast.model.decoder import Architecture, Decoder
from intfast.records import Example

NAME = "scale"
LAYOUTS = {
    "plain": (0, "fp32", False),
    "world of one": (1, "fp32", False),
    "two ranks": (2, "fp32", False),
    "two ranks, dealt": (2, "fp32", True),
    "two ranks, dealt, short": (2, "short", True),
}
"""Ranks of torchrun (0: without it), `model.optimizer_state`, whether gradients are dealt."""
LIMIT_S = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the model's layers and of a micro-batch."""
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="of each of 4 micro-batches")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row."""
    with tempfile.TemporaryDirectory() as name:
        found = {layout: _launched(layout, Path(name), args) for layout in LAYOUTS}
    plain = found["plain"][0]
    for layout, made in found.items():
        if layout != "plain":
            # A square of other last bits may round the other way.
            exact = {"world of one": 0.0, "two ranks, dealt, short": 1e-2}.get(layout, 1e-5)
            gap = max(abs(w / p - 1) for w, p in zip(made[0]["sums"], plain["sums"], strict=True))
            harness.gate(f"{layout}: sums of weights", gap, exact)
    figures = {}
    for layout, made in found.items():
        slowest = max(made, key=lambda rank: rank["update"])
        figures[layout] = {
            "update_over_plain": round(slowest["update"] / plain["update"], 3),
            "step_share": round(slowest["step"] / slowest["update"], 3),
            "peak_over_plain": round(max(r["peak"] for r in made) / plain["peak"], 3),
        }
        print(f"  {layout}: {figures[layout]}")
    return [{"setting": {"parameters": plain["parameters"]}, "figures": figures}]


def _launched(layout: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank of a layout measured."""
    world, out = LAYOUTS[layout][0], folder / layout.replace(" ", "-")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    sizes = [args.hidden, args.tokens, args.rounds, args.warmup, args.seed]
    words = ["-m", "benchmarks.scale", layout, str(out), *map(str, sizes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *(launch if world else []), *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{layout} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def _measured(layout: str, hidden: int, tokens: int, rounds: int, warmup: int, seed: int) -> dict:
    """Median CPU seconds of an update and of its step, the peak of memory, sums of weights."""
    _, state, dealt = LAYOUTS[layout]
    decoder = Decoder(_architecture(hidden), torch.bfloat16)
    base.initialise(decoder, seed)
    config = OptimConfig(lr=1e-3, schedule="constant")
    optimizer = optim.Optimizer(
        decoder.named_parameters(), config, 10_000, state=state, dealt=dealt
    )  # fmt: skip
    engine = SimpleNamespace(weights_changed=lambda: None)
    opened = SimpleNamespace(
        decoder=decoder, device=torch.device("cpu"), sampler=SimpleNamespace(engine=engine)
    )
    stage = SimpleNamespace(run=opened, optimizer=optimizer, name=NAME)
    ids = [5 + n % 50 for n in range(tokens)]
    made = [Example(token_ids=ids, weights=[0.0] + [1.0] * (tokens - 1)) for _ in range(4)]
    packed = pack(made, BatchConfig(max_tokens=tokens))
    steps, seconds, sound = [], [], optimizer.step

    def step(**options: Any) -> Any:
        begun = time.process_time()
        stats = sound(**options)
        steps.append(time.process_time() - begun)
        return stats

    optimizer.step = step
    activities = [torch.profiler.ProfilerActivity.CPU]
    for turn in range(warmup + rounds):
        begun = time.process_time()
        update.update(stage, packed, packed.weight_sum, loss.sft_loss)
        if turn >= warmup:
            seconds.append(time.process_time() - begun)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        update.update(stage, packed, packed.weight_sum, loss.sft_loss)
    held = [p.nbytes for p in decoder.parameters()]
    held += [x.nbytes for x in optimizer._state().values()]
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {
        "update": harness.percentiles(seconds)["p50"],
        "step": harness.percentiles(steps[warmup:])["p50"],
        "peak": sum(held) + peak,
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "sums": [float(p.double().square().sum()) for p in decoder.parameters()],
    }


def _architecture(hidden: int) -> Architecture:
    """A small Qwen3."""
    return Architecture.from_hf({
        "model_type": "qwen3", "vocab_size": 512, "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
        "hidden_act": "silu", "attention_bias": False,
    })  # fmt: skip


def _main(layout: str, out: str, *sizes: str) -> None:
    with ranks.joined(lambda: torch.device("cpu"), 120.0) as here:
        found = here.gather(_measured(layout, *map(int, sizes)))
        if here.is_main:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
