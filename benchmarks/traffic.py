"""Bytes and launches of a decoder layer on CUDA, a token, but for its matmuls and its attention.

Counted on a CUDA device that is not there (fake_cuda.py): every operator moves its inputs and its
outputs once. So it says what runs, not how long: on a card that copies 3 TB/s a megabyte a token
and layer is 0.2 s for 16,384 tokens and 36 layers. Of two depths the difference is taken, so that
what a layer does with its neighbour counts and what a model does once does not.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

from benchmarks.fake_cuda import FakeCuda, Launch
from intfast.config import ModelConfig
from intfast.model.decoder import Architecture, Decoder, PackedAttention

NAME = "traffic"
QWEN3_4B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
"""A layer's shape; the vocabulary has no part in it."""
COUNTED_ELSEWHERE = {"mm", "addmm", "bmm", "_varlen_attn", "_varlen_attn_backward"}


class Traffic(NamedTuple):
    """What one layer does with one token of a batch."""

    forward_bytes: float
    backward_bytes: float
    forward_launches: int
    backward_launches: int
    bytes_by_operator: dict[str, float]
    """Of both passes, the largest first."""

    @property
    def bytes(self) -> float:
        """Of forward and backward."""
        return self.forward_bytes + self.backward_bytes


def traffic(
    kernels: str = "torch", tokens: int = 16_384, dtype: torch.dtype = torch.bfloat16, **shape: Any
) -> Traffic:
    """Count a layer of Qwen3-4B's shape; `kernels` as in Decoder, `shape` changes keys of it.

    Without checkpointing; with it, backward also makes the forward's.
    """
    deep, shallow = (_passes(layers, kernels, tokens, dtype, shape) for layers in (3, 2))
    moved = [Counter(), Counter()]
    launches = [0, 0]
    for sign, passes in ((1, deep), (-1, shallow)):
        for i, made in enumerate(passes):
            for launch in made:
                if launch.name not in COUNTED_ELSEWHERE:
                    moved[i][launch.name] += sign * launch.bytes / tokens
                    launches[i] += sign
    both = Counter({name: moved[0][name] + moved[1][name] for name in moved[0] | moved[1]})
    sums = [sum(part.values()) for part in moved]
    return Traffic(*sums, *launches, {k: round(v) for k, v in both.most_common() if round(v)})


def _passes(
    layers: int, kernels: str, tokens: int, dtype: torch.dtype, shape: dict[str, Any]
) -> tuple[list[Launch], list[Launch]]:
    config = Architecture.from_hf(QWEN3_4B | shape | {"num_hidden_layers": layers})
    with FakeCuda("meta", counting=True) as device:
        decoder = Decoder(config, dtype, "cuda", kernels)
        token_T = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        position_T = torch.arange(tokens, device="cuda")
        device.launches.clear()
        hidden_TD = decoder(token_T, position_T, PackedAttention([tokens], "cuda"))
        forward = len(device.launches)
        hidden_TD.backward(torch.empty_like(hidden_TD))
    return device.launches[:forward], device.launches[forward:]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many tokens."""
    parser.add_argument("--tokens", type=int, default=16_384, help="in a batch (%(default)s)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of the kernels that are installed."""
    rows = []
    for kernels in get_args(get_type_hints(ModelConfig)["kernels"]):
        if kernels == "auto":
            continue
        if kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
            print("  liger: not installed")
            continue
        found = traffic(kernels, args.tokens)
        print(
            f"  {kernels:8} {found.bytes:12,.0f} B a token and layer: forward "
            f"{found.forward_bytes:,.0f} in {found.forward_launches} launches, backward "
            f"{found.backward_bytes:,.0f} in {found.backward_launches}"
        )
        print(f"  {'':8} {found.bytes_by_operator}")
        figures = {"bytes": round(found.bytes)} | {
            key: round(value) if isinstance(value, float) else value
            for key, value in found._asdict().items()
        }
        setting = {"kernels": kernels, "shape": "Qwen3-4B", "dtype": "bfloat16"}
        rows.append({"setting": setting | {"tokens": args.tokens}, "figures": figures})
    return rows
