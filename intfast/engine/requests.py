"""What both engines ask of a request before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from intfast.engine.protocol import Request


class Limits(NamedTuple):
    """What the token ids of a model must keep to."""

    vocab_size: int
    context: int


def check(requests_P: Sequence[Request], limits: Limits) -> None:
    """Raise ValueError, naming the request, for what no engine can generate."""
    for i, request in enumerate(requests_P):
        name, s = f"requests[{i}]", request.sampling
        seeds_fit = all(0 <= seed < 2**63 for seed in request.seeds)
        for is_right, message in (
            (0 <= s.temperature < math.inf, f"temperature must be >= 0, got {s.temperature}"),
            (0 < s.top_p <= 1, f"top_p must be in (0, 1], got {s.top_p}"),
            (s.top_k >= 0, f"top_k must be >= 0 (0: no limit), got {s.top_k}"),
            (s.max_new_tokens >= 1, f"max_new_tokens must be >= 1, got {s.max_new_tokens}"),
            (seeds_fit, "seeds must be in [0, 2**63)"),
        ):
            if not is_right:
                raise ValueError(f"{name}: {message}")
        check_tokens(f"{name}.prompt_ids", request.prompt_ids, s.max_new_tokens, limits)


def check_tokens(name: str, tokens: Sequence[int], num_new: int, limits: Limits) -> None:
    """Raise ValueError unless these are ids of the model with room for `num_new` after them."""
    if not tokens:
        raise ValueError(f"{name}: expected at least one token, got none")
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        bad = next(t for t in tokens if not 0 <= t < limits.vocab_size)
        raise ValueError(f"{name}: token id {bad} is outside of the {limits.vocab_size} ids")
    if len(tokens) + num_new > limits.context:
        new = f" + max_new_tokens {num_new}" if num_new else ""
        raise ValueError(
            f"{name}: {len(tokens)} tokens{new} exceed the context of {limits.context} tokens"
        )
