"""Log-probs of given tokens by the trainer's own forward pass, for every engine.

An engine's own scoring would be a second opinion: it bypasses the prefix cache, and in bf16 it
rounds differently from the pass that the loss is taken from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from intfast.engine.protocol import check_tokens
from intfast.kernels.linear_logprob import linear_logprob
from intfast.model.decoder import Decoder, PackedAttention
from intfast.state import interrupt

# Tokens of one forward.
_TOKENS = 8192


def score(
    decoder: Decoder, sequences_P: Sequence[Sequence[int]], temperature: float
) -> list[list[float]]:
    """See protocol.Engine.score."""
    config = decoder.config
    for i, tokens in enumerate(sequences_P):
        check_tokens(f"sequences[{i}]", tokens, config.vocab_size, config.max_positions)
    scored: list[list[float]] = [[] for _ in sequences_P]
    # Similar lengths together leave less padding inside attention.
    order = sorted(range(len(sequences_P)), key=lambda i: len(sequences_P[i]))
    with torch.inference_mode():
        for chunk in _chunks([i for i in order if len(sequences_P[i]) > 1], sequences_P):
            interrupt.beat()
            lengths = [len(sequences_P[i]) for i in chunk]
            flat = [t for i in chunk for t in sequences_P[i]]
            packed = _packed(decoder, flat, lengths, temperature)
            for i, logprobs in zip(chunk, packed, strict=True):
                scored[i] = logprobs
    return scored


def _packed(
    decoder: Decoder, tokens: list[int], lengths: list[int], temperature: float
) -> Iterator[list[float]]:
    device = decoder.head_weight_VD.device
    token_T = torch.tensor(tokens, device=device)
    position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
    target = (position_T > 0).nonzero()[:, 0]
    attend = PackedAttention(lengths, device)
    hidden_ND = decoder(token_T, position_T, attend, rows_C=target - 1)
    logprob_N, _ = linear_logprob(
        hidden_ND, decoder.head_weight_VD, token_T[target], temperature=temperature, entropy="none",
        **decoder.head_options,
    )  # fmt: skip
    return (part.tolist() for part in logprob_N.split([n - 1 for n in lengths]))


def _chunks(order: list[int], sequences_P: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices in order, in lists of at most _TOKENS tokens (or of one sequence)."""
    chunk: list[int] = []
    num_tokens = 0
    for i in order:
        if chunk and num_tokens + len(sequences_P[i]) > _TOKENS:
            yield chunk
            chunk, num_tokens = [], 0
        chunk.append(i)
        num_tokens += len(sequences_P[i])
    if chunk:
        yield chunk
