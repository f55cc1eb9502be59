"""The embedded engine: batched decoding with the trainer's own parameters, on any device.

Samples run in the rows of one key/value cache. A prompt is computed once and copied to the rows
of its samples; rows whose sample ended are given to the next samples, or leave the batch. One
step computes one token of every row in a single forward of the decoder.

Shapes as in records.py; R is rows of the cache, B those of a step, C columns of row state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from intfast.engine import invariance, scoring
from intfast.engine.cache import KVCache, bytes_per_slot, round_up
from intfast.engine.generation import Generation
from intfast.engine.protocol import (
    Completion,
    More,
    OnFinished,
    PromptReuse,
    Request,
    check_requests,
)
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
        self,
        requests_P: Sequence[Request],
        on_finished: OnFinished | None = None,
        more: More | None = None,
    ) -> list[list[Completion]]:
        """See protocol.Engine. Raises ValueError, before any work, for bad requests."""
        if self._asleep:
            raise RuntimeError("the engine is asleep; call wake() before generate()")
        found_P_G: list[list[Any]] = [[None] * len(request.seeds) for request in requests_P]
        num_requests = 0

        def ended(p: int, g: int, completion: Completion) -> None:
            if p < len(found_P_G):
                found_P_G[p][g] = completion
            if on_finished is not None:
                on_finished(p, g, completion)

        def numbered(requests: Sequence[Request]) -> dict[int, Request]:
            nonlocal num_requests
            self._check(requests, num_requests)
            new = dict(enumerate(requests, num_requests))
            num_requests += len(new)
            return {p: request for p, request in new.items() if request.seeds}

        def take(room: int) -> dict[int, Request]:
            return numbered(more(room)) if more is not None else {}

        waiting = numbered(requests_P) or take(self.max_rows)
        with torch.inference_mode():
            while waiting:
                cache, storage = self._cache(waiting.values(), more is not None)
                call = Generation(self.decoder, cache, self.shapes, self.policy_version, ended)
                # What is longer than the cache is wide comes back when all else has ended.
                waiting = call.run(waiting, take)
                # Not kept when the call fails: it may hold numbers that are not finite.
                self._storage = storage
                before = self.prompt_reuse
                self.prompt_reuse = PromptReuse(
                    before.asked + call.asked, before.reused + call.asked - call.computed
                )
        return found_P_G

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

    def _check(self, requests_P: Sequence[Request], first: int) -> None:
        config = self.decoder.config
        check_requests(requests_P, config.vocab_size, config.max_positions, first)
        for i, request in enumerate(requests_P, first):
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

    def _cache(self, requests: Collection[Request], is_open: bool) -> tuple[KVCache, Tensor]:
        """Its rows: what the samples, `max_rows` and the byte budget allow, and one more.

        is_open: others may come, so it has all rows, and some room for longer ones
        """
        config, dtype = self.decoder.config, self._dtype
        slot_bytes = bytes_per_slot(config, dtype)
        width = self._width(max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests))
        if is_open:
            wider = self._width(min(width * 5 // 4, config.max_positions))
            costs_rows = (self.max_rows + 1) * wider * slot_bytes > self.max_cache_bytes
            width = width if costs_rows else wider
        row_bytes = width * slot_bytes
        num_rows = self.max_rows if is_open else sum(len(request.seeds) for request in requests)
        num_rows = min(num_rows, self.max_rows, self.max_cache_bytes // row_bytes - 1) + 1
        size = num_rows * row_bytes // dtype.itemsize
        storage, self._storage = self._storage, None
        if storage is None or storage.numel() < size:
            del storage
            storage = torch.zeros(size, dtype=dtype, device=self.decoder.head_weight_VD.device)
        return KVCache(config, num_rows, width, storage), storage
