"""Numbers of a model, counted from its architecture: what the memory plan multiplies."""

from __future__ import annotations

import functools

import torch

from intfast.model.decoder import Architecture, Decoder
from intfast.model.shards import Shards
from intfast.ranks import Ranks


@functools.cache
def num_parameters(architecture: Architecture) -> int:
    """Parameters of the decoder; tied heads count once."""
    decoder = Decoder(architecture, torch.float32, "meta")
    return sum(parameter.numel() for parameter in decoder.parameters())


@functools.cache
def largest_layer(architecture: Architecture) -> int:
    """Parameters of the largest layer, or of the table of tokens."""
    found: dict[str, int] = {}
    for name, p in Decoder(architecture, torch.float32, "meta").named_parameters():
        key = ".".join(name.split(".")[:3])
        found[key] = found.get(key, 0) + p.numel()
    return max(found.values())


def own_sizes(architecture: Architecture, tp: int, rank: int = 0) -> Architecture:
    """What one of `tp` ranks holds of a model."""
    return Shards(architecture, Ranks(rank, tp, tp=tp)).own if tp > 1 else architecture


def layer_numbers(architecture: Architecture) -> int:
    """Numbers that one layer keeps for its backward pass, per token.

    Each norm: its normalised input, and of those before a branch the output, or without a norm the
    stream; qkv as one piece, because values are a view of it; norms and rotation of query and key;
    the attention output; gate and up, silu(gate), product.
    """
    a = architecture
    query, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    normed = query + kv if a.qk_norm else 0
    attention = (query + 2 * kv) + normed + (query + kv) + query
    norms = sum(name is not None for name in a.norms)
    return (2 + norms) * a.hidden_size + attention + 4 * a.intermediate_size


def selective_numbers(architecture: Architecture) -> int:
    """Numbers that selective checkpointing keeps of one layer, per token, beside its input.

    The results of all products, but of the last where no norm takes it, and of attention: see
    model/checkpointing.py.
    """
    a = architecture
    query, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    products = 1 + (a.norms[3] is not None)
    return (query + 2 * kv) + query + products * a.hidden_size + 2 * a.intermediate_size
