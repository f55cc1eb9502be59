"""Supervised and policy objectives on hidden states: a weighted sum and device-side statistics.

Only the rows that carry weight come in. A loss is a sum; the caller divides by a
count of the whole update (`batch.Packed`, `credit.divisor`) before `backward`, so one batch and
any number of micro-batches give the same gradient.

Statistics are 0-dimensional tensors named `*_sum`, `*_min` or `*_max`, and are read once per
update: `merge_stats` over micro-batches, then `read_stats`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intfast.batch import Batch
from intfast.head import head_logprob
from intfast.settings import PolicyConfig

# Bounds exp() of a log-ratio; reached only by sequences that are lost anyway.
MAX_LOG_RATIO = 20.0

Stats = dict[str, Tensor]


def row_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, batch: Batch, temperature: float = 1.0
) -> Tensor:
    """logprob_N of the batch's targets, fp32: the old or reference stream under `no_grad`."""
    return _head(hidden_ND, weight_VD, batch, temperature, need_entropy=False)[0]


def sft_loss(hidden_ND: Tensor, weight_VD: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    """Sum over the weighted rows of -weight * log-prob (fp32), and its statistics.

    hidden_ND  (N, D) last hidden states of `batch.rows_N`; differentiable
    weight_VD  (V, D) same dtype; differentiable, may be frozen
    """
    logprob_N = row_logprob(hidden_ND, weight_VD, batch)
    loss_sum = -(batch.weight_N * logprob_N).sum()
    stats = _counted(logprob_N, loss_sum) | {"nll_sum": _sum(-logprob_N)}
    return loss_sum, stats


def policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    batch: Batch,
    old_logprob_N: Tensor | None,
    config: PolicyConfig,
    *,
    reference_logprob_N: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Stats]:
    """Sum over the weighted rows of weight * token loss (fp32), and its statistics.

    old_logprob_N        (N,) of the trainer at the start of the step; None when this is its only
                         update, where the current values are the old ones and the ratio is 1
    reference_logprob_N  (N,) needed exactly when config.kl is not 0
    temperature          the one the tokens were sampled with
    raises               ValueError when a stream that the objective needs is missing
    """
    logprob_N, entropy_N = _head(hidden_ND, weight_VD, batch, temperature, need_entropy=True)
    streams = Streams(
        old_N=logprob_N.detach() if old_logprob_N is None else old_logprob_N,
        advantage_N=batch.advantage_N,
        sampler_N=batch.sampler_logprob_N,
        reference_N=reference_logprob_N,
        sequence_N=batch.sequence_N,
        num_sequences=len(batch.lengths),
    )
    loss_N, stats = token_loss(logprob_N, entropy_N, streams, config)
    loss_sum = (batch.weight_N * loss_N).sum()
    return loss_sum, _counted(logprob_N, loss_sum) | stats


@dataclass(frozen=True, kw_only=True, eq=False)
class Streams:
    """What the objective knows of each row besides the current log-prob; none is differentiated."""

    old_N: Tensor
    """Log-probs of the trainer before the first update of the step."""
    advantage_N: Tensor | None
    sequence_N: Tensor
    """int64, the sequence of each row."""
    num_sequences: int
    sampler_N: Tensor | None = None
    """Log-probs under which the tokens were sampled."""
    reference_N: Tensor | None = None
    """Log-probs of the reference policy."""


def token_loss(
    logprob_N: Tensor, entropy_N: Tensor, streams: Streams, config: PolicyConfig
) -> tuple[Tensor, Stats]:
    """Loss of each row before weights, and statistics; a pure function of the streams.

    loss = correction * objective + kl * divergence - entropy bonus
    Raises ValueError when a stream that the config asks for is missing.
    """
    _check(streams, config)
    loss_N, stats = _objective(logprob_N, streams, config)
    if streams.sampler_N is not None:
        correction_N, measured = _correction(streams, config)
        stats |= measured
        if config.correction != "off":
            loss_N = correction_N * loss_N
    if config.kl != 0:
        divergence_N = _divergence(logprob_N - streams.reference_N, config.kl_estimator)
        loss_N = loss_N + config.kl * divergence_N
        stats["kl_sum"] = _sum(divergence_N)
    if config.entropy != 0:
        loss_N = loss_N - config.entropy * entropy_N
    stats["entropy_sum"] = _sum(entropy_N)
    return loss_N, stats


def _check(streams: Streams, config: PolicyConfig) -> None:
    if streams.advantage_N is None:
        raise ValueError(
            "policy loss: expected Examples with advantages, got none; "
            "make them with credit.examples, or use sft_loss"
        )
    if config.correction != "off" and streams.sampler_N is None:
        raise ValueError(
            f"correction='{config.correction}': expected Examples with sampler_logprobs, got none; "
            "let the engine return log-probs, or use correction='off'"
        )
    if (config.kl != 0) != (streams.reference_N is not None):
        given = "none" if streams.reference_N is None else "some"
        raise ValueError(
            f"kl={config.kl}: expected reference log-probs exactly when kl is not 0, got {given}; "
            "score the batch with the reference policy, or use kl=0"
        )


def _objective(logprob_N: Tensor, streams: Streams, config: PolicyConfig) -> tuple[Tensor, Stats]:
    """The surrogate whose gradient is the policy gradient, and the shares that were clipped."""
    advantage_N = streams.advantage_N
    log_ratio_N = logprob_N - streams.old_N
    if config.objective == "gspo":
        log_ratio_N = _per_sequence(log_ratio_N, streams, mean=True)
    ratio_N = _exp(log_ratio_N)
    stats = {"ratio_sum": _sum(ratio_N)}
    if config.objective == "reinforce":
        return -advantage_N * logprob_N, stats
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clipped_N = ratio_N.clamp(low, high)
    if config.objective == "cispo":
        stats["clip_low_sum"] = _sum(ratio_N < low)
        stats["clip_high_sum"] = _sum(ratio_N > high)
        return -clipped_N.detach() * advantage_N * logprob_N, stats
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    stats["clip_low_sum"] = _sum((ratio_N < low) & (advantage_N < 0))
    stats["clip_high_sum"] = _sum((ratio_N > high) & (advantage_N > 0))
    if config.dual_clip > 0:
        floor_N = config.dual_clip * advantage_N
        capped_N = (advantage_N < 0) & (gain_N < floor_N)
        gain_N = torch.where(capped_N, floor_N, gain_N)
        stats["clip_dual_sum"] = _sum(capped_N)
    return -gain_N, stats


def _correction(streams: Streams, config: PolicyConfig) -> tuple[Tensor, Stats]:
    """Factor against the mismatch of trainer and sampler, and the raw mismatch."""
    difference_N = (streams.old_N - streams.sampler_N).detach()
    log_ratio_N = difference_N
    if config.correction_level != "token":
        mean = config.correction_level == "sequence-mean"
        log_ratio_N = _per_sequence(difference_N, streams, mean=mean)
    ratio_N = _exp(log_ratio_N)
    low, high = config.correction_low, config.correction_high
    if config.correction == "mask":
        outside_N = (ratio_N < low) | (ratio_N > high)
        factor_N = torch.where(outside_N, 0.0, ratio_N)
    else:
        outside_N = ratio_N > high
        factor_N = ratio_N.clamp(max=high)
    stats = {
        "sampler_diff_sum": _sum(difference_N.abs()),
        "sampler_diff_max": difference_N.abs().max(),
        # A mean hides a mismatch that cancels; this share does not.
        "sampler_outside_sum": _sum(difference_N.abs() > 0.1),
        "sampler_ratio_sum": _sum(ratio_N),
        "sampler_ratio_min": ratio_N.min(),
        "sampler_ratio_max": ratio_N.max(),
    }
    if config.correction != "off":
        stats["corrected_sum"] = _sum(outside_N)
    return factor_N, stats


def _divergence(difference_N: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return _exp(-difference_N) - 1 + difference_N


def _exp(log_ratio_N: Tensor) -> Tensor:
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _per_sequence(value_N: Tensor, streams: Streams, *, mean: bool) -> Tensor:
    """Sum or mean over the rows of each sequence, given back to its rows."""

    # index_put and its gradient are deterministic on CUDA; index_add is not.
    def total(part_N: Tensor) -> Tensor:
        empty_S = part_N.new_zeros(streams.num_sequences)
        sum_S = empty_S.index_put((streams.sequence_N,), part_N, accumulate=True)
        return sum_S[streams.sequence_N]

    return total(value_N) / total(torch.ones_like(value_N)) if mean else total(value_N)


def _head(
    hidden_ND: Tensor, weight_VD: Tensor, batch: Batch, temperature: float, need_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if len(hidden_ND) != len(batch.rows_N):
        raise ValueError(
            f"hidden_ND: expected the {len(batch.rows_N)} rows of this batch that carry loss, got "
            f"{len(hidden_ND)}; give the decoder last_only=batch.rows_N"
        )
    return head_logprob(hidden_ND, weight_VD, batch.target_N, temperature, need_entropy)


def _sum(value_N: Tensor) -> Tensor:
    return value_N.detach().sum(dtype=torch.float64)


def _counted(logprob_N: Tensor, loss_sum: Tensor) -> Stats:
    # full() fills on the device; torch.tensor() would copy and wait.
    count = torch.full((), len(logprob_N), dtype=torch.float64, device=logprob_N.device)
    return {"num_tokens_sum": count, "loss_sum": loss_sum.detach().double()}


def merge_stats(total: Stats | None, stats: Stats) -> Stats:
    """Statistics of two sets of rows together; `total` None starts a new total. No device wait."""
    if total is None:
        return dict(stats)
    if total.keys() != stats.keys():
        raise ValueError(
            f"stats: expected the names {sorted(total)}, got {sorted(stats)}; "
            "merge micro-batches of one update and one objective"
        )
    merge = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
    return {name: merge[name.rsplit("_", 1)[1]](total[name], stats[name]) for name in total}


def read_stats(total: Stats) -> dict[str, float]:
    """Plain numbers with one transfer: `num_tokens`, `*_min`, `*_max`, and per-token `*_mean`.

    `loss_sum` stays a sum: its divisor is the caller's.
    """
    values = torch.stack([value.double() for value in total.values()]).tolist()
    raw = dict(zip(total, values, strict=True))
    num_tokens = raw.pop("num_tokens_sum")
    read = {"num_tokens": num_tokens, "loss_sum": raw.pop("loss_sum")}
    for name, value in raw.items():
        if name.endswith("_sum"):
            read[name.removesuffix("_sum") + "_mean"] = value / max(num_tokens, 1.0)
        else:
            read[name] = value
    return read
