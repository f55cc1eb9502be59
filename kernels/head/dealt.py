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
from .plan import IGNORE, HeadPlan, Vocabulary, product

ELSEWHERE = -1
"""The own target of a row whose target is no own row: it equals no column."""


class Columns(plain.Columns):
    """See plain.Columns; what is not here is on another rank."""

    def __init__(self, target_C: Tensor, num_rows: int, vocabulary: Vocabulary) -> None:
        self.ranks = vocabulary.ranks
        column_C = target_C - vocabulary.first
        self.is_mine_C = (column_C >= 0) & (column_C < num_rows) & (target_C >= 0)
        self.is_known_C = (target_C >= 0) & (target_C < vocabulary.size) | (target_C == IGNORE)
        super().__init__(torch.where(self.is_mine_C, column_C, 0))
        others_C = torch.where(target_C == IGNORE, IGNORE, ELSEWHERE)
        self.target_C = torch.where(self.is_mine_C, column_C, others_C)
        """As a kernel takes targets, counted from the first own row."""

    def logits(self, u_CV: Tensor) -> Tensor:
        """See plain.Columns; an impossible target must show as NaN."""
        return self.from_owners(super().logits(u_CV))

    def from_owners(self, logit_C: Tensor) -> Tensor:
        """Of each row what the target's rank has."""
        logit_C = self.ranks.tp_sum(torch.where(self.is_mine_C, logit_C, 0))
        return torch.where(self.is_known_C, logit_C, torch.nan)

    def put(self, x_CV: Tensor, value_C: Tensor) -> None:
        """See plain.Columns; other columns stay."""
        super().put(x_CV, torch.where(self.is_mine_C, value_C, super().logits(x_CV)))

    def shift(self, u_CV: Tensor, logit_C: Tensor) -> Tensor:
        """See plain.Columns; asked in every call, or ranks would wait for those that do not ask."""
        return plain.excess(self.ranks.tp_max(u_CV.amax(1)), logit_C)

    def sums(self, r_C: Tensor, k_C: Tensor) -> tuple[Tensor, Tensor]:
        """See plain.Columns."""
        return self.ranks.tp_sum(torch.stack((r_C, k_C))).unbind(0)


def odds_chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, plan: HeadPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As odds.chunk: the kernels, and between them what the ranks exchange."""
    from . import odds

    columns = Columns(target_C, len(weight_VD), plan.vocabulary)
    made = odds.Launch(hidden_CD, weight_VD, columns.target_C, plan, keep)
    made.target_logits()
    logit_C, shift_C, r_C, k_C = made.stats_4C
    logit_C.copy_(columns.from_owners(logit_C))
    made.products()
    r_C[:], k_C[:] = columns.sums(*made.partial.sum(0))
    if not made.entropy:
        k_C.zero_()
    # Decided on the sums of all, and exchanged whether or not a row needs it.
    live_C = target_C != IGNORE
    again_C = live_C & (r_C >= odds.CLAMPED_SUM.value)
    shift_C.copy_(torch.where(again_C, -1.0, 0.0))
    made.rereference(columns.ranks.tp_max(made.row_tops()))
    shares = (torch.where(again_C, share_C, 0) for share_C in (r_C, k_C))
    for sum_C, again in zip((r_C, k_C), columns.sums(*shares), strict=True):
        sum_C.copy_(torch.where(again_C, again, sum_C))
    if keep:
        slope_C = 1 - (logit_C * plan.temperature / plan.softcap).square() if made.capped else 1
        columns.put(made.kept_CV, (-r_C * slope_C).to(made.kept.dtype))
    return *plain.finish(made.stats_4C, live_C), made.stats_4C, made.kept_CV


def rows_chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, plan: HeadPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As rows.chunk: each rank its own row statistics, brought to the largest shift of all."""
    from . import rows

    columns = Columns(target_C, len(weight_VD), plan.vocabulary)
    raw_CV = product(hidden_CD, weight_VD.T)
    logit_C = columns.logits(raw_CV)
    if plan.softcap:
        logit_C = plan.softcap * torch.tanh(logit_C / plan.softcap)
    logit_C = logit_C / plan.temperature
    _, _, stats_4C = rows.statistics(raw_CV, columns.target_C, plan, logit_C)
    _, shift_C, r_C, k_C = stats_4C
    drop_C = columns.ranks.tp_max(shift_C.clone()) - shift_C
    shares = r_C * torch.exp(-drop_C), (k_C - drop_C * r_C) * torch.exp(-drop_C)
    shift_C += drop_C
    r_C[:], k_C[:] = columns.sums(*shares)
    made = plain.finish(stats_4C, target_C != IGNORE)
    return *made, stats_4C, raw_CV if keep else raw_CV.new_empty(0)
