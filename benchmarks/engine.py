"""The embedded engine against `generate` of transformers: sampling at temperature 1, same weights.

Prompts have --prompt tokens, give or take a tenth, and every sample runs to --new tokens, so both
sides make the same number of tokens and times compare as tokens per second do. transformers gets
the prompts padded on the left, in one batch.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch

from benchmarks import harness, models
from intfast.engines.native import NativeEngine
from intfast.rollout import Request, Sampling

NAME = "engine"
# Largest and mean difference of log-probs, nat.
BOUNDS = {"float32": (1e-3, 1e-5), "bfloat16": (4.0, 0.05)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the workload."""
    models.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=64, help="samples (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="per prompt (%(default)s)")
    parser.add_argument("--prompt", type=int, default=60, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=110, help="tokens of a sample (%(default)s)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: how many times as fast our engine is."""
    decoder, peer = models.load(args)
    engine = NativeEngine(decoder, max_rows=args.batch)
    rnd = random.Random(args.seed)
    vocabulary, spread = decoder.config.vocab_size, args.prompt // 10
    requests = [
        Request(
            prompt_ids=[
                rnd.randrange(vocabulary)
                for _ in range(rnd.randint(args.prompt - spread, args.prompt + spread))
            ],
            seeds=[rnd.randrange(2**63) for _ in range(args.samples)],
            sampling=Sampling(max_new_tokens=args.new),
        )
        for _ in range(args.batch // args.samples)
    ]
    check(engine, peer, requests, args)
    ids_BL, mask_BL = left_padded(requests, args.device)

    def transformers() -> None:
        tokens = peer.generate(
            ids_BL,
            attention_mask=mask_BL,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.new,
            num_return_sequences=args.samples,
        )
        assert tokens.shape == (args.batch, ids_BL.shape[1] + args.new)

    variants = {"transformers": transformers, "intfast": lambda: engine.generate(requests)}
    figures = harness.figures(harness.times(variants, args), "intfast", args.device)
    return [{"setting": models.setting(decoder, args), "figures": figures}]


@torch.no_grad()
def check(
    engine: NativeEngine, peer: Any, requests: list[Request], args: argparse.Namespace
) -> None:
    """Our samples have the log-probs that transformers gives them."""
    gaps = []
    for request, group in zip(requests[:8], engine.generate(requests[:8]), strict=True):
        for completion in group[:2]:
            assert len(completion.token_ids) == args.new
            tokens = [*request.prompt_ids, *completion.token_ids]
            logits_TV = peer(torch.tensor([tokens], device=args.device)).logits[0].float()
            logprob_TV = logits_TV[-args.new - 1 : -1].log_softmax(-1)
            new_T1 = torch.tensor(completion.token_ids, device=args.device)[:, None]
            ours_T = torch.tensor(completion.logprobs, device=args.device)
            gaps.append((logprob_TV.gather(1, new_T1)[:, 0] - ours_T).abs())
    gap = torch.cat(gaps)
    largest, mean = BOUNDS[args.dtype]
    harness.gate("largest difference of a log-prob", gap.max().item(), largest)
    harness.gate("mean difference of log-probs", gap.mean().item(), mean)


def left_padded(requests: list[Request], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and attention mask, (prompts, longest)."""
    longest = max(len(request.prompt_ids) for request in requests)
    padding = [longest - len(request.prompt_ids) for request in requests]
    ids = [[0] * n + list(r.prompt_ids) for n, r in zip(padding, requests, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in padding]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
