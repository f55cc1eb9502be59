"""The engine of a run and the decoder that it generates with, together: they share weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from msgspec.structs import replace

from intfast import ranks
from intfast.config import Config
from intfast.engine import memory
from intfast.engine.device import pick_kernels, use_flash_attention
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Choice, Engine, pick_engine
from intfast.model import shards, weights
from intfast.model.decoder import Decoder
from intfast.model.layer_ops import plain_ops


def start(config: Config, folder: Path, device: torch.device) -> tuple[Decoder, Engine, Choice]:
    """The decoder to train, with the weights in `folder`, and an engine that reads its parameters.

    Raises ValueError for settings and RuntimeError for an environment that cannot work, before
    weights are loaded.
    """
    rollout = config.rollout
    kernels = pick_kernels(config.model.kernels, device.type)
    config = replace(config, model=replace(config.model, kernels=kernels.name))
    choice = pick_engine(rollout.engine, device.type)
    architecture = weights.check(folder)
    plain = "" if kernels.name == "torch" else plain_ops(architecture)
    reasons = filter(None, (kernels.reason, use_flash_attention(device.type), plain))
    choice = choice._replace(kernels=kernels.name, kernels_reason="; ".join(reasons))
    longest = architecture.max_positions
    if (rollout.context or 0) > longest:
        raise ValueError(
            f"rollout.context = {rollout.context} is more than the model's {longest} positions"
        )
    here, family = ranks.now(), weights.read_config(folder)["model_type"]
    if config.ranks.tp != here.tp:
        raise ranks.Refused(
            f"ranks.tp = {config.ranks.tp}: expected as many processes for a model, got {here.tp}; "
            "start the run with torchrun, or use ranks.tp=1"
        )
    if here.tp > 1 and choice.name == "native":
        raise ranks.Refused(
            f"ranks.tp = {here.tp} needs vLLM: the embedded engine holds whole models alone "
            f"({choice.reason}); install vLLM and use rollout.engine=vllm, or ranks.tp=1"
        )
    fault = shards.fault(family, architecture, here.tp)
    if fault := fault or memory.indivisible(architecture, here.dp, here.tp):
        raise ranks.Refused(fault)
    target = memory.target_of(config, device, choice.name)
    config = memory.Plan(config, architecture, target).settled()
    if choice.name == "vllm":
        from intfast.engine import vllm_start

        engine = vllm_start.start(folder, config, device)
        engine.decoder.activation_checkpointing = config.model.activation_checkpointing
        return engine.decoder, engine, choice
    dtype = getattr(torch, config.model.dtype)
    decoder, _ = weights.load(folder, dtype, device, config.model.kernels)
    decoder.activation_checkpointing = config.model.activation_checkpointing
    cache = int(config.rollout.cache_gib * memory.GIB)
    native = NativeEngine(decoder, max_rows=rollout.max_rows, max_cache_bytes=cache)
    choice = choice._replace(bits=native.shapes.said, bits_hold=native.shapes.holds)
    return decoder, native, choice


def prompt_reuse(engine: Engine) -> Callable[[], dict[str, float]]:
    """The share of prompt tokens that were not computed, since the last time it was asked."""
    before = engine.prompt_reuse

    def take() -> dict[str, float]:
        nonlocal before
        mine = [now - then for now, then in zip(engine.prompt_reuse, before, strict=True)]
        before = engine.prompt_reuse
        asked, reused = map(sum, zip(*ranks.now().gather(mine), strict=True))
        return {"prompt_reuse": round(reused / asked, 4)} if asked else {}

    return take
