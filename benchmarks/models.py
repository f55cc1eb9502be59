"""The model that both sides of a benchmark compute: ours and transformers', with equal weights."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

from intfast.model import weights
from intfast.model.decoder import Decoder

# The quickstart's model.
QUICKSTART = {
    "vocab_size": 62,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, in which type."""
    parser.add_argument(
        "--model", help="Hugging Face folder (else random weights of the quickstart's shape)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


def load(args: argparse.Namespace) -> tuple[Decoder, Any]:
    """(our decoder, the transformers model with its sdpa attention), on the device."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    dtype = getattr(torch, args.dtype)
    settings = {"dtype": dtype, "attn_implementation": "sdpa"}
    if args.model:
        peer = AutoModelForCausalLM.from_pretrained(args.model, **settings)
        decoder, _ = weights.load(args.model, dtype=dtype, device=args.device)
    else:
        torch.manual_seed(args.seed)
        # Wide enough that the next token is far from uniform.
        config = Qwen3Config(**QUICKSTART, initializer_range=0.15)
        peer = AutoModelForCausalLM.from_config(config, **settings)
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            decoder, _ = weights.load(folder, dtype=dtype, device=args.device)
    # Every completion has the asked length: no token ends it.
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return decoder, peer.to(args.device)


def setting(decoder: Decoder, args: argparse.Namespace) -> dict[str, Any]:
    """The model as a row of results names it."""
    config = decoder.config
    return {
        "model": args.model or "random, quickstart shape",
        "dtype": args.dtype,
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
    }
