"""Streams that reach every branch of the policy losses."""

import torch

from intfast.kernels.objectives import Streams


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def some_streams(num=40, seed=0, **changes):
    """(logprob_N, Streams) with ratios on both sides of every bound; sequences of 8 rows."""
    old = -random(num, seed=seed).abs()
    fields = {
        "weight_T": torch.ones(num, dtype=torch.float64),
        "advantage_T": random(num, seed=seed + 1),
        "old_T": old,
        "reference_T": old + 0.5 * random(num, seed=seed + 3),
        "sampler_T": old + 0.6 * random(num, seed=seed + 2),
        "sequence_T": torch.arange(num) // 8,
    }
    return old + 0.8 * random(num, seed=seed + 4), Streams(**fields | changes)
