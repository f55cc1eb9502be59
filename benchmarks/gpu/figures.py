"""How fast on this device: its ceilings, a training step, memory against the plan, decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.checks import attention_by_cudnn
from benchmarks.gpu.group import Group, architecture, filled, relative
from intfast.batch import Batch, Packed, pack
from intfast.config import BatchConfig, Config, ModelConfig, OptimConfig
from intfast.engine import memory
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Request, Sampling
from intfast.loss import sft_loss
from intfast.model.decoder import Decoder, PackedAttention
from intfast.model.optim import Optimizer
from intfast.records import Example

BF16, FP32 = torch.bfloat16, torch.float32
PEAK = 989e12
"""FLOP/s in bf16 of an H100 or H200 SXM, by the data sheet: what a utilisation is a share of."""


def ceilings(group: Group) -> None:
    """What the card does at best: a product, a copy, launches; attention by every backend."""
    device = group.device
    with group.checking("ceilings"):
        n = 8192 if group.is_cuda else 256
        a, b = (torch.randn(n, n, device=device).to(BF16) for _ in range(2))
        product = 2 * n**3 / group.seconds(lambda: a @ b) / 1e12
        source = torch.empty(2**32 if group.is_cuda else 2**20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() / group.seconds(lambda: target.copy_(source)) / 1e9
        one = torch.zeros(1, device=device)
        launch = group.seconds(lambda: [one.add_(1) for _ in range(2000)]) / 2000 * 1e6
        group.figure(
            "ceilings", bf16_tflops=round(product, 1), copy_gb_s=round(copied), launch_us=launch
        )
    for count in (1, 8):
        _attention(group, count)


def _attention(group: Group, count: int) -> None:
    """Causal attention of Qwen3-4B's heads over 16,384 tokens as `count` sequences."""
    tokens, heads, kv, width = (16_384, 32, 8, 128) if group.is_cuda else (64, 4, 2, 16)
    length = tokens // count
    flops = 2 * tokens * (length + 1) * heads * width
    leaves = [
        torch.randn(tokens, n, width, device=group.device).to(BF16).requires_grad_()
        for n in (heads, kv, kv)
    ]
    attend = PackedAttention([length] * count, group.device)

    def dense() -> Tensor:
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in leaves)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    ways: dict[str, tuple[Callable[[], Tensor], Any]] = {
        "packed": (lambda: attend(0, *leaves, None), nullcontext())
    }
    if group.is_cuda:
        ways["cudnn"] = (dense, sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        ways["flash"] = (dense, sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    expected = None
    for name, (forward, backend) in ways.items():
        with group.checking(f"attention {name} {count} x {length}"), backend:
            out = forward()
            expected = out.detach() if expected is None else expected
            upstream = torch.randn_like(out)

            def both(forward=forward, upstream=upstream) -> None:
                torch.autograd.grad(forward(), leaves, upstream)

            one_way = group.seconds(forward)
            back = group.seconds(both) - one_way
            group.figure(
                f"attention_{name}_{count}x{length}",
                forward_tflops=round(flops / one_way / 1e12, 1),
                backward_tflops=round(2.5 * flops / back / 1e12, 1),
                difference=relative(out.detach(), expected),
            )


def step_4b(group: Group) -> None:
    """Forward, loss, backward and optimizer at Qwen3-4B's shape, by phase, with its utilisation."""
    # All 36 layers with their optimizer need more than an H100 has.
    is_large = group.is_cuda and torch.cuda.mem_get_info()[1] > 120e9
    changes = {"num_hidden_layers": 36 if is_large else 12} if group.is_cuda else {}
    config = architecture("4b" if group.is_cuda else "tiny", **changes)
    tokens = int(group.words.get("tokens", 16_384 if group.is_cuda else 256))
    kernels = group.words.get("kernels", "torch")
    decoder = filled(config, BF16, group.device, kernels)
    decoder.activation_checkpointing = group.words.get("checkpointing", "1") == "1"
    optimizer = Optimizer(decoder.named_parameters(), OptimConfig(), 100)
    for sequences in (1, 8):
        name = f"step_{kernels}_{sequences}x{tokens // sequences}"
        with group.checking(name):
            step = _Step(group, decoder, optimizer, _packed(config.vocab_size, tokens, sequences))
            start = time.perf_counter()
            step()
            group.wait()
            first = time.perf_counter() - start
            if group.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = group.seconds(step)
            peak = torch.cuda.max_memory_allocated() / 2**30 if group.is_cuda else 0
            step.marks = []
            step()
            split = {
                phase: round(1e3 * (end - begin), 1)
                for (_, begin), (phase, end) in zip(step.marks, step.marks[1:], strict=False)
            }
            step.marks = None
            useful, again = _flops(decoder, [tokens // sequences] * sequences)
            group.figure(
                name, layers=config.num_layers, ms=round(1e3 * seconds, 1), split_ms=split,
                first_s=round(first, 1), tokens_per_s=round(tokens / seconds),
                mfu=round(useful / seconds / PEAK, 4),
                hfu=round((useful + again) / seconds / PEAK, 4), peak_gib=round(peak, 2),
            )  # fmt: skip
            if group.is_cuda and sequences == 1:
                _profile(step)


class _Step:
    """One optimizer step; with `marks` it waits after each phase and notes the time."""

    def __init__(self, group: Group, decoder: Decoder, optimizer: Optimizer, packed: Packed):
        (self.batch,) = (batch.to(group.device) for batch in packed.batches)
        self.group, self.decoder, self.optimizer = group, decoder, optimizer
        self.divisor = packed.weight_sum
        self.marks: list[tuple[str, float]] | None = None

    def __call__(self) -> None:
        self._mark("start")
        hidden = self.decoder(*self.batch.inputs())
        self._mark("forward")
        loss, _ = sft_loss(hidden, self.decoder.head_weight_VD, self.batch)
        self._mark("head")
        (loss / self.divisor).backward()
        self._mark("backward")
        self.optimizer.step(loss=1.0)
        self._mark("optimizer")

    def _mark(self, phase: str) -> None:
        if self.marks is not None:
            self.group.wait()
            self.marks.append((phase, time.perf_counter()))


def _packed(vocabulary: int, tokens: int, sequences: int) -> Packed:
    """One micro-batch of random tokens, all with loss."""
    generator, length = torch.Generator().manual_seed(5), tokens // sequences
    examples = [
        Example(
            token_ids=torch.randint(vocabulary, (length + 1,), generator=generator).tolist(),
            weights=[0.0] + [1.0] * length,
        )
        for _ in range(sequences)
    ]
    return pack(examples, BatchConfig(max_tokens=tokens))


def _flops(decoder: Decoder, lengths: list[int]) -> tuple[int, int]:
    """(of a step, of what checkpointing computes again): 6 per weight and token, attention once."""
    config, tokens = decoder.config, sum(lengths)
    head = config.vocab_size * config.hidden_size
    # The embedding is the head, and computes nothing of its own.
    body = sum(p.numel() for p in decoder.parameters()) - head
    pairs = sum(n * (n + 1) // 2 for n in lengths) * config.num_layers
    once = 2 * body * tokens + 4 * pairs * config.num_heads * config.head_dim
    return 3 * (once + 2 * head * tokens), once if decoder.activation_checkpointing else 0


def _profile(step: _Step) -> None:
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        step.group.wait()
    table = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=60
    )
    print(table)


def memory_plan(group: Group) -> None:
    """The peak of a micro-batch over engine/memory.py's arithmetic; at most a tenth above it."""
    tokens = 8192 if group.is_cuda else 128
    shape = "4b" if group.is_cuda else "tiny"
    config = architecture(shape, num_hidden_layers=4 if group.is_cuda else 2)
    cases = [(BF16, "torch", False), (BF16, "torch", True), (FP32, "torch", True)]
    cases += [(BF16, "liger", True)] if group.is_cuda else []
    for dtype, kernels, checkpointing in cases:
        name = f"memory_{str(dtype)[6:]}_{kernels}_{'checkpoints' if checkpointing else 'kept'}"
        with group.checking(name):
            decoder = filled(config, dtype, group.device, kernels)
            decoder.activation_checkpointing = checkpointing
            for parameter in decoder.parameters():
                parameter.grad = torch.zeros_like(parameter)
            packed = _packed(config.vocab_size, tokens, 4)
            (batch,) = (batch.to(group.device) for batch in packed.batches)
            _backward(decoder, batch)
            if not group.is_cuda:
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _backward(decoder, batch)
            peak = torch.cuda.max_memory_allocated() - before
            model = ModelConfig(
                path="", dtype=str(dtype)[6:], activation_checkpointing=checkpointing
            )
            run = replace(Config(), model=model, batch=BatchConfig(max_tokens=tokens))
            target = memory.Target("cuda", "native", *reversed(torch.cuda.mem_get_info()))
            planned = memory.Plan(run, config, target).micro_batch()
            group.figure(name, peak_gib=peak / 2**30, planned_gib=planned / 2**30)
            assert peak < 1.1 * planned + 2**29, f"{peak / planned:.2f} of the plan"


def _backward(decoder: Decoder, batch: Batch) -> None:
    sft_loss(decoder(*batch.inputs()), decoder.head_weight_VD, batch)[0].backward()


def decode(group: Group) -> None:
    """Tokens per second of the embedded engine at Qwen3-0.6B's shape."""
    decoder = filled(architecture("0.6b" if group.is_cuda else "tiny"), BF16, group.device)
    new, prompt = (64, 256) if group.is_cuda else (8, 8)
    for rows, cudnn in ((64, False), (256, False), (64, True)) if group.is_cuda else ((8, False),):
        name = f"decode_{rows}{'_cudnn' * cudnn}"
        with group.checking(name), attention_by_cudnn() if cudnn else nullcontext():
            native = NativeEngine(decoder, max_rows=rows, max_cache_bytes=20 * 2**30)
            generator = torch.Generator().manual_seed(6)
            asked = [
                Request(
                    prompt_ids=torch.randint(300, (prompt,), generator=generator).tolist(),
                    seeds=list(range(8 * i, 8 * i + 8)),
                    sampling=Sampling(max_new_tokens=new),
                )
                for i in range(rows // 8)
            ]

            def generate(native=native, asked=asked) -> None:
                native.generate(asked)

            start = time.perf_counter()
            generate()
            first = time.perf_counter() - start
            took = group.seconds(generate, rounds=2, warmup=0)
            group.figure(
                name, tokens_per_s=round(rows * new / took),
                ms_per_step=round(1e3 * took / new, 2), first_s=round(first, 2),
            )  # fmt: skip


GROUPS = {"ceilings": ceilings, "step_4b": step_4b, "memory": memory_plan, "decode": decode}
