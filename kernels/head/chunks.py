"""The loss head by chunks of rows: statistics and gradients, behind two registered operators.

`forward` makes a chunk's log-probs and, on request, keeps what the gradients need; `backward`
turns the derivatives by log-prob and entropy into both gradient products. The operators are opaque
to torch.compile; what lies between them (the objective) is not, so it fuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import dealt, plain
from .plan import (
    IGNORE,
    NAMESPACE,
    HeadPlan,
    accumulate,
    padded_columns,
    product,
    read_recipe,
    readable,
)


class Chunk(NamedTuple):
    """The statistics of a chunk of rows, and what its gradients need."""

    logprob_C: Tensor
    entropy_C: Tensor
    stats: Tensor
    kept: Tensor
    hidden_CD: Tensor
    target_C: Tensor


class Inputs(NamedTuple):
    """The rows that enter the head, and how it runs."""

    hidden_RD: Tensor
    weight_VD: Tensor
    target_R: Tensor
    plan: HeadPlan


def gather(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, rows_R: Tensor | None, plan: HeadPlan
) -> Inputs:
    """The rows of a call, compacted."""
    if rows_R is not None:
        hidden_TD, target_T = hidden_TD.index_select(0, rows_R), target_T.index_select(0, rows_R)
    if plan.path != "plain" and hidden_TD.stride(1) != 1:
        hidden_TD = hidden_TD.contiguous()
    return Inputs(hidden_TD, weight_VD, target_T, plan)


def scatter(value_R: Tensor, rows_R: Tensor | None, num_rows: int) -> Tensor:
    """The inverse of `gather` for outputs: rows that did not take part are 0."""
    if rows_R is None:
        return value_R
    return value_R.new_zeros(num_rows, *value_R.shape[1:]).index_copy_(0, rows_R, value_R)


def forward(inputs: Inputs, start: int, end: int, keep: bool) -> Chunk:
    """The chunk of rows start..end."""
    hidden_CD, target_C = _rows(inputs, start, end)
    if _is_called_directly(inputs):
        with torch.autocast(hidden_CD.device.type, enabled=False):
            made = plain.chunk(hidden_CD, inputs.weight_VD, target_C, inputs.plan, keep)
    elif inputs.plan.vocabulary is not None:
        # No operator takes what a dealt head waits for.
        made = _run(hidden_CD, inputs.weight_VD, target_C, inputs.plan, keep)
    else:
        made = _chunk(hidden_CD, inputs.weight_VD, target_C, inputs.plan.recipe, keep)
    return Chunk(*made, hidden_CD, target_C)


def statistics(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(logprob_R, entropy_R) of all rows, nothing kept: one matrix product."""
    chunks = inputs.plan.chunks(len(inputs.hidden_RD)) or [(0, 0)]
    parts = [forward(inputs, start, end, keep=False) for start, end in chunks]
    return (
        torch.cat([part.logprob_C for part in parts]),
        torch.cat([part.entropy_C for part in parts]),
    )


class Gradients:
    """Collects the gradients of all chunks.

    `hidden_RD` is None where it is not wanted. The weight's gradient goes into `main_grad_VD` where
    one is given, else into a buffer of its own: in the weight's type for a single chunk, otherwise
    in fp32 until the end, because a sum over chunks in bf16 rounds once a chunk.
    """

    def __init__(
        self, inputs: Inputs, need_hidden: bool, need_weight: bool, main_grad_VD: Tensor | None
    ) -> None:
        hidden_RD, weight_VD, _, plan = inputs
        self.inputs = inputs
        single = len(plan.chunks(len(hidden_RD))) <= 1
        self.need_hidden, self.hidden_RD = need_hidden, None
        if need_hidden and not (single and len(hidden_RD)):
            self.hidden_RD = torch.empty_like(hidden_RD)
        self.weight_VD = main_grad_VD
        self.fresh = main_grad_VD is None and need_weight
        if self.fresh:
            wide = torch.promote_types(weight_VD.dtype, torch.float32)
            self.weight_VD = torch.empty_like(weight_VD, dtype=None if single else wide)
            if len(hidden_RD) == 0:
                self.weight_VD.zero_()

    def add(
        self, chunk: Chunk, start: int, end: int, dlogprob_C: Tensor, dentropy_C: Tensor | None
    ) -> None:
        """Both gradient products of one chunk; `chunk.kept` is used up."""
        hidden_CD, target_C = chunk.hidden_CD, chunk.target_C
        live_C = target_C != IGNORE
        dlogprob_C = torch.where(live_C, dlogprob_C, 0)
        if dentropy_C is not None:
            dentropy_C = torch.where(live_C, dentropy_C, 0)
        plan = self.inputs.plan
        direct = _is_called_directly(self.inputs) or plan.vocabulary is not None
        hidden_grad_CD = (_run_gradient if direct else _chunk_gradient)(
            chunk.kept, chunk.stats, dlogprob_C, dentropy_C, hidden_CD, self.inputs.weight_VD,
            target_C, self.weight_VD, plan if direct else plan.recipe, self.need_hidden,
            self.fresh and start == 0,
        )  # fmt: skip
        if self.need_hidden and self.hidden_RD is None:
            self.hidden_RD = hidden_grad_CD
        elif self.need_hidden:
            self.hidden_RD[start:end] = hidden_grad_CD

    def returned_weight(self) -> Tensor | None:
        """The weight's gradient for autograd: None in main-gradient mode or for a frozen head."""
        return self.weight_VD.to(self.inputs.weight_VD.dtype) if self.fresh else None


def _rows(inputs: Inputs, start: int, end: int) -> tuple[Tensor, Tensor]:
    target_C = inputs.target_R[start:end]
    hidden_CD, ignored_C1 = inputs.hidden_RD[start:end], (target_C == IGNORE)[:, None]
    # On the CPU a look is cheaper than the copy.
    if readable(target_C) and not ignored_C1.any():
        return hidden_CD, target_C
    # Zeros instead of the rows themselves: a NaN in an ignored row must reach nothing.
    return hidden_CD.masked_fill(ignored_C1, 0), target_C


def _is_called_directly(inputs: Inputs) -> bool:
    """Whether a chunk passes the operators by: their dispatch costs as much as a small chunk."""
    return inputs.plan.path == "plain" and readable(inputs.target_R)


def _without_autocast(run: Callable) -> Callable:
    """Autocast would round the factors of a product to its own type without a word."""

    @functools.wraps(run)
    def guarded(first: Tensor, *rest: object) -> object:
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *rest)

    return guarded


def _run_chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, recipe: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(hidden_CD, weight_VD, target_C, read_recipe(recipe), keep)


@_without_autocast
def _run(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, plan: HeadPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if plan.path == "plain":
        return plain.chunk(hidden_CD, weight_VD, target_C, plan, keep)
    if hidden_CD.shape[0] == 0:
        return _chunk_fake(hidden_CD, weight_VD, target_C, plan.recipe, keep)
    if plan.vocabulary is not None:
        run = {"odds": dealt.odds_chunk, "rows": dealt.rows_chunk}[plan.path]
        return run(hidden_CD, weight_VD, target_C, plan, keep)
    if plan.path == "odds":
        from . import odds

        return odds.chunk(hidden_CD, weight_VD, target_C, plan, keep)
    from . import rows

    return rows.chunk(hidden_CD, weight_VD, target_C, plan, keep)


_chunk = torch.library.custom_op(f"{NAMESPACE}::head_chunk", _run_chunk, mutates_args=())


@_chunk.register_fake
def _chunk_fake(hidden_CD, weight_VD, target_C, recipe, keep):
    num_rows, vocabulary = hidden_CD.shape[0], weight_VD.shape[0]
    wide = torch.promote_types(hidden_CD.dtype, torch.float32)
    logprob_C = hidden_CD.new_empty(num_rows, dtype=wide)
    stats = hidden_CD.new_empty(4, num_rows, dtype=wide)
    if not keep:
        kept = hidden_CD.new_empty(0)
    elif read_recipe(recipe).path == "odds":
        kept = hidden_CD.new_empty(num_rows, padded_columns(vocabulary))[:, :vocabulary]
    else:
        kept = hidden_CD.new_empty(num_rows, vocabulary, dtype=wide)
    return logprob_C, torch.empty_like(logprob_C), stats, kept


def _run_chunk_gradient(
    kept_CV: Tensor,
    stats: Tensor,
    dlogprob_C: Tensor,
    dentropy_C: Tensor | None,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    target_C: Tensor,
    weight_grad_VD: Tensor | None,
    recipe: str,
    need_hidden: bool,
    overwrite: bool,
) -> Tensor:
    return _run_gradient(
        kept_CV, stats, dlogprob_C, dentropy_C, hidden_CD, weight_VD, target_C, weight_grad_VD,
        read_recipe(recipe), need_hidden, overwrite,
    )  # fmt: skip


@_without_autocast
def _run_gradient(
    kept_CV: Tensor,
    stats: Tensor,
    dlogprob_C: Tensor,
    dentropy_C: Tensor | None,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    target_C: Tensor,
    weight_grad_VD: Tensor | None,
    plan: HeadPlan,
    need_hidden: bool,
    overwrite: bool,
) -> Tensor:
    scale_C1 = None
    if plan.path == "rows":
        from . import rows

        if plan.vocabulary is not None:
            target_C = dealt.Columns(target_C, len(weight_VD), plan.vocabulary).target_C
        left_CV = rows.chunk_gradient(
            kept_CV, stats, dlogprob_C, dentropy_C, target_C, plan, hidden_CD.dtype
        )
    elif plan.path == "odds":
        from . import odds

        left_CV, scale_C = odds.chunk_gradient(kept_CV, stats, dlogprob_C, plan)
        scale_C1 = scale_C[:, None]
    else:
        left_CV, scale_C = plain.chunk_gradient(
            kept_CV, stats, dlogprob_C, dentropy_C, target_C, weight_VD, plan
        )
        scale_C1 = scale_C[:, None]
        # Both products take the row scale: for few columns it is cheaper on their common factor.
        if left_CV.shape[1] < 2 * hidden_CD.shape[1]:
            left_CV, scale_C1 = left_CV.mul_(scale_C1), None
    hidden_grad_CD = hidden_CD.new_empty(0, hidden_CD.shape[1])
    if need_hidden:
        hidden_grad_CD = product(left_CV, weight_VD.to(left_CV.dtype))
        if scale_C1 is not None:
            hidden_grad_CD *= scale_C1
    # Of a dealt head a share of the sum, which is on its way while the weight's product runs.
    is_share = need_hidden and plan.vocabulary is not None
    summed = plan.vocabulary.ranks.tp_summing(hidden_grad_CD) if is_share else None
    if weight_grad_VD is not None:
        right_CD = hidden_CD if scale_C1 is None else hidden_CD * scale_C1
        accumulate(weight_grad_VD, left_CV.T, right_CD.to(left_CV.dtype), overwrite)
    if summed is not None:
        summed()
    return hidden_grad_CD.to(hidden_CD.dtype)


_chunk_gradient = torch.library.custom_op(
    f"{NAMESPACE}::head_chunk_gradient",
    _run_chunk_gradient,
    mutates_args=("kept_CV", "weight_grad_VD"),
)


@_chunk_gradient.register_fake
def _chunk_gradient_fake(
    kept_CV, stats, dlogprob_C, dentropy_C, hidden_CD, weight_VD, target_C, weight_grad_VD,
    recipe, need_hidden, overwrite,
):  # fmt: skip
    return hidden_CD.new_empty(hidden_CD.shape[0] if need_hidden else 0, hidden_CD.shape[1])
