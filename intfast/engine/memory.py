"""What a run needs in memory, by arithmetic on the config, and whether the device holds it.

Two sums: while training (weights, optimizer, gradients, activations of one micro-batch, loss head)
and while generating (weights, optimizer, a forward over prompts, sampling). The engine's keys and
values are in both, unless it sleeps. tests/test_memory.py compares the activations with the peak
that torch's allocator reports.

All sizes are bytes unless their name says otherwise.
"""

from __future__ import annotations

import json
import os
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from intfast import ranks
from intfast.config import Config, SamplingConfig
from intfast.engine.cache import bytes_per_slot, round_up
from intfast.engine.generation import PREFILL_TOKENS
from intfast.engine.protocol import CHUNK_SAMPLES
from intfast.engine.sizes import (
    largest_layer,
    layer_numbers,
    num_parameters,
    own_sizes,
    selective_numbers,
)
from intfast.kernels.head.plan import DEFAULT_CHUNK_BYTES
from intfast.labels import by_method
from intfast.model.decoder import Architecture, Decoder
from intfast.model.fixed import BLOCK

GIB = 2**30
PROMPT_TOKENS = 1024
"""Assumed longest prompt: the planner reads no data."""
USABLE = 0.95
"""Share of the memory that is planned with; the rest is lost between allocations."""
SAMPLE_BYTES = 72
"""Of a sampled token: its id and its log-prob, as Python numbers in lists."""
OVERHEAD = {
    ("cuda", "native"): GIB,
    ("cuda", "vllm"): 3 * GIB,
    ("cpu", "native"): GIB // 2,
    ("cpu", "vllm"): 3 * GIB // 2,
}
"""Assumed: CUDA's context; vLLM's graphs and work space; on the CPU the interpreter's imports."""


class Target(NamedTuple):
    """Where the run is to happen: on "cuda" or "cpu", with the engine "native" or "vllm"."""

    kind: str
    engine: str
    total: int
    free: int
    ranks: int = 1
    """Each with such a device of its own."""


class Item(NamedTuple):
    """One line of the plan."""

    what: str
    training: int
    generating: int


class Plan:
    """What a run of `config` needs on `target`, line by line, and whether it fits."""

    def __init__(self, config: Config, architecture: Architecture, target: Target) -> None:
        self.whole, self.target = architecture, target
        self.config = config = self._with_checkpointing(config)
        # Of ranks that hold the model together, all sizes are those of the first, the largest.
        tp = config.ranks.tp
        self.architecture = own_sizes(architecture, tp)
        self.copies = target.ranks // tp
        self.dtype = getattr(torch, config.model.dtype)
        self.width = self.dtype.itemsize
        self.context = config.rollout.context or architecture.max_positions
        # The CPU paths of the ops widen the factors of their products.
        self.widens = target.kind == "cpu" and self.width < 4

    def _with_checkpointing(self, config: Config) -> Config:
        """With a value in place of "auto": the least recomputation that the device has room for.

        It leaves the engine half of the keys and values that it has with the most, or more. As in
        `cache_bytes`, the whole device counts.
        """
        if config.model.activation_checkpointing != "auto":
            return config
        found = []
        for how in (True, "selective", False):
            chosen = replace(config, model=replace(config.model, activation_checkpointing=how))
            found.append(Plan(chosen, self.whole, self.target))
        least = found[0].cache_bytes() / 2
        for plan in (found[2], found[1]):
            if plan.left(self.target.total) >= 0 and plan.cache_bytes() >= least:
                return plan.config
        return found[0].config

    def changed(self, path: str, value: Any) -> Plan:
        """The plan with another value of `section.name`."""
        section, _, name = path.partition(".")
        part = replace(getattr(self.config, section), **{name: value})
        return Plan(replace(self.config, **{section: part}), self.whole, self.target)

    # --- the arithmetic ---

    def items(self) -> list[Item]:
        """The plan, line by line."""
        config, target = self.config, self.target
        num, width = num_parameters(self.architecture), self.width
        # Every rank has the whole weights of its shard, and a part of the optimizer's state.
        part, said = num // self.copies, f", 1/{self.copies}" if self.copies > 1 else ""
        state = config.model.optimizer_state if width < 4 else "fp32"
        masters = {"fp32": 4}.get(state, 2) * part if width < 4 else 0
        # Of dealt gradients there are the own parts, and the largest layer before it is dealt.
        is_dealt = config.ranks.gradients == "dealt" and self.copies > 1
        gradients = 4 * (part + largest_layer(self.architecture) if is_dealt else num)
        moments = (4 if state == "short" else 8) * part
        overhead = OVERHEAD[target.kind, target.engine]
        # Journals stay on the disk; in host memory are the samples that are not written yet.
        longest = max(sampling.max_new_tokens for _, sampling in self.requests())
        drawn = CHUNK_SAMPLES * longest * SAMPLE_BYTES if target.kind == "cpu" else 0
        trained = f"a micro-batch of {config.batch.max_tokens:,} tokens: activations, loss head"
        cache = self.cache_bytes()
        items = [
            Item(f"weights, {config.model.dtype}, once", num * width, num * width),
            Item(f"fp32 masters{', split' * (state != 'fp32')}{said}", masters, masters),
            Item(f"AdamW moments, {'bf16' if state == 'short' else 'fp32'}{said}", *2 * [moments]),
            Item(f"gradients, fp32{said * is_dealt}", gradients, 0),
            Item(trained, self.micro_batch(), 0),
            Item(f"prompts and sampling of {config.rollout.max_rows:,} rows", 0, self.sampling()),
            Item(f"{CHUNK_SAMPLES:,} samples, before they are on the disk", 0, drawn),
            Item("keys and values of the engine", 0 if config.rollout.sleep else cache, cache),
            Item(f"{target.engine} engine and libraries, assumed", overhead, overhead),
        ]
        if target.engine == "vllm" and config.rollout.engine == "vllm_copy":
            items.append(Item("vLLM's copy of the weights", num * width, num * width))
        if config.rl.steps and (config.rl.policy.kl or by_method(config.rl, "frozen")):
            items.append(Item("reference model", num * width, num * width))
        return items

    def peaks(self) -> tuple[int, int]:
        """What is needed at once while training, and while generating."""
        items = self.items()
        return sum(item.training for item in items), sum(item.generating for item in items)

    def left(self, memory: int) -> int:
        """What stays free of so much memory at the higher peak; negative: it does not fit."""
        return int(USABLE * memory) - max(self.peaks())

    def fits(self) -> bool:
        """Whether what is free now is enough."""
        return self.left(self.target.free) >= 0

    def micro_batch(self) -> int:
        """What one micro-batch of `batch.max_tokens` keeps, and the most that comes on top.

        Kept are the numbers of all layers, with checkpointing their inputs and what it keeps. On
        top come either the loss head, or the gradients inside one layer and, with checkpointing,
        the rest of that layer again.
        """
        a, tokens = self.architecture, self.config.batch.max_tokens
        layer, top = layer_numbers(a) * self.width, self._layer_gradients()
        if self.target.kind == "cuda" and self.width == 4:
            # Padded attention keeps keys and values of every query head; see model/attention.py.
            layer += 2 * (a.num_heads - a.num_kv_heads) * a.head_dim * self.width
        kept = a.num_layers * layer
        if how := self.config.model.activation_checkpointing:
            inside = selective_numbers(a) * self.width if how == "selective" else 0
            kept = a.num_layers * (a.hidden_size * self.width + inside)
            top += layer - inside
        return kept * tokens + max(top * tokens, self._loss_head())

    def _layer_gradients(self) -> int:
        """Bytes a token of gradients inside one layer: of feed-forward, attention or a norm."""
        a, width = self.architecture, self.width
        query = a.num_heads * a.head_dim
        parts = [2 * a.intermediate_size * width]
        # Incoming gradient, normalised input, their product and the outgoing one, in fp32.
        parts.append(max(a.hidden_size, query if a.qk_norm else 0) * 4 * (4 if width < 4 else 2))
        if self.target.kind == "cuda":
            # In and out, those of keys and values for every query head, the query's sum in fp32.
            parts.append(query * (4 * width + 4))
        return max(parts)

    def _loss_head(self) -> int:
        """A chunk of logits, and the gradients of head and hidden states; all rows carry loss."""
        a, tokens = self.architecture, self.config.batch.max_tokens
        logits = tokens * a.vocab_size * 4
        # Over several chunks the gradient adds up in fp32 before it is rounded.
        several = 4 if logits > DEFAULT_CHUNK_BYTES else 0
        gradient = a.vocab_size * a.hidden_size * (several + self.width)
        hidden = 2 * tokens * a.hidden_size * self.width
        if self.widens:
            hidden += (a.vocab_size + tokens) * a.hidden_size * 4
        return min(DEFAULT_CHUNK_BYTES, logits) + gradient + hidden

    def sampling(self) -> int:
        """A forward over prompts, or drawing one token of every row; the larger of the two."""
        a = self.architecture
        truncated = any(s.top_p < 1 or s.top_k for _, s in self.requests())
        # fp32 logits, scaled, log-softmax, exponentials, fp64 sums; sorted copies for top-k, top-p.
        # Of the whole vocabulary, also where ranks hold it together.
        draw = self.config.rollout.max_rows * self.whole.vocab_size * (60 if truncated else 24)
        if self.widens:
            draw += a.vocab_size * a.hidden_size * 4
        prefill = PREFILL_TOKENS * (3 * a.intermediate_size + 4 * a.hidden_size) * self.width
        return max(draw, prefill)

    def requests(self) -> list[tuple[int, SamplingConfig]]:
        """(assumed prompt tokens, sampling) of every kind of request that this config makes."""
        config = self.config
        found = [(PROMPT_TOKENS, config.evaluate.sampling)] if config.data.test else []
        if config.rl.steps:
            found.append((PROMPT_TOKENS, config.rl.sampling))
        attempts, stage = config.attempts.sampling, config.intervene
        if config.needs_attempts:
            found.append((PROMPT_TOKENS, attempts))
        if config.needs_interventions:
            # The attempt is part of the verifier's prompt, its beginning of a continuation's.
            found.append((2 * PROMPT_TOKENS + attempts.max_new_tokens, stage.sampling))
            found.append((PROMPT_TOKENS + attempts.max_new_tokens, stage.continuation))
        return found or [(PROMPT_TOKENS, config.rl.sampling)]

    def longest(self, unit: int, requests: list[tuple[int, SamplingConfig]]) -> int:
        """Tokens of the longest sequence of these requests, in whole units."""
        longest = max(prompt + sampling.max_new_tokens for prompt, sampling in requests)
        return round_up(min(self.context, longest), unit)

    def sample_bytes(self) -> int:
        """Keys and values of the longest sample; vLLM wants room for a whole context."""
        is_vllm = self.target.engine == "vllm"
        slots = self.context + 4 * BLOCK if is_vllm else self.longest(BLOCK, self.requests())
        return slots * bytes_per_slot(self.architecture, self.dtype)

    def cache_bytes(self) -> int:
        """Bytes for keys and values: `rollout.cache_gib`, or for "auto" what is left of the device.

        "auto" is at most what `rollout.max_rows` of the longest samples can use, and at least one
        of them, for the embedded engine two. It follows from the whole device and not from what
        happens to be free, so that a run that is continued gets the same.
        """
        rollout = self.config.rollout
        if rollout.cache_gib != "auto":
            return int(rollout.cache_gib * GIB)
        training, generating = self.changed("rollout.cache_gib", 0).peaks()
        needed = generating if rollout.sleep else max(training, generating)
        sample = self.sample_bytes()
        least = sample if self.target.engine == "vllm" else 2 * sample
        left = int(USABLE * self.target.total) - needed
        return max(least, min(left, (rollout.max_rows + 1) * sample))

    # --- what to change ---

    def settled(self) -> Config:
        """The config with `rollout.cache_gib` as a number. Raises ValueError when it cannot fit."""
        if not self.fits():
            training, generating = self.peaks()
            kind, _, total, free, _ = self.target
            raise ValueError(
                f"the run does not fit: it needs {training / GIB:.1f} GiB while training and "
                f"{generating / GIB:.1f} GiB while generating; of {total / GIB:.1f} GiB "
                f"({kind}) {free / GIB:.1f} GiB are free, {USABLE:.0%} of them usable\n  "
                + "\n  ".join(self.remedies())
                + "\n--dry-run shows the plan; model.memory_gib overrides what is free"
            )
        return self.changed("rollout.cache_gib", self.cache_bytes() / GIB).config

    def remedies(self) -> list[str]:
        """Settings that, each alone, make the plan fit what is free; else those that help."""
        config, context = self.config, self.longest(1024, self.requests())
        trained = [(PROMPT_TOKENS, config.rl.sampling)] if config.rl.steps else self.requests()
        tokens = self.longest(1024, trained)
        rows = config.rollout.max_rows
        while rows > 16 and not self.changed("rollout.max_rows", rows).fits():
            rows //= 2
        is_long, is_vllm = config.batch.max_tokens > tokens, self.target.engine == "vllm"
        # The least recomputation that is enough.
        kept, state = "model.activation_checkpointing", "model.optimizer_state"
        wanted = {
            kept: "selective" if self.changed(kept, "selective").fits() else True,
            "batch.max_tokens": (self.largest_batch(tokens) or tokens) if is_long else None,
            "rollout.context": context if is_vllm and self.context > context else None,
            "rollout.max_rows": rows,
            "rollout.sleep": True,
            "rollout.cache_gib": "auto",
            "ranks.gradients": "dealt" if self.target.ranks > 1 else None,
            "model.dtype": "bfloat16",
            state: "split" if self.changed(state, "split").fits() else "short",
        }
        wanted = {k: v for k, v in wanted.items() if v not in (None, attrgetter(k)(config))}
        # JSON and TOML write these values the same way.
        said = {path: f"{path} = {json.dumps(value)}" for path, value in wanted.items()}
        enough = [path for path, value in wanted.items() if self.changed(path, value).fits()]
        if enough:
            return [f"fits with {said[path]}" for path in enough]
        lines = [f"helps, but alone is not enough: {text}" for text in said.values()]
        planned, used = self, []
        for path, value in wanted.items():
            changed = planned.changed(path, value)
            # Without what the others leave no use for.
            if sum(changed.peaks()) < sum(planned.peaks()):
                planned, used = changed, [*used, said[path]]
            if planned.fits():
                return [*lines, f"fits with {', '.join(used)} together"]
        last = "a smaller model (model.path), shorter samples (max_new_tokens), or a larger device"
        return [*lines, last]

    def largest_batch(self, least: int) -> int | None:
        """The largest `batch.max_tokens` that fits, from `least` on in steps of 1,024; or None."""
        if not self.changed("batch.max_tokens", least).fits():
            return None
        tokens, step = least, 2**20
        while step >= 1024:
            while tokens < 2**24 and self.changed("batch.max_tokens", tokens + step).fits():
                tokens += step
            step //= 2
        return tokens


# --- the device ---


def indivisible(architecture: Architecture, num: int, tp: int = 1) -> str:
    """Why so many ranks cannot share the optimizer's state of a model; "" where they can.

    tp: ranks that hold each of so many copies
    """
    if num == 1:
        return ""
    kinds = {own_sizes(architecture, tp, rank) for rank in (0, tp - 1)}
    decoders = [Decoder(kind, torch.float32, "meta") for kind in kinds]
    bad = [name for d in decoders for name, p in d.named_parameters() if p.numel() % num]
    if not bad:
        return ""
    return (
        f"{num} ranks do not divide {len(bad)} parameters of the model, first {bad[0]}; start a "
        "power of two, as with --nproc-per-node 2"
    )


def target_of(config: Config, device: torch.device, engine: str, num: int = 0) -> Target:
    """The device as it is, or with `model.memory_gib` of memory, all of it free; of `num` ranks."""
    if config.model.memory_gib is not None:
        total = free = int(config.model.memory_gib * GIB)
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        # Ranks on the CPU of one machine share its memory.
        total, free = (size // max(num, ranks.now().neighbours) for size in _ram())
    return Target(device.type, engine, total, free, num or ranks.now().world)


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
