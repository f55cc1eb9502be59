"""A tile of the odds path chosen by timing, on request, and recorded.

The ops never time anything: they take the static table (`tiles.ODDS_TILES`) or a given tile.
Two runs of a timer can disagree, and then ranks differ in their last bits; so a choice is made
once, kept in a JSON file, and read from there by every later run and rank:

    choice = autotune(Shape(rows=4096, width=2560, vocabulary=151_936), "tiles.json")
    linear_objective(..., entropy="none", tile=choice.tile)
    manifest["head_tile"] = choice.record()

The candidates are those that compile without spills on every supported Triton; they are part of
`python -m benchmarks.compile_check`.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .tiles import ODDS_TILES, Kind, Tile, table_architecture

Measure = Callable[[Tile], float]
"""Seconds of one launch with a tile."""

# Another tile must be this much faster than the table's: less is noise, which would choose.
MARGIN = 0.03
ROUNDS = 9


def _tiles(*sizes: tuple[int, int, int, int, int], special: bool = False) -> tuple[Tile, ...]:
    return tuple(Tile(*size, tma=special, warp_specialize=special) for size in sizes)


def _tma_tiles(*sizes: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(Tile(*size, tma=True, warp_specialize=False) for size in sizes)


_SM90_SMALL = _tiles((128, 128, 128, 4, 2), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4), special=True)
# As little timed as the table: they compile without spills.
CANDIDATES: dict[int, dict[str, tuple[Tile, ...]]] = {
    80: {
        "logprob": _tiles((128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (64, 128, 64, 4, 4)),
        "entropy": _tiles((128, 128, 64, 8, 3), (64, 128, 64, 4, 4)),
        "softcap": _tiles((128, 128, 64, 8, 3), (64, 128, 64, 4, 4)),
    },
    90: {
        "logprob": (*_tiles((128, 128, 64, 4, 4), special=True), *_SM90_SMALL),
        "entropy": _SM90_SMALL,
        "softcap": _SM90_SMALL,
    },
    100: {
        "logprob": _tma_tiles((128, 128, 64, 8, 4), (128, 64, 64, 8, 4)),
        "entropy": _tma_tiles((128, 128, 64, 8, 3)),
        "softcap": _tma_tiles((128, 64, 64, 8, 3)),
    },
}


@dataclass(frozen=True)
class Shape:
    """What a choice holds for: a chunk of the loss head in bf16."""

    rows: int
    width: int
    vocabulary: int
    kind: Kind = "logprob"
    """"logprob" for entropy="none", "entropy" for its value, "softcap" where there is one."""
    keep: bool = True
    """Whether the exponentials are kept for gradients."""


@dataclass(frozen=True)
class Choice:
    """A tile and where it comes from."""

    key: str
    """Device, versions and shape; a choice is good for nothing else."""
    tile: Tile
    seconds: tuple[tuple[Tile, float], ...]
    """Every candidate with its median; the table's own tile first."""

    def record(self) -> dict:
        """Plain values for a manifest or the file."""
        timed = [{"tile": asdict(tile), "seconds": value} for tile, value in self.seconds]
        return {"key": self.key, "tile": asdict(self.tile), "seconds": timed}


def candidates(arch: int, kind: Kind) -> list[Tile]:
    """The tiles to try on an architecture, the table's own first."""
    own = ODDS_TILES[arch][kind]
    return [own, *(tile for tile in CANDIDATES[arch][kind] if tile != own)]


def choose(seconds: Sequence[tuple[Tile, float]]) -> Tile:
    """The fastest tile, or the first one unless another is faster by more than `MARGIN`."""
    best, least = min(seconds, key=lambda pair: pair[1])
    first, base = seconds[0]
    return best if least < (1 - MARGIN) * base else first


def autotune(
    shape: Shape,
    file: str | os.PathLike,
    *,
    device: str | torch.device = "cuda",
    measure: Measure | None = None,
) -> Choice:
    """The recorded choice for this device, software and shape; timed and recorded if there is none.

    shape     rows is the chunk's, see `plan.HeadPlan.chunk_rows`
    file      JSON; made if missing. Let one rank write it before the others read it
    measure   a timer in place of the device's own
    raises    ValueError on a file that is not of this form, RuntimeError without a CUDA device
    """
    device, path = torch.device(device), Path(file)
    if measure is None and device.type != "cuda":
        raise RuntimeError(f"autotune: expected a CUDA device to time on, got {device}")
    arch, name = _device(device)
    key = _key(name, shape)
    known = _read(path)
    if key in known:
        return _choice(known[key])
    tiles = candidates(arch, shape.kind)
    timer = _device_timer(shape, device) if measure is None else measure
    # In turns, so that a drift of the clock meets all of them alike.
    rounds = [[timer(tile) for tile in tiles] for _ in range(ROUNDS)]
    medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
    timed = tuple(zip(tiles, medians, strict=True))
    choice = Choice(key, choose(timed), timed)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps({**known, key: choice.record()}, indent=1) + "\n")
    part.replace(path)
    return choice


def _device(device: torch.device) -> tuple[int, str]:
    if device.type != "cuda":
        return 90, device.type
    capability = torch.cuda.get_device_capability(device)
    return table_architecture(capability), torch.cuda.get_device_name(device)


def _key(name: str, shape: Shape) -> str:
    import triton

    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    sizes = f"{shape.rows} x {shape.width} x {shape.vocabulary}"
    return f"{name}, {versions}: {sizes} {shape.kind}{'' if shape.keep else ' no-grad'}"


def _read(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        return {key: _choice(value) and value for key, value in known.items()}
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected recorded choices, got {error}; delete it") from error


def _choice(record: dict) -> Choice:
    timed = tuple((Tile(**entry["tile"]), entry["seconds"]) for entry in record["seconds"])
    return Choice(record["key"], Tile(**record["tile"]), timed)


def _device_timer(shape: Shape, device: torch.device) -> Measure:
    from . import chunks
    from .plan import Head, plan_head

    made = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=made, device=device).to(torch.bfloat16)

    hidden_CD = randn(shape.rows, shape.width) / shape.width**0.5
    weight_VD = randn(shape.vocabulary, shape.width)
    target_C = torch.arange(shape.rows, device=device) % shape.vocabulary
    warm: set[Tile] = set()

    def measure(tile: Tile) -> float:
        options = Head(
            tile=tile, path="odds", chunk_bytes=2**62,
            entropy="none" if shape.kind == "logprob" else "value",
            softcap=30.0 if shape.kind == "softcap" else None,
        )  # fmt: skip
        plan = plan_head(hidden_CD, weight_VD, target_C, options)
        inputs = chunks.Inputs(hidden_CD, weight_VD, target_C, plan)
        # The first launch compiles, and the next ones follow other tiles: neither is timed.
        for _ in range(1 if tile in warm else 3):
            chunks.forward(inputs, 0, shape.rows, shape.keep)
        warm.add(tile)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        chunks.forward(inputs, 0, shape.rows, shape.keep)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return measure
