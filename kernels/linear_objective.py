"""The loss head and an objective in one pass: 6TDV operations for every token-level objective.

The gradient of the logits of row t is c_t (onehot - p_t) plus an entropy term, and c_t follows from
the row's own log-prob and its streams. So both gradient products run in the forward, on the
exponentials that gave the log-prob, and the backward only scales.

An objective that couples tokens (`whole_batch`) runs in the same pass while all rows fit one chunk.
With more chunks the statistics of all rows are made first and each chunk's logits again: 8TDV.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .head import chunks, ladder
from .head.plan import IGNORE, Head, HeadOptions, expect, head_of, readable
from .objectives import Objective, Streams, Terms


class ObjectiveOutput(NamedTuple):
    """What `linear_objective` returns; only the loss is differentiable."""

    loss: Tensor
    """0-dim sum over tokens of weight times loss, fp32 (fp64 for fp64 inputs)."""
    logprob_T: Tensor
    """0 where a token took no part."""
    entropy_T: Tensor
    """Undefined with entropy="none"."""


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TD, weight_VD, target_T, rows_R, main_grad_VD, plan, need, objective, streams
    ):
        inputs = chunks.gather(hidden_TD, weight_VD, target_T, rows_R, plan)
        if rows_R is not None:
            streams = streams.rows(rows_R)
        grads = chunks.Gradients(inputs, *need, main_grad_VD)
        loss, logprob_R, entropy_R = _run(inputs, objective, streams, grads)
        ctx.save_for_backward(grads.hidden_RD, grads.returned_weight(), rows_R)
        ctx.num_rows = hidden_TD.shape[0]
        ctx.accumulated = main_grad_VD is not None
        logprob_T = chunks.scatter(logprob_R, rows_R, ctx.num_rows)
        entropy_T = chunks.scatter(entropy_R, rows_R, ctx.num_rows)
        ctx.mark_non_differentiable(logprob_T, entropy_T)
        return loss, logprob_T, entropy_T

    @staticmethod
    def backward(ctx, dloss, _dlogprob, _dentropy):
        hidden_grad_RD, weight_grad_VD, rows_R = ctx.saved_tensors
        if ctx.accumulated:
            _expect_one(dloss)
        # Out of place: the graph may be retained, and these are needed again.
        if not _is_one(dloss):
            hidden_grad_RD = None if hidden_grad_RD is None else hidden_grad_RD * dloss
            weight_grad_VD = None if weight_grad_VD is None else weight_grad_VD * dloss
        if hidden_grad_RD is not None:
            hidden_grad_RD = chunks.scatter(hidden_grad_RD, rows_R, ctx.num_rows)
        return hidden_grad_RD, weight_grad_VD, None, None, None, None, None, None, None


def _run(
    inputs: chunks.Inputs, objective: Objective, streams: Streams, grads: chunks.Gradients | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprob_R, entropy_R); the gradients go into `grads`."""
    bounds = inputs.plan.chunks(len(inputs.hidden_RD)) or [(0, 0)]
    couples = objective.whole_batch and len(bounds) > 1
    if couples:
        logprob_R, entropy_R = chunks.statistics(inputs)
        whole = _weighted(objective, logprob_R, entropy_R, inputs.target_R, streams)
    loss, logprobs, entropies = 0.0, [], []
    for start, end in bounds:
        rows = slice(start, end)
        if couples and grads is None:
            terms = Terms(*(None if term is None else term[rows] for term in whole))
            loss = loss + terms.loss_T.sum()
            continue
        chunk = chunks.forward(inputs, start, end, keep=grads is not None)
        logprobs.append(chunk.logprob_C)
        entropies.append(chunk.entropy_C)
        if couples:
            terms = Terms(*(None if term is None else term[rows] for term in whole))
        else:
            target_C = inputs.target_R[rows]
            terms = _weighted(
                objective, chunk.logprob_C, chunk.entropy_C, target_C, streams.rows(rows)
            )
        loss = loss + terms.loss_T.sum()
        if grads is not None and start < end:
            grads.add(chunk, start, end, terms.dlogprob_T, terms.dentropy_T)
    if couples:
        return loss, logprob_R, entropy_R
    return loss, torch.cat(logprobs), torch.cat(entropies)


def _weighted(
    objective: Objective,
    logprob_C: Tensor,
    entropy_C: Tensor,
    target_C: Tensor,
    streams: Streams,
) -> Terms:
    weight_C = streams.weight_T.to(logprob_C.dtype)
    live_C = target_C != IGNORE
    terms = objective(logprob_C, entropy_C, streams)
    # where() and not a product: NaN in a stream of a dead token must reach nothing
    return Terms(
        *(None if term is None else torch.where(live_C, term * weight_C, 0) for term in terms)
    )


def _is_one(dloss: Tensor) -> bool:
    """Whether scaling can be skipped."""
    return readable(dloss) and float(dloss) == 1.0


def _expect_one(dloss: Tensor) -> None:
    message = (
        "main_grad_VD: expected loss.backward() with gradient 1, because the weight's gradient was "
        "added in the forward; put loss scales into the token weights"
    )
    if readable(dloss):
        if float(dloss) != 1.0:
            raise ValueError(f"{message}, got {float(dloss)}")
    else:
        torch._assert_async(dloss == 1, message)


def _check_streams(streams: Streams, hidden_TD: Tensor) -> None:
    for name, stream in zip(streams._fields, streams, strict=True):
        if stream is None:
            continue
        # Not wider than log-probs are: the derivatives would be, and fit no gradient.
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        fits = torch.promote_types(stream.dtype, wide) == wide
        dtype = torch.int64 if name == "sequence_T" else stream.dtype if fits else wide
        expect(f"streams.{name}", stream, hidden_TD.shape[:1], dtype, hidden_TD.device)
        if stream.requires_grad:
            raise ValueError(f"streams.{name}: expected a constant, got requires_grad; detach it")


def _resolve(head_options: Head, objective: Objective) -> Head:
    if not objective.entropy_gradient:
        # A gradient that no objective asks for would only cost memory.
        entropy = "value" if head_options.entropy == "gradient" else head_options.entropy
    else:
        entropy = "gradient"
    return dataclasses.replace(head_options, entropy=entropy)


def linear_objective(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    objective: Objective,
    streams: Streams,
    **options: Unpack[HeadOptions],
) -> ObjectiveOutput:
    """The weighted sum of an objective over tokens, its gradients made in the forward.

    hidden_TD   (T, D) bf16, fp16, fp32 or fp64; differentiable
    weight_VD   (V, D) same dtype; differentiable; a frozen one (requires_grad False and no
                main_grad_VD) costs no gradient product
    target_T    (T,)   int64 in [0, V); IGNORE takes no part, like weight 0
    objective   from `objectives`; operations: 6TDV, or 8TDV for a `whole_batch` objective whose
                rows exceed one chunk; 2TDV without gradients
    streams     the weights and what else the objective reads, (T,) each, no gradient
    options     `head.plan.HeadOptions`; the rows of rows_R must contain every row of weight other
                than 0. With main_grad_VD the weight's gradient is added during this call, so call
                backward with gradient 1 and not under activation checkpointing
    raises      ValueError as `linear_logprob`; on a missing stream; on a gradient other than 1
                in main-gradient mode (on CUDA a device-side assertion)
    """
    settings = _resolve(head_of(options), objective)
    plan, *need = ladder.plan_call(hidden_TD, weight_VD, target_T, settings)
    _check_streams(streams, hidden_TD)
    rows_R = settings.rows_R
    target_T = torch.where(streams.weight_T == 0, IGNORE, target_T)
    if any(need):
        outputs = _LinearObjective.apply(
            hidden_TD, weight_VD, target_T, rows_R, settings.main_grad_VD, plan, tuple(need),
            objective, streams,
        )  # fmt: skip
        return ObjectiveOutput(*outputs)
    inputs = chunks.gather(hidden_TD, weight_VD, target_T, rows_R, plan)
    streams = streams if rows_R is None else streams.rows(rows_R)
    loss, logprob_R, entropy_R = _run(inputs, objective, streams, None)
    num_rows = hidden_TD.shape[0]
    logprob_T = chunks.scatter(logprob_R, rows_R, num_rows)
    return ObjectiveOutput(loss, logprob_T, chunks.scatter(entropy_R, rows_R, num_rows))
