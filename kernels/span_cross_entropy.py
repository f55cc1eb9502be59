"""The InT loss: cross-entropy over spans of tokens, at the cost of the spans alone.

    loss = -sum over t of weight[t] * logprob[t]

Rows outside the spans never reach a matrix product. Their index is made on the host, where the
collator knows the spans, so the device is never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from .head.plan import HeadOptions
from .linear_objective import linear_objective
from .objectives import CrossEntropy, Streams


def span_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    spans: Sequence[tuple[int, int]] | Tensor,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """0-dim sum over the spans' tokens of weight times minus log-prob; fp32, differentiable.

    hidden_TD, weight_VD, target_T   as in `linear_objective`
    spans     (start, end) rows of weight 1, end excluded, without overlap; or a (T,) float weight
              per token. CUDA weights need rows_R, or the index would have to be read back
    options   `head.plan.HeadOptions`; the entropy is not computed
    raises    ValueError as `linear_objective`, and on a span outside the rows or an overlap
    """
    rows_R = options.pop("rows_R", None)
    if not isinstance(spans, Tensor):
        spans = _span_weights(spans, hidden_TD.shape[0])
    if rows_R is None:
        rows_R = _live_rows(spans, hidden_TD.device)
    weight_T = spans.to(hidden_TD.device, non_blocking=True)
    options["entropy"] = "none"
    return linear_objective(
        hidden_TD, weight_VD, target_T, CrossEntropy(), Streams(weight_T), rows_R=rows_R, **options
    ).loss


def _span_weights(spans: Sequence[tuple[int, int]], num_rows: int) -> Tensor:
    weight_T = torch.zeros(num_rows)
    for start, end in spans:
        if not 0 <= start <= end <= num_rows:
            raise ValueError(f"spans: expected 0 <= start <= end <= {num_rows}, got {start, end}")
        if weight_T[start:end].any():
            raise ValueError(f"spans: expected no overlap, got {start, end} twice; merge them")
        weight_T[start:end] = 1
    return weight_T


def _live_rows(weight_T: Tensor, device: torch.device) -> Tensor | None:
    """The index of the rows of weight other than 0; None where that is all of them."""
    if weight_T.device.type != "cpu":
        raise ValueError(
            f"spans: expected host weights or rows_R, got weights on {weight_T.device} alone; "
            "pass the collator's index as rows_R"
        )
    rows_R = weight_T.nonzero()[:, 0]
    if len(rows_R) == len(weight_T):
        return None
    return rows_R.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows_R
