"""Forward, loss and backward of our decoder against transformers: same weights, same tokens.

Sequences have --length tokens, give or take a half; the last --loss-share of each carries loss.
transformers runs twice: on a batch padded on the right, and on one packed row with position ids.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, models
from intfast.batch import pack
from intfast.config import BatchConfig
from intfast.loss import sft_loss
from intfast.model.decoder import Decoder, PackedAttention
from intfast.records import Example

NAME = "training_step"
# Relative differences of the loss and of the gradient of the embedding table.
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 5e-2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the batch."""
    models.add_arguments(parser)
    parser.add_argument("--sequences", type=int, default=32, help="in the batch (%(default)s)")
    parser.add_argument("--length", type=int, default=120, help="mean tokens (%(default)s)")
    parser.add_argument("--loss-share", type=float, default=0.5, help="(%(default)s)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: how many times as fast our step is as each of theirs."""
    decoder, peer = models.load(args)
    peer.train()
    rnd = random.Random(args.seed)
    examples = []
    for _ in range(args.sequences):
        length = rnd.randint(args.length // 2, args.length + args.length // 2)
        tokens = [rnd.randrange(decoder.config.vocab_size) for _ in range(length)]
        first = min(length - 1, max(1, round(length * (1 - args.loss_share))))
        weights = [0.0] * first + [1.0] * (length - first)
        examples.append(Example(token_ids=tokens, weights=weights))
    variants = {
        "transformers_padded": padded_step(peer, examples, args.device),
        "transformers_packed": packed_step(peer, examples, args.device),
        "intfast": our_step(decoder, examples, args.device),
    }
    check(decoder, peer, variants, args)
    figures = harness.figures(harness.times(variants, args), "intfast", args.device)
    num_tokens = sum(len(example.token_ids) for example in examples)
    return [{"setting": models.setting(decoder, args) | {"tokens": num_tokens}, "figures": figures}]


def our_step(decoder: Decoder, examples: list[Example], device: str) -> Callable[[], Tensor]:
    """The step as the trainer takes it, without the optimizer."""
    num_tokens = sum(len(example.token_ids) for example in examples)
    packed = pack(examples, BatchConfig(max_tokens=num_tokens))
    (batch,) = (batch.to(device) for batch in packed.batches)

    def step() -> Tensor:
        decoder.zero_grad()
        attend = PackedAttention(batch.lengths, device)
        hidden_ND = decoder(batch.token_ids_T, batch.position_ids_T, attend, rows_C=batch.rows_N)
        loss = sft_loss(hidden_ND, decoder.head_weight_VD, batch)[0] / packed.weight_sum
        loss.backward()
        return loss.detach()

    return step


def padded_step(peer: Any, examples: list[Example], device: str) -> Callable[[], Tensor]:
    """transformers on a batch padded on the right."""
    longest = max(len(example.token_ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        padding = longest - len(example.token_ids)
        ids.append([*example.token_ids, *[0] * padding])
        labels.append([*_labels(example), *[-100] * padding])
        mask.append([1] * len(example.token_ids) + [0] * padding)
    names = ("input_ids", "labels", "attention_mask")
    inputs = {
        name: torch.tensor(rows, device=device)
        for name, rows in zip(names, (ids, labels, mask), strict=True)
    }
    return _peer_step(peer, inputs)


def packed_step(peer: Any, examples: list[Example], device: str) -> Callable[[], Tensor]:
    """transformers on one row; position ids that start again separate the sequences."""
    ids = [token for example in examples for token in example.token_ids]
    labels = [label for example in examples for label in _labels(example)]
    positions = [t for example in examples for t in range(len(example.token_ids))]
    names = ("input_ids", "labels", "position_ids")
    inputs = {
        name: torch.tensor([row], device=device)
        for name, row in zip(names, (ids, labels, positions), strict=True)
    }
    return _peer_step(peer, inputs)


def _labels(example: Example) -> list[int]:
    pairs = zip(example.token_ids, example.weights, strict=True)
    return [token if weight else -100 for token, weight in pairs]


def _peer_step(peer: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        peer.zero_grad()
        loss = peer(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def check(
    decoder: Decoder,
    peer: Any,
    variants: dict[str, Callable[[], Tensor]],
    args: argparse.Namespace,
) -> None:
    """All variants have the same loss and the same gradient of the embedding table."""
    table = decoder.model.embed_tokens.weight
    expected = variants["intfast"]().item()
    expected_grad = table.grad.float()
    for name in ("transformers_padded", "transformers_packed"):
        loss = variants[name]().item()
        grad = peer.get_input_embeddings().weight.grad.float()
        largest_loss, largest_grad = BOUNDS[args.dtype]
        harness.gate(f"{name}: loss", abs(loss / expected - 1), largest_loss)
        error = ((grad - expected_grad).norm() / expected_grad.norm()).item()
        harness.gate(f"{name}: gradient", error, largest_grad)
