"""The loss head of one chunk of rows, its vocabulary dealt to several processes.

Each has some rows of the weight and all hidden states. The formulas are those of `odds`; what they
take over the vocabulary is taken over the processes, C numbers each: the target's logit (a sum, 0
where it lies elsewhere), the largest logit, R and K. So statistics and objective are the same on
all, and -R stands in the target's column on its owner alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import plain
from .plan import IGNORE, Vocabulary


class Columns(plain.Columns):
    """See plain.Columns; what is not here is on another rank."""

    def __init__(self, target_C: Tensor, num_rows: int, vocabulary: Vocabulary) -> None:
        self.ranks = vocabulary.ranks
        column_C = target_C - vocabulary.first
        self.is_mine_C = (column_C >= 0) & (column_C < num_rows) & (target_C >= 0)
        self.is_known_C = (target_C >= 0) & (target_C < vocabulary.size) | (target_C == IGNORE)
        super().__init__(torch.where(self.is_mine_C, column_C, 0))

    def logits(self, u_CV: Tensor) -> Tensor:
        """See plain.Columns; an impossible target must show as NaN."""
        logit_C = torch.where(self.is_mine_C, super().logits(u_CV), 0)
        return torch.where(self.is_known_C, self.ranks.tp_sum(logit_C), torch.nan)

    def put(self, x_CV: Tensor, value_C: Tensor) -> None:
        """See plain.Columns; other columns stay."""
        super().put(x_CV, torch.where(self.is_mine_C, value_C, super().logits(x_CV)))

    def shift(self, u_CV: Tensor, logit_C: Tensor) -> Tensor:
        """See plain.Columns; asked in every call, or ranks would wait for those that do not ask."""
        return plain.excess(self.ranks.tp_max(u_CV.amax(1)), logit_C)

    def sums(self, r_C: Tensor, k_C: Tensor) -> tuple[Tensor, Tensor]:
        """See plain.Columns."""
        return self.ranks.tp_sum(torch.stack((r_C, k_C))).unbind(0)
