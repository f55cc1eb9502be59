"""The embedded engine: batched decoding with the trainer's own parameters, on any device.

Samples run in the rows of one key/value cache. A prompt is computed once and copied to the rows
of its samples; rows whose sample ended are given to the next samples, or leave the batch. One
step computes one token of every row in a single forward of the decoder.

Shapes as in records.py; R is rows of the cache, B those of a step, C columns of row state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from intfast.engines.cache import BLOCK, KVCache, bytes_per_slot, round_up
from intfast.engines.generation import Generation
from intfast.kernels.linear_logprob import linear_logprob
from intfast.model import Decoder, PackedAttention
from intfast.rollout import Completion, Request

# Tokens of one forward over scored sequences.
SCORE_TOKENS = 8192


class NativeEngine:
    """`intfast.rollout.Engine` on a decoder; it reads the parameters and copies none.

    A greedy sample has log-probs of 0: it is drawn from a distribution of one token.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any = None,
        *,
        max_rows: int = 256,
        max_cache_bytes: int = 4 * 2**30,
    ) -> None:
        """tokenizer: needed for stop texts only; max_rows: samples that decode together."""
        if max_rows < 1:
            raise ValueError(f"max_rows must be >= 1, got {max_rows}")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.max_cache_bytes = max_cache_bytes
        self.policy_version = 0
        self._storage: Tensor | None = None
        self._asleep = False

    def generate(
        self,
        requests_P: Sequence[Request],
        on_finished: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """See intfast.rollout.Engine. Raises ValueError, before any work, for bad requests."""
        for i, request in enumerate(requests_P):
            self._check(i, request)
        if self._asleep:
            raise RuntimeError("the engine is asleep; call wake() before generate()")
        if not any(request.seeds for request in requests_P):
            return [[] for _ in requests_P]
        with torch.inference_mode():
            cache, storage = self._cache(requests_P)
            completions_P_G = Generation(
                self.decoder, self.tokenizer, cache, requests_P, self.policy_version, on_finished
            ).run()
        # Not kept when the call fails: it may hold numbers that are not finite.
        self._storage = storage
        return completions_P_G

    def score(
        self, sequences_P: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """See intfast.rollout.Engine."""
        for i, tokens in enumerate(sequences_P):
            self._check_tokens(f"sequences[{i}]", tokens, 0)
        scored: list[list[float]] = [[] for _ in sequences_P]
        # Similar lengths together leave less padding inside attention.
        order = sorted(range(len(sequences_P)), key=lambda i: len(sequences_P[i]))
        with torch.inference_mode():
            for chunk in _chunks([i for i in order if len(sequences_P[i]) > 1], sequences_P):
                lengths = [len(sequences_P[i]) for i in chunk]
                flat = self._score([t for i in chunk for t in sequences_P[i]], lengths, temperature)
                for i, logprobs in zip(chunk, flat, strict=True):
                    scored[i] = logprobs
        return scored

    def _score(self, tokens: list[int], lengths: list[int], temperature: float) -> Iterator[list]:
        device = self.decoder.head_weight_VD.device
        token_T = torch.tensor(tokens, device=device)
        position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        target = (position_T > 0).nonzero()[:, 0]
        attend = PackedAttention(lengths, device)
        hidden_ND = self.decoder(token_T, position_T, attend, last_only=target - 1)
        head_VD = self.decoder.head_weight_VD
        logprob_N, _ = linear_logprob(
            hidden_ND, head_VD, token_T[target], temperature=temperature, entropy="none"
        )
        return (part.tolist() for part in logprob_N.split([n - 1 for n in lengths]))

    def weights_changed(self) -> None:
        """See intfast.rollout.Engine. No keys or values outlive a call of `generate`."""
        self.policy_version += 1

    def sleep(self) -> None:
        """Give the KV memory back; `score` works on, `generate` needs `wake()`."""
        self._storage = None
        self._asleep = True

    def wake(self) -> None:
        """Allow `generate` again; it takes the memory that it needs."""
        self._asleep = False

    def _check(self, index: int, request: Request) -> None:
        name, s = f"requests[{index}]", request.sampling
        seeds_fit = all(0 <= seed < 2**63 for seed in request.seeds)
        for is_right, message in (
            (0 <= s.temperature < math.inf, f"temperature must be >= 0, got {s.temperature}"),
            (0 < s.top_p <= 1, f"top_p must be in (0, 1], got {s.top_p}"),
            (s.top_k >= 0, f"top_k must be >= 0 (0: no limit), got {s.top_k}"),
            (s.max_new_tokens >= 1, f"max_new_tokens must be >= 1, got {s.max_new_tokens}"),
            (seeds_fit, "seeds must be in [0, 2**63)"),
            ("" not in s.stop, "stop must hold no empty text"),
            (self.tokenizer or not s.stop, "stop texts need an engine with a tokenizer"),
        ):
            if not is_right:
                raise ValueError(f"{name}: {message}")
        self._check_tokens(f"{name}.prompt_ids", request.prompt_ids, s.max_new_tokens)
        slots = round_up(len(request.prompt_ids) + s.max_new_tokens, BLOCK)
        # One row for a sample, one that keeps a prompt for the samples that wait.
        needed = 2 * slots * bytes_per_slot(self.decoder.config, self._dtype)
        if needed > self.max_cache_bytes:
            raise ValueError(
                f"{name}: {slots} tokens need {needed} bytes of cache, max_cache_bytes is "
                f"{self.max_cache_bytes}; raise it or lower max_new_tokens"
            )

    def _check_tokens(self, name: str, tokens: Sequence[int], num_new: int) -> None:
        config = self.decoder.config
        if not tokens:
            raise ValueError(f"{name}: expected at least one token, got none")
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            bad = next(t for t in tokens if not 0 <= t < config.vocab_size)
            raise ValueError(f"{name}: token id {bad} is outside of the {config.vocab_size} ids")
        if len(tokens) + num_new > config.max_positions:
            new = f" + max_new_tokens {num_new}" if num_new else ""
            raise ValueError(
                f"{name}: {len(tokens)} tokens{new} exceed the model's context of "
                f"{config.max_positions} tokens"
            )

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.head_weight_VD.dtype

    def _cache(self, requests_P: Sequence[Request]) -> tuple[KVCache, Tensor]:
        """Its rows: what the samples, `max_rows` and the byte budget allow, and one more."""
        config, dtype = self.decoder.config, self._dtype
        used = [request for request in requests_P if request.seeds]
        longest = max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in used)
        row_bytes = round_up(longest, BLOCK) * bytes_per_slot(config, dtype)
        num_samples = sum(len(request.seeds) for request in used)
        num_rows = min(num_samples, self.max_rows, self.max_cache_bytes // row_bytes - 1) + 1
        size = num_rows * row_bytes // dtype.itemsize
        storage, self._storage = self._storage, None
        if storage is None or storage.numel() < size:
            del storage
            storage = torch.zeros(size, dtype=dtype, device=self.decoder.head_weight_VD.device)
        return KVCache(config, num_rows, round_up(longest, BLOCK), storage), storage


def _chunks(order: list[int], sequences_P: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices in order, in lists of at most SCORE_TOKENS tokens (or of one sequence)."""
    chunk: list[int] = []
    num_tokens = 0
    for i in order:
        if chunk and num_tokens + len(sequences_P[i]) > SCORE_TOKENS:
            yield chunk
            chunk, num_tokens = [], 0
        chunk.append(i)
        num_tokens += len(sequences_P[i])
    if chunk:
        yield chunk
