"""What a run needs in memory, by arithmetic on the config, and whether the device holds it.

Two sums: while training (weights, optimizer, gradients, activations of one micro-batch, loss head)
and while generating (weights, optimizer, a forward over prompts, sampling). The engine's keys and
values are in both, unless it sleeps. tests/test_memory.py compares the activations with the peak
that torch's allocator reports.

All sizes are bytes unless their name says otherwise.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from intfast.config import Config, SamplingConfig
from intfast.engine.cache import BLOCK, bytes_per_slot, round_up
from intfast.engine.generation import PREFILL_TOKENS
from intfast.kernels.head.plan import DEFAULT_CHUNK_BYTES
from intfast.model.decoder import Architecture, Decoder

Requests = Sequence[tuple[int, SamplingConfig]]
GIB = 2**30
PROMPT_TOKENS = 1024
"""Assumed longest prompt: the planner reads no data."""
USABLE = 0.95
"""Share of the memory that is planned with; the rest is lost between allocations."""
OVERHEAD = {("cuda", "native"): GIB, ("cuda", "vllm"): 3 * GIB, ("cpu", "native"): GIB // 2}
"""Assumed: CUDA's context; vLLM's graphs and work space; on the CPU the interpreter's imports."""
VLLM_OVERHEAD_CPU = 3 * GIB // 2


class Target(NamedTuple):
    """Where the run is to happen."""

    kind: str
    """"cuda" or "cpu"."""
    engine: str
    """"native" or "vllm"."""
    total: int
    free: int


class Item(NamedTuple):
    """One line of the plan."""

    what: str
    training: int
    generating: int


class Plan(NamedTuple):
    """What is needed, line by line."""

    items: list[Item]

    @property
    def training(self) -> int:
        """Peak while training."""
        return sum(item.training for item in self.items)

    @property
    def generating(self) -> int:
        """Peak while generating."""
        return sum(item.generating for item in self.items)

    def left(self, memory: int) -> int:
        """What stays free of so much memory at the higher peak; negative: it does not fit."""
        return int(USABLE * memory) - max(self.training, self.generating)


# --- the arithmetic ----------------------------------------------------------------------------


@functools.cache
def num_parameters(architecture: Architecture) -> int:
    """Parameters of the decoder; tied heads count once."""
    decoder = Decoder(architecture, torch.float32, "meta")
    return sum(parameter.numel() for parameter in decoder.parameters())


def layer_numbers(architecture: Architecture) -> int:
    """Numbers that one layer keeps for its backward pass, per token.

    Each norm: its normalised input and its output; qkv as one piece, because values are a view of
    it; norms and rotation of query and key; the attention output; gate and up, silu(gate), product.
    """
    a = architecture
    query, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    normed = query + kv if a.qk_norm else 0
    attention = (query + 2 * kv) + normed + (query + kv) + query
    return 4 * a.hidden_size + attention + 4 * a.intermediate_size


def micro_batch(config: Config, architecture: Architecture, width: int, kind: str) -> int:
    """What one micro-batch of `batch.max_tokens` keeps, and the most that comes on top.

    Kept are the numbers of all layers, with checkpointing their inputs only. On top come either the
    loss head, or the gradients inside one layer and, with checkpointing, that layer computed again.
    """
    a, tokens = architecture, config.batch.max_tokens
    layer, top = layer_numbers(a), 2 * a.intermediate_size
    kept = a.num_layers * layer
    if config.model.activation_checkpointing:
        kept, top = a.num_layers * a.hidden_size, top + layer
    return kept * tokens * width + max(top * tokens * width, loss_head(a, tokens, width, kind))


def loss_head(architecture: Architecture, tokens: int, width: int, kind: str) -> int:
    """A chunk of logits, and the gradients of head and hidden states; every row carries loss."""
    a = architecture
    single = tokens * a.vocab_size * 4 <= DEFAULT_CHUNK_BYTES
    chunk = min(DEFAULT_CHUNK_BYTES, tokens * a.vocab_size * 4)
    # Over several chunks the gradient adds up in fp32 before it is rounded.
    gradient = a.vocab_size * a.hidden_size * (width if single else 4 + width)
    hidden = 2 * tokens * a.hidden_size * width
    if kind == "cpu" and width < 4:
        # The CPU path widens both factors of its products.
        hidden += (a.vocab_size + tokens) * a.hidden_size * 4
    return chunk + gradient + hidden


def sampling(config: Config, architecture: Architecture, width: int, kind: str) -> int:
    """A forward over prompts, or drawing one token of every row; the larger of the two."""
    a = architecture
    truncated = any(s.top_p < 1 or s.top_k for _, s in requests(config))
    # fp32 logits, scaled, log-softmax, exponentials, fp64 sums; sorted copies for top-k and top-p.
    draw = config.rollout.max_rows * a.vocab_size * (60 if truncated else 24)
    if kind == "cpu" and width < 4:
        draw += a.vocab_size * a.hidden_size * 4
    prefill = PREFILL_TOKENS * (3 * a.intermediate_size + 4 * a.hidden_size) * width
    return max(draw, prefill)


def requests(config: Config) -> list[tuple[int, SamplingConfig]]:
    """(assumed prompt tokens, sampling) of every kind of request that this config makes."""
    found = [(PROMPT_TOKENS, config.evaluate.sampling)] if config.data.test else []
    if config.rl.steps:
        found.append((PROMPT_TOKENS, config.rl.sampling))
    attempts, stage = config.attempts.sampling, config.intervene
    if config.needs_attempts:
        found.append((PROMPT_TOKENS, attempts))
    if config.needs_interventions:
        # The attempt is part of the verifier's prompt, and its beginning of a continuation's.
        found.append((2 * PROMPT_TOKENS + attempts.max_new_tokens, stage.sampling))
        found.append((PROMPT_TOKENS + attempts.max_new_tokens, stage.continuation))
    return found or [(PROMPT_TOKENS, config.rl.sampling)]


def longest(config: Config, architecture: Architecture, made: Requests) -> int:
    """Tokens of the longest sequence of some requests."""
    context = config.rollout.context or architecture.max_positions
    return min(context, max(prompt + sampling.max_new_tokens for prompt, sampling in made))


def sample_bytes(config: Config, architecture: Architecture, engine: str) -> int:
    """Keys and values of the longest sample; vLLM wants room for a whole context."""
    if engine == "vllm":
        slots = (config.rollout.context or architecture.max_positions) + 4 * BLOCK
    else:
        slots = round_up(longest(config, architecture, requests(config)), BLOCK)
    return slots * bytes_per_slot(architecture, getattr(torch, config.model.dtype))


# --- the plan ----------------------------------------------------------------------------------


def make_plan(
    config: Config, architecture: Architecture, target: Target, cache: int | None = None
) -> Plan:
    """The plan of a config; `cache` stands for `rollout.cache_gib` where it is given."""
    cache = cache_bytes(config, architecture, target) if cache is None else cache
    num = num_parameters(architecture)
    narrow = config.model.dtype == "bfloat16"
    width = 2 if narrow else 4
    tokens = config.batch.max_tokens
    trained = micro_batch(config, architecture, width, target.kind)
    drawing = sampling(config, architecture, width, target.kind)
    overhead = OVERHEAD.get((target.kind, target.engine), VLLM_OVERHEAD_CPU)
    items = [
        Item(f"weights, {config.model.dtype}, once", num * width, num * width),
        Item("fp32 masters", 4 * num * narrow, 4 * num * narrow),
        Item("AdamW moments, fp32", 8 * num, 8 * num),
        Item("gradients, fp32", 4 * num, 0),
        Item(f"a micro-batch of {tokens:,} tokens: activations, loss head", trained, 0),
        Item(f"prompts and sampling of {config.rollout.max_rows:,} rows", 0, drawing),
        Item("keys and values of the engine", 0 if config.rollout.sleep else cache, cache),
        Item(f"{target.engine} engine and libraries, assumed", overhead, overhead),
    ]
    if target.engine == "vllm" and config.rollout.engine == "vllm_copy":
        items.append(Item("vLLM's copy of the weights", num * width, num * width))
    if config.rl.steps and config.rl.policy.kl:
        items.append(Item("reference model", num * width, num * width))
    return Plan(items)


def cache_bytes(config: Config, architecture: Architecture, target: Target) -> int:
    """Bytes for keys and values: `rollout.cache_gib`, or for "auto" what is left of the device.

    "auto" is at most what `rollout.max_rows` of the longest samples can use, and at least one of
    them, for the embedded engine two. It follows from the whole device and not from what happens to
    be free, so that a run that is continued gets the same.
    """
    if config.rollout.cache_gib != "auto":
        return int(config.rollout.cache_gib * GIB)
    sample = sample_bytes(config, architecture, target.engine)
    left = make_plan(config, architecture, target, cache=0).left(target.total)
    if config.rollout.sleep:
        left = int(USABLE * target.total) - make_plan(config, architecture, target, 0).generating
    least = sample if target.engine == "vllm" else 2 * sample
    return max(least, min(left, (config.rollout.max_rows + 1) * sample))


def remedies(config: Config, architecture: Architecture, target: Target) -> list[str]:
    """Settings that, each alone, make the plan fit what is free; else those that help."""
    wanted: dict[str, Any] = {}
    if not config.model.activation_checkpointing:
        wanted["model.activation_checkpointing"] = True
    trained = [(PROMPT_TOKENS, config.rl.sampling)] if config.rl.steps else requests(config)
    least = round_up(longest(config, architecture, trained), 1024)
    if config.batch.max_tokens > least:
        wanted["batch.max_tokens"] = largest_batch(config, architecture, target, least) or least
    needed = round_up(longest(config, architecture, requests(config)), 1024)
    if target.engine == "vllm" and (config.rollout.context or architecture.max_positions) > needed:
        wanted["rollout.context"] = needed
    rows = config.rollout.max_rows
    while rows > 16 and not _fits(changed(config, "rollout.max_rows", rows), architecture, target):
        rows //= 2
    if rows < config.rollout.max_rows:
        wanted["rollout.max_rows"] = rows
    if not config.rollout.sleep:
        wanted["rollout.sleep"] = True
    if config.rollout.cache_gib != "auto":
        wanted["rollout.cache_gib"] = "auto"
    if config.model.dtype == "float32":
        wanted["model.dtype"] = "bfloat16"
    # JSON and TOML write these values the same way.
    said = {path: f"{path} = {json.dumps(value)}" for path, value in wanted.items()}
    enough = [
        path
        for path, value in wanted.items()
        if _fits(changed(config, path, value), architecture, target)
    ]
    if enough:
        return [f"fits with {said[path]}" for path in enough]
    return [
        *(f"helps, but alone is not enough: {text}" for text in said.values()),
        "a smaller model (model.path), shorter samples (max_new_tokens), or a larger device",
    ]


def _fits(config: Config, architecture: Architecture, target: Target) -> bool:
    return make_plan(config, architecture, target).left(target.free) >= 0


def changed(config: Config, path: str, value: Any) -> Config:
    """The config with another value of `section.name`."""
    section, _, name = path.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def largest_batch(
    config: Config, architecture: Architecture, target: Target, least: int
) -> int | None:
    """The largest multiple of 1,024 for `batch.max_tokens` that fits, from `least` on; or None."""

    def fits(tokens: int) -> bool:
        return _fits(changed(config, "batch.max_tokens", tokens), architecture, target)

    if not fits(least):
        return None
    low, step = least, 2**20
    while step >= 1024:
        while low < 2**24 and fits(low + step):
            low += step
        step //= 2
    return low


def settle(config: Config, architecture: Architecture, target: Target) -> Config:
    """The config with `rollout.cache_gib` as a number. Raises ValueError when it cannot fit."""
    plan = make_plan(config, architecture, target)
    if plan.left(target.free) < 0:
        raise ValueError(
            f"the run does not fit: it needs {plan.training / GIB:.1f} GiB while training and "
            f"{plan.generating / GIB:.1f} GiB while generating; of {target.total / GIB:.1f} GiB "
            f"({target.kind}) {target.free / GIB:.1f} GiB are free, {USABLE:.0%} of them usable\n  "
            + "\n  ".join(remedies(config, architecture, target))
            + "\n--dry-run shows the plan; model.memory_gib overrides what is free"
        )
    cache_gib = cache_bytes(config, architecture, target) / GIB
    return changed(config, "rollout.cache_gib", cache_gib)


# --- the device --------------------------------------------------------------------------------


def target_of(config: Config, device: torch.device, engine: str) -> Target:
    """The device as it is, or with `model.memory_gib` of memory, all of it free."""
    if config.model.memory_gib is not None:
        total = free = int(config.model.memory_gib * GIB)
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        total, free = _ram()
    return Target(device.type, engine, total, free)


def _ram() -> tuple[int, int]:
    """(all, available) memory of this machine or container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        # Pages of the file cache are given back when they are needed, so they count as free.
        found = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(found["MemAvailable"].split()[0]) * 1024
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            total = min(total, int(text))
    return total, min(total, free)
