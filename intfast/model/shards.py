"""Tensor parallel: what each of some ranks holds of a model, in the layout that vLLM gives it.

`pieces` is the one map between a whole parameter and its shards. qkv_proj and gate_up_proj: rows of
each part, dealt in order, so that a shard is [q_r; k_r; v_r]; o_proj and down_proj: columns;
embedding and head: rows of the vocabulary padded as vLLM pads it, of which the last ranks hold
fewer real ones. Norms, and biases that are added after a sum, are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from intfast.kernels.head.plan import Vocabulary
from intfast.model.architecture import Architecture
from intfast.ranks import Part, Ranks

if TYPE_CHECKING:
    from intfast.model.decoder import Decoder

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Those whose layers are known to compute the same on shards."""
PADDED = 64
"""vLLM's vocabulary has a multiple of so many rows."""


class Piece(NamedTuple):
    """Rows (dim 0) or columns (1) [start, stop) of a whole tensor, and where a shard has them."""

    dim: int
    start: int
    stop: int
    at: int


def share(vocabulary: int, ranks: int) -> int:
    """Rows of the padded vocabulary that each rank holds."""
    return -(-vocabulary // PADDED) * PADDED // ranks


def pieces(config: Architecture, name: str, rank: int, ranks: int) -> list[Piece]:
    """What a rank holds of the decoder's parameter `name`; [] where each has all of it."""
    owner, leaf = name.split(".")[-2:]
    if name in VOCABULARY:
        rows = share(config.vocab_size, ranks)
        start, stop = (min(end * rows, config.vocab_size) for end in (rank, rank + 1))
        return [Piece(0, start, stop, 0)]
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    columns = {"o_proj": query, "down_proj": config.intermediate_size}
    if owner in columns and leaf == "weight":
        size = columns[owner] // ranks
        return [Piece(1, rank * size, (rank + 1) * size, 0)]
    found, begin, at = [], 0, 0
    parts = {"qkv_proj": (query, kv, kv), "gate_up_proj": (config.intermediate_size,) * 2}
    for rows in parts.get(owner, ()):
        size = rows // ranks
        found.append(Piece(0, begin + rank * size, begin + (rank + 1) * size, at))
        begin, at = begin + rows, at + size
    return found


def cut(whole: Tensor, found: Sequence[Piece]) -> Tensor:
    """A rank's shard of a whole tensor, contiguous; the tensor itself where it holds all of it."""
    if not found:
        return whole
    return torch.cat([whole.narrow(p.dim, p.start, p.stop - p.start) for p in found], found[0].dim)


def within(found: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The pieces that lie in rows [start, stop) of the whole, told from there; all columns do."""
    return [
        p if p.dim else Piece(0, p.start - start, p.stop - start, p.at)
        for p in found
        if p.dim or start <= p.start < p.stop <= stop
    ]


def is_dealt(name: str) -> bool:
    """Whether ranks hold different pieces of the parameter `name`."""
    owner, leaf = name.split(".")[-2:]
    column = owner in ("qkv_proj", "gate_up_proj")
    return name in VOCABULARY or column or (owner in ("o_proj", "down_proj") and leaf == "weight")


def is_partial(name: str) -> bool:
    """Whether a parameter is whole on every rank, but its gradient is of the rank's own heads."""
    return name.endswith((".q_norm.weight", ".k_norm.weight"))


def fault(family: str, config: Architecture, ranks: int) -> str:
    """Why so many ranks cannot hold one copy of the model; "" where they can."""
    if ranks == 1:
        return ""
    least = f"ranks.tp = {ranks}"
    if family not in FAMILIES:
        return f"{least}: {family} models are not dealt yet, only {', '.join(FAMILIES)}; use 1"
    for what, size in (
        ("key/value heads", config.num_kv_heads),
        ("columns of the feed-forward", config.intermediate_size),
        (f"rows of the vocabulary padded to {PADDED}", share(config.vocab_size, 1)),
    ):
        if size % ranks:
            return f"{least} does not divide the model's {size} {what}; use a divisor of it"
    if share(config.vocab_size, ranks) * (ranks - 1) >= config.vocab_size:
        return f"{least} leaves a rank without a row of the vocabulary; use a smaller number"
    return ""


class Sharded(NamedTuple):
    """A tensor of an export, whole when it is asked for; the ranks of a copy hold a shard each."""

    part: Tensor
    stored: Part
    ranks: Ranks

    @property
    def shape(self) -> torch.Size:
        """That of the whole."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the whole."""
        return self.part.dtype

    @property
    def nbytes(self) -> int:
        """Those of the whole."""
        return self.shape.numel() * self.part.element_size()

    def detach(self) -> Tensor:
        """The whole tensor on rank 0, the own part elsewhere; every rank must ask for it."""
        shapes = [self.stored.shard_shape(rank) for rank in range(self.ranks.tp)]
        found = self.ranks.tp_gather(self.part, shapes)
        return self.stored.joined(found.__getitem__) if self.ranks.is_main else self.part


class Shards:
    """The own shards of a model, and the ranks that hold the others."""

    def __init__(self, config: Architecture, ranks: Ranks) -> None:
        """config: of the whole model."""
        self.config, self.ranks = config, ranks
        [rows] = self.pieces(VOCABULARY[0], ranks.tp_rank)
        self.own = replace(
            config,
            vocab_size=rows.stop - rows.start,
            intermediate_size=config.intermediate_size // ranks.tp,
            num_heads=config.num_heads // ranks.tp,
            num_kv_heads=config.num_kv_heads // ranks.tp,
        )
        """The sizes of the own layers."""
        size = config.vocab_size
        self.vocabulary = Vocabulary(rows.start, share(size, ranks.tp), size, ranks)

    def pieces(self, name: str, rank: int) -> list[Piece]:
        """See `pieces`."""
        return pieces(self.config, name, rank, self.ranks.tp)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """The own shard of a whole parameter, or of a tensor laid out like it."""
        return cut(whole, self.pieces(name, self.ranks.tp_rank))

    def stored(self, name: str, part: Part, start: int = 0, stop: int = 1 << 62) -> Part:
        """What a rank has of a parameter, or of a tensor laid out like it, as one of the whole.

        part: of the own shard of the rows [start, stop), with its shape
        """
        found = [within(self.pieces(name, r), start, stop) for r in range(self.ranks.tp)]
        if not found[0]:
            return part
        found = [[p._replace(at=p.at - pieces[0].at) for p in pieces] for pieces in found]
        sizes = list(part.shape)
        sizes[found[0][0].dim] = max(piece.stop for piece in found[-1])
        return part._replace(shape=torch.Size(sizes), pieces_R=found)

    def exported(self, name: str, mine: Tensor, start: int, stop: int) -> Sharded:
        """What stands for rows [start, stop) of a dealt parameter; mine: the own ones of them."""
        part = self.stored(name, Part(mine.detach, mine.shape, mine.dtype), start, stop)
        return Sharded(mine, part, self.ranks)


def own(shards: Shards | None, name: str, whole: Tensor) -> Tensor:
    """This rank's shard of a whole parameter; without shards the whole."""
    return whole if shards is None else shards.cut(name, whole)


def stored(shards: Shards | None, name: str, mine: Tensor | Part) -> Tensor | Part:
    """What a checkpoint takes of a parameter, or of a tensor laid out like it."""
    return mine if shards is None else shards.stored(name, mine)


def state(decoder: Decoder) -> dict[str, Tensor | Part]:
    """The parameters by name, as checkpoints take them."""
    found, shards = dict(decoder.named_parameters()), decoder.shards
    if shards is None:
        return found
    own_part = shards.ranks.part
    return {
        name: shards.stored(name, Part(partial(own_part, p.detach()), p.shape, p.dtype))
        for name, p in found.items()
    }
