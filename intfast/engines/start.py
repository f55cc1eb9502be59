"""The engine of a run and the decoder that it generates with, together: they share weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from intfast import memory, weights
from intfast.config import Config
from intfast.engines.native import NativeEngine
from intfast.model import Decoder
from intfast.rollout import Choice, Engine, pick_engine


def start(
    config: Config, folder: Path, device: torch.device, tokenizer: Any
) -> tuple[Decoder, Engine, Choice]:
    """The decoder to train, with the weights in `folder`, and an engine that reads its parameters.

    Raises ValueError for settings and RuntimeError for an environment that cannot work, before
    weights are loaded.
    """
    rollout = config.rollout
    choice = pick_engine(rollout.engine, device.type)
    architecture = weights.check(folder)
    longest = architecture.max_positions
    if (rollout.context or 0) > longest:
        raise ValueError(
            f"rollout.context = {rollout.context} is more than the model's {longest} positions"
        )
    config = memory.settle(config, architecture, memory.target_of(config, device, choice.name))
    if choice.name == "vllm":
        from intfast.engines import vllm_start

        engine = vllm_start.start(folder, config, device, tokenizer)
        return engine.decoder, engine, choice
    if not (config.weights.share and rollout.graphs):
        raise ValueError(
            "weights.share = false and rollout.graphs = false are for vLLM, and this run has the "
            f"embedded engine ({choice.reason}), which has one copy of the weights and no graphs"
        )
    dtype = getattr(torch, config.model.dtype)
    decoder, _ = weights.load(folder, dtype, device, config.model.kernels)
    native = NativeEngine(
        decoder,
        tokenizer,
        max_rows=rollout.max_rows,
        max_cache_bytes=int(config.rollout.cache_gib * memory.GIB),
    )
    choice = choice._replace(bits=native.shapes.said, bits_hold=native.shapes.holds)
    return decoder, native, choice
