"""The embedded engine against `generate` of transformers: sampling at temperature 1, same weights.

Prompts have --prompt tokens, give or take a tenth. Every sample has --new tokens; with --mixed it
has between one and that many, as samples do that end by themselves. Both sides make the same
tokens, so times compare as tokens per second do. transformers gets the prompts padded on the left,
--batch samples at a time, and decodes each batch to its longest sample.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch

from benchmarks import harness, models
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Request, Sampling

NAME = "engine"
# Largest and mean difference of log-probs, nat.
BOUNDS = {"float32": (1e-3, 1e-5), "bfloat16": (4.0, 0.05)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the workload."""
    models.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (%(default)s)")
    parser.add_argument("--batches", type=int, default=1, help="in all (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="per prompt (%(default)s)")
    parser.add_argument("--prompt", type=int, default=60, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=110, help="tokens of a sample (%(default)s)")
    parser.add_argument("--mixed", action="store_true", help="samples end at random lengths")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: how many times as fast our engine is."""
    decoder, peer = models.load(args)
    engine = NativeEngine(decoder, max_rows=args.batch)
    requests = make_requests(decoder.config.vocab_size, args)
    check(engine, peer, requests, args)
    at_once = args.batch // args.samples
    batches = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
    inputs = [(*left_padded(batch, args.device), longest(batch)) for batch in batches]

    def transformers() -> None:
        for ids_BL, mask_BL, num_new in inputs:
            tokens = peer.generate(
                ids_BL,
                attention_mask=mask_BL,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=num_new,
                num_return_sequences=args.samples,
            )
            assert tokens.shape == (len(ids_BL) * args.samples, ids_BL.shape[1] + num_new)

    variants = {"transformers": transformers, "intfast": lambda: engine.generate(requests)}
    figures = harness.figures(harness.times(variants, args), "intfast", args.device)
    return [{"setting": models.setting(decoder, args), "figures": figures}]


def make_requests(vocabulary: int, args: argparse.Namespace) -> list[Request]:
    """Random prompts, one for each --samples samples."""
    rnd = random.Random(args.seed)
    spread = args.prompt // 10
    requests = []
    for _ in range(args.batches * args.batch // args.samples):
        length = rnd.randint(args.prompt - spread, args.prompt + spread)
        num_new = rnd.randint(1, args.new) if args.mixed else args.new
        requests.append(
            Request(
                prompt_ids=[rnd.randrange(vocabulary) for _ in range(length)],
                seeds=[rnd.randrange(2**63) for _ in range(args.samples)],
                sampling=Sampling(max_new_tokens=num_new),
            )
        )
    return requests


def longest(requests: list[Request]) -> int:
    """The number of tokens to which a batch of these is decoded."""
    return max(request.sampling.max_new_tokens for request in requests)


@torch.no_grad()
def check(
    engine: NativeEngine, peer: Any, requests: list[Request], args: argparse.Namespace
) -> None:
    """Our samples have the log-probs that transformers gives them."""
    gaps = []
    for request, group in zip(requests[:8], engine.generate(requests[:8]), strict=True):
        for completion in group[:2]:
            num_new = len(completion.token_ids)
            assert num_new == request.sampling.max_new_tokens
            tokens = [*request.prompt_ids, *completion.token_ids]
            logits_TV = peer(torch.tensor([tokens], device=args.device)).logits[0].float()
            logprob_TV = logits_TV[-num_new - 1 : -1].log_softmax(-1)
            new_T1 = torch.tensor(completion.token_ids, device=args.device)[:, None]
            ours_T = torch.tensor(completion.logprobs, device=args.device)
            gaps.append((logprob_TV.gather(1, new_T1)[:, 0] - ours_T).abs())
    gap = torch.cat(gaps)
    largest, mean = BOUNDS[args.dtype]
    harness.gate("largest difference of a log-prob", gap.max().item(), largest)
    harness.gate("mean difference of log-probs", gap.mean().item(), mean)


def left_padded(requests: list[Request], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and attention mask, (prompts, longest)."""
    width = max(len(request.prompt_ids) for request in requests)
    padding = [width - len(request.prompt_ids) for request in requests]
    ids = [[0] * n + list(r.prompt_ids) for n, r in zip(padding, requests, strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in padding]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
