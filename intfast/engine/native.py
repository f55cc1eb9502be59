"""The embedded engine: batched decoding with the trainer's own parameters, on any device.

Samples run in the rows of one key/value cache. A prompt is computed once and copied to the rows
of its samples; rows whose sample ended are given to the next samples, or leave the batch. One
step computes one token of every row in a single forward of the decoder.

Shapes as in records.py; R is rows of the cache, B those of a step, C columns of row state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intfast.engine import invariance, scoring
from intfast.engine.cache import KVCache, bytes_per_slot, round_up
from intfast.engine.generation import Generation
from intfast.engine.protocol import Completion, OnFinished, PromptReuse, Request, check_requests
from intfast.model.decoder import Decoder
from intfast.model.fixed import BLOCK


class NativeEngine:
    """`protocol.Engine` on a decoder; it reads the parameters and copies none.

    A greedy sample has log-probs of 0: it is drawn from a distribution of one token.
    """

    def __init__(
        self, decoder: Decoder, *, max_rows: int = 256, max_cache_bytes: int = 4 * 2**30
    ) -> None:
        """max_rows: samples that decode together."""
        if max_rows < 1:
            raise ValueError(f"max_rows must be >= 1, got {max_rows}")
        self.decoder = decoder
        self.max_rows = max_rows
        self.max_cache_bytes = max_cache_bytes
        self.policy_version = 0
        self.prompt_reuse = PromptReuse()
        self.shapes = invariance.find(decoder)
        self._storage: Tensor | None = None
        self._asleep = False

    def generate(
        self, requests_P: Sequence[Request], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """See protocol.Engine. Raises ValueError, before any work, for bad requests."""
        self._check(requests_P)
        if self._asleep:
            raise RuntimeError("the engine is asleep; call wake() before generate()")
        if not any(request.seeds for request in requests_P):
            return [[] for _ in requests_P]
        with torch.inference_mode():
            cache, storage = self._cache(requests_P)
            completions_P_G = Generation(
                self.decoder, cache, self.shapes, requests_P, self.policy_version, on_finished
            ).run()
        # Not kept when the call fails: it may hold numbers that are not finite.
        self._storage = storage
        self._count(requests_P)
        return completions_P_G

    def score(
        self, sequences_P: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """See protocol.Engine."""
        return scoring.score(self.decoder, sequences_P, temperature)

    def weights_changed(self) -> None:
        """See protocol.Engine. No keys or values outlive a call of `generate`."""
        self.policy_version += 1

    def sleep(self) -> None:
        """Give the KV memory back; `score` works on, `generate` needs `wake()`."""
        self._storage = None
        self._asleep = True

    def wake(self) -> None:
        """Allow `generate` again; it takes the memory that it needs."""
        self._asleep = False

    def _count(self, requests_P: Sequence[Request]) -> None:
        """Each different prompt was computed once, except for its last token."""
        asked = sum(len(r.prompt_ids) * len(r.seeds) for r in requests_P)
        last = sum(len(r.seeds) for r in requests_P)
        prompts = {tuple(r.prompt_ids) for r in requests_P if r.seeds}
        computed = last + sum(len(prompt_ids) - 1 for prompt_ids in prompts)
        before = self.prompt_reuse
        self.prompt_reuse = PromptReuse(before.asked + asked, before.reused + asked - computed)

    def _check(self, requests_P: Sequence[Request]) -> None:
        config = self.decoder.config
        check_requests(requests_P, config.vocab_size, config.max_positions)
        for i, request in enumerate(requests_P):
            slots = self._width(len(request.prompt_ids) + request.sampling.max_new_tokens)
            # One row for a sample, one that keeps a prompt for the samples that wait.
            needed = 2 * slots * bytes_per_slot(config, self._dtype)
            if needed > self.max_cache_bytes:
                raise ValueError(
                    f"requests[{i}]: {slots} tokens need {needed} bytes of cache, max_cache_bytes "
                    f"is {self.max_cache_bytes}; raise it or lower max_new_tokens"
                )

    def _width(self, num_tokens: int) -> int:
        return round_up(num_tokens, max(BLOCK, self.shapes.slots))

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.head_weight_VD.dtype

    def _cache(self, requests_P: Sequence[Request]) -> tuple[KVCache, Tensor]:
        """Its rows: what the samples, `max_rows` and the byte budget allow, and one more."""
        config, dtype = self.decoder.config, self._dtype
        used = [request for request in requests_P if request.seeds]
        longest = max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in used)
        width = self._width(longest)
        row_bytes = width * bytes_per_slot(config, dtype)
        num_samples = sum(len(request.seeds) for request in used)
        num_rows = min(num_samples, self.max_rows, self.max_cache_bytes // row_bytes - 1) + 1
        size = num_rows * row_bytes // dtype.itemsize
        storage, self._storage = self._storage, None
        if storage is None or storage.numel() < size:
            del storage
            storage = torch.zeros(size, dtype=dtype, device=self.decoder.head_weight_VD.device)
        return KVCache(config, num_rows, width, storage), storage
