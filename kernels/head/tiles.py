"""Tiles of the odds path: the static table, which nobody has timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["logprob", "entropy", "softcap"]
"""What the product reduces besides the sum; a softcap comes with the entropy."""


@dataclass(frozen=True)
class Tile:
    """The launch configuration of the head's first matrix product."""

    block_c: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool
    warp_specialize: bool

    @property
    def words(self) -> str:
        """A number per field, as in a plan's recipe."""
        # One by one: torch.compile of 2.11 does not trace vars() or fields() of a dataclass.
        sizes = f"{self.block_c} {self.block_v} {self.block_d} {self.num_warps} {self.num_stages}"
        return f"{sizes} {int(self.tma)} {int(self.warp_specialize)}"


# Nothing here was ever timed: no kernel has run on a GPU yet. `python -m benchmarks.compile_check`
# compiled them, and these are the largest tiles without spills on Triton 3.6 and 3.9. Reducing the
# entropy or applying a softcap in the epilogue needs more registers.
ODDS_TILES = {
    80: {
        "logprob": Tile(128, 128, 32, 8, 4, tma=False, warp_specialize=False),
        "entropy": Tile(128, 128, 32, 8, 3, tma=False, warp_specialize=False),
        "softcap": Tile(128, 128, 32, 8, 3, tma=False, warp_specialize=False),
    },
    90: {
        "logprob": Tile(128, 256, 64, 4, 3, tma=True, warp_specialize=True),
        "entropy": Tile(128, 128, 64, 4, 4, tma=True, warp_specialize=True),
        "softcap": Tile(128, 128, 64, 4, 4, tma=True, warp_specialize=True),
    },
    100: {
        "logprob": Tile(128, 128, 64, 8, 4, tma=True, warp_specialize=True),
        "entropy": Tile(128, 128, 64, 8, 4, tma=True, warp_specialize=False),
        "softcap": Tile(128, 64, 64, 8, 4, tma=True, warp_specialize=False),
    },
}
# Where those fail (ladder.py): without warp specialisation, then without TMA. They compile too.
_NO_TMA = ODDS_TILES[80]
FALLBACK_TILES = {
    80: (_NO_TMA, _NO_TMA),
    90: (
        {
            "logprob": Tile(128, 256, 64, 8, 3, tma=True, warp_specialize=False),
            "entropy": Tile(128, 128, 64, 8, 3, tma=True, warp_specialize=False),
            "softcap": Tile(128, 128, 64, 8, 3, tma=True, warp_specialize=False),
        },
        _NO_TMA,
    ),
    100: (
        ODDS_TILES[100] | {"logprob": Tile(128, 128, 64, 8, 4, tma=True, warp_specialize=False)},
        _NO_TMA,
    ),
}
# What one thread block may use, CUDA C++ programming guide, table of compute capabilities.
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}

# Small tiles, so that the interpreter sees several of them and ragged tails on small inputs.
INTERPRETER_TILE = Tile(16, 32, 16, 4, 1, tma=False, warp_specialize=False)


def table_architecture(capability: tuple[int, int]) -> int:
    """The key of the tile table for a device; ValueError below compute capability 8.0."""
    major = capability[0]
    if major < 8:
        raise ValueError(f"expected compute capability >= 8.0, got {capability}; use path='rows'")
    # 12.x has neither wgmma nor tcgen05 and little shared memory: the sm_80 kernels fit it.
    return {9: 90, 10: 100, 11: 100}.get(major, 80)
