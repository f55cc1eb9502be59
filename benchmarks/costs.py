"""What an op must cost at least: operations, bytes and the time a device needs for them.

FLOPs are counted in matrix products of the loss head, 2 N H V each, for the n rows that carry
loss. Bytes are the least traffic: every input read and every output written once per product.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Roof:
    """What a device can do."""

    bf16_flops: float
    """Per second, in a large matrix product on random data."""
    bytes: float
    """Per second, copied."""
    source: str


# By a word of the device's name. Data sheets promise more than a matrix product on random data
# reaches, so a share of a data sheet's roof is a lower bound of what the kernel achieves.
ROOFS = {
    "H200": Roof(790e12, 4.3e12, "measured"),
    "H100": Roof(989e12, 3.35e12, "data sheet"),
    "A100": Roof(312e12, 2.04e12, "data sheet"),
    "B200": Roof(2250e12, 8.0e12, "data sheet"),
}


def roof(device_name: str) -> Roof | None:
    """The roof of a device; None where it is not known."""
    return next((value for key, value in ROOFS.items() if key in device_name), None)


@dataclass(frozen=True)
class Cost:
    """The cost card of one call."""

    flops: float
    bytes: float

    def floor_seconds(self, roof: Roof) -> float:
        """The larger of what the operations and what the bytes take."""
        return max(self.flops / roof.bf16_flops, self.bytes / roof.bytes)


# Bytes of a gradient that is written once, and of an fp32 one that is added to.
FRESH, ADDED = 2, 8


def head_forward(rows: int, hidden: int, vocabulary: int, size: int = 2) -> Cost:
    """Log-probs without a gradient: one product, 2 n H V."""
    read = (rows * hidden + vocabulary * hidden) * size
    return Cost(2.0 * rows * hidden * vocabulary, read + 8 * rows)


def head_step(
    rows: int, hidden: int, vocabulary: int, *, products: int = 3, size: int = 2, dw: int = FRESH
) -> Cost:
    """Forward and both gradients: 3 products (6 n H V), or 4 with the logits made twice."""
    x, w = rows * hidden, vocabulary * hidden
    return Cost(2.0 * products * x * vocabulary, (3 * x + 2 * w) * size + w * dw)


def advantages(samples: int, groups: int, tokens: int) -> Cost:
    """Rewards and offsets in, advantages and weights of samples and tokens out."""
    return Cost(0.0, 8 * samples + 8 * (groups + 1) + 8 * (samples + 1) + 12 * tokens)
