"""vLLM in the trainer's process: its speed beside the embedded engine, and the cost of an update.

Both engines generate with the same decoder, whose parameters are vLLM's own tensors. On a CPU the
clock counts CPU seconds of this process, so that other load does not matter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, models
from benchmarks.engine import make_requests
from intfast.config import Config, ModelConfig, RolloutConfig
from intfast.engine import sharing
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Request
from intfast.model import weights
from intfast.model.decoder import Decoder

NAME = "vllm"
SHAPES = {
    "quickstart": models.QUICKSTART,
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
}
HEADS = {"0.6b": 16, "4b": 32}
# Mean difference of log-probs, nat.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.03}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the workload."""
    parser.add_argument("--model", help="Hugging Face folder (else random weights of --shape)")
    parser.add_argument("--shape", default="quickstart", choices=SHAPES, help="random weights")
    parser.add_argument("--dtype", default="float32", choices=list(BOUNDS))
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="per prompt (%(default)s)")
    parser.add_argument("--prompt", type=int, default=60, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=110, help="tokens of a sample (%(default)s)")
    parser.add_argument("--cache-gib", type=float, default=0.25, help="KV memory (%(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="on CUDA: no graphs")
    parser.add_argument("--sleep", action="store_true", help="also release the KV memory and back")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: generation, an update of the weights, and with --sleep the KV memory."""
    from intfast.engine import vllm_start

    args.batches, args.mixed = 1, False
    vllm_start.CUDA_GRAPHS = not args.eager
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.model or name)
        if not args.model:
            write_model(folder, args)
        settings = RolloutConfig(
            engine="vllm",
            max_rows=args.batch,
            cache_gib=args.cache_gib,
            context=args.context,
            sleep=args.sleep and device.type == "cuda",
        )
        config = Config(
            model=ModelConfig(path=str(folder), dtype=args.dtype, kernels="torch"), rollout=settings
        )
        start = time.perf_counter()
        engine = vllm_start.start(folder, config, device)
        started_s = time.perf_counter() - start
        source, _ = weights.load(folder, getattr(torch, args.dtype), device)
    decoder = engine.decoder
    setting = {
        "model": args.model or f"random, {args.shape} shape",
        "dtype": args.dtype,
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "vllm": _version(),
    }
    requests = make_requests(decoder.config.vocab_size, args)
    check(engine, requests, args)
    rows = [generation(engine, requests, args), update(engine, source, args)]
    if args.sleep:
        rows.append(sleep(engine, args))
    if args.device.startswith("cuda"):
        rows[0]["start_s"] = started_s
        rows[0]["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return [{"setting": setting | {"what": row.pop("what")}, "figures": row} for row in rows]


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A random Qwen3 as a Hugging Face folder; written by our own code, as 4B take a while."""
    from transformers import Qwen3Config

    shape = {
        "vocab_size": 151936,
        "num_attention_heads": HEADS.get(args.shape, 4),
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    } | SHAPES[args.shape]
    hf = Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"]).to_dict()
    config = weights.Architecture.from_hf(hf)
    decoder = Decoder(config, getattr(torch, args.dtype), args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for parameter in decoder.parameters():
        mean, spread = (1.0, 0.02) if parameter.ndim == 1 else (0.0, parameter.shape[-1] ** -0.5)
        parameter.data.normal_(mean, spread, generator=generator)
    weights.save(decoder, hf, folder)


def check(engine: Any, requests: list[Request], args: argparse.Namespace) -> None:
    """vLLM's log-probs are those of the trainer's forward pass."""
    found = engine.generate(requests[:8])
    pairs = [(r, c) for r, group in zip(requests, found, strict=False) for c in group]
    scores = engine.score([[*r.prompt_ids, *c.token_ids] for r, c in pairs])
    gaps = [
        torch.tensor(score[-len(c.token_ids) :]) - torch.tensor(c.logprobs)
        for score, (_, c) in zip(scores, pairs, strict=True)
    ]
    gap = torch.cat(gaps).abs().mean().item()
    harness.gate("mean difference of log-probs", gap, BOUNDS[args.dtype])


def generation(engine: Any, requests: list[Request], args: argparse.Namespace) -> dict[str, Any]:
    """Our engine against vLLM's own `LLM.generate` and against the embedded engine."""
    from vllm import SamplingParams

    native = NativeEngine(engine.decoder, max_rows=args.batch)
    llm = engine._llm
    prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests for _ in r.seeds]
    parameters = [
        SamplingParams(
            max_tokens=args.new, logprobs=0, ignore_eos=True, detokenize=False, seed=seed
        )
        for r in requests
        for seed in r.seeds
    ]

    def alone() -> None:
        llm.reset_prefix_cache()
        llm.generate(prompts, parameters, use_tqdm=False)

    def ours() -> None:
        llm.reset_prefix_cache()
        engine.generate(requests)

    variants = {"vllm alone": alone, "embedded": lambda: native.generate(requests), "vllm": ours}
    clock = time.perf_counter if args.device.startswith("cuda") else time.process_time
    seconds = harness.times(variants, args, clock)
    tokens = args.batch * args.new
    for name, values in seconds.items():
        print(f"  {name}: {tokens / harness.percentiles(values)['p50']:,.0f} tokens per second")
    figures = harness.figures(seconds, "vllm", args.device)
    if args.device.startswith("cuda"):
        rate = tokens / harness.percentiles(seconds["vllm"])["p50"]
        figures["tokens_per_s"] = float(f"{rate:.4g}")
    return {"what": "generation"} | figures


def update(engine: Any, source: Decoder, args: argparse.Namespace) -> dict[str, Any]:
    """After an optimizer step: shared weights, one fused copy, and vLLM's `load_weights`."""
    [module] = engine._llm.apply_model(lambda module: module)
    copied = sharing.Copied(source, module)

    def load() -> None:
        module.load_weights(hugging_face(source))

    for way in (copied.update, load):
        with torch.no_grad():
            source.model.norm.weight.add_(0.125)
        way()
        same = torch.equal(module.model.norm.weight, source.model.norm.weight)
        harness.gate("an update that did not arrive", float(not same), 0)
    variants = {"foreach copy": copied.update, "load_weights": load, "shared": engine._link.update}
    clock = time.perf_counter if args.device.startswith("cuda") else time.process_time
    return {"what": "update"} | harness.figures(
        harness.times(variants, args, clock), "shared", args.device
    )


def hugging_face(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The parameters under their names in a checkpoint, as trainers hand them to `load_weights`."""
    parameters: dict[str, nn.Parameter] = dict(decoder.named_parameters())
    for name, place in weights.slices(decoder.config).items():
        yield name, parameters[place.parameter].data[place.start : place.stop]


def sleep(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The KV memory given back and taken again; the weights stay where they are."""

    def turn() -> None:
        engine.sleep()
        engine.wake()

    found: dict[str, Any] = {"what": "sleep"}
    if args.device.startswith("cuda"):
        before = torch.cuda.mem_get_info()[0]
        engine.sleep()
        found["freed_gib"] = (torch.cuda.mem_get_info()[0] - before) / 2**30
        engine.wake()
    seconds = harness.times({"sleep and wake": turn}, args)["sleep and wake"]
    if args.device.startswith("cuda"):
        found["ms"] = harness.percentiles([1e3 * value for value in seconds])
    return found


def _version() -> str:
    import vllm

    return vllm.__version__
