"""The products of a layer and the embedding: whole, or the own rows or columns of ranks together.

Of several ranks (shards.py), those behind a norm hold rows, those before the stream columns; so one
sum over ranks leaves attention and one the feed-forward, and backward one enters each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intfast.model import fixed
from intfast.model.shards import Shards
from intfast.ranks import Ranks


class Linear(nn.Linear):
    """nn.Linear without the time for an initialisation: weights are loaded."""

    row_sizes: tuple[int, ...] = ()
    """Of the calls that generation makes; see fixed.py. Empty: one call."""

    def reset_parameters(self) -> None:
        """Leave the parameters as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., num_in) to (..., num_out)."""
        if not self.row_sizes or len(x) in self.row_sizes or not torch.is_inference_mode_enabled():
            return F.linear(x, self.weight, self.bias)
        return fixed.linear(x, self.weight, self.bias, self.row_sizes)


class Embedding(nn.Module):
    """The table of the vocabulary; uninitialised, as all weights are loaded."""

    def __init__(self, num_rows: int, size: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size, **factory))

    def forward(self, token_T: Tensor) -> Tensor:
        """(T, D) rows of the table."""
        return F.embedding(token_T, self.weight)


class _Enter(torch.autograd.Function):
    """Where the ranks part: each gives a share of the gradient of what they all took."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy: the gradient may be needed elsewhere as it is.
        return ctx.ranks.tp_sum(grad.clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    """Where the ranks meet: each made a share of the sum, and takes the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.tp_sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ColumnLinear(Linear):
    """The own rows of the weight: this rank's heads, or columns of the feed-forward."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """(..., num_in) to this rank's part of (..., num_out)."""
        return super().forward(_Enter.apply(x, self.ranks))


class RowLinear(Linear):
    """The own columns of the weight; the bias is whole, and joins after the sum."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of (..., num_in) to (..., num_out)."""
        out = _Leave.apply(F.linear(x, self.weight), self.ranks)
        return out if self.bias is None else out + self.bias


class ShardedEmbedding(Embedding):
    """The own rows of the table; a token has its row on one rank, and 0 on the others."""

    ranks: Ranks
    first: int

    def forward(self, token_T: Tensor) -> Tensor:
        """(T, D) rows of the whole table."""
        row_T = token_T - self.first
        is_mine_T = (row_T >= 0) & (row_T < len(self.weight))
        x_TD = F.embedding(torch.where(is_mine_T, row_T, 0), self.weight)
        return _Leave.apply(torch.where(is_mine_T[:, None], x_TD, 0), self.ranks)


def divide(model: nn.Module, shards: Shards) -> None:
    """Let the products of a decoder that was built with the own sizes meet those of the others."""
    kinds = {"qkv_proj": ColumnLinear, "gate_up_proj": ColumnLinear}
    kinds |= {"o_proj": RowLinear, "down_proj": RowLinear, "embed_tokens": ShardedEmbedding}
    for name, module in model.named_modules():
        if kind := kinds.get(name.rpartition(".")[2]):
            # The parameters stay; only what is computed with them is another.
            module.__class__, module.ranks = kind, shards.ranks
            module.first = shards.vocabulary.first
