"""Supervised and policy objectives of a Batch, on the ops in kernels/, and device-side statistics.

Only the rows that carry weight come in. A loss is a sum; the caller divides by a
count of the whole update (`batch.Packed`, `credit.divisor`) before `backward`, so one batch and
any number of micro-batches give the same gradient.

Statistics are 0-dimensional tensors named `*_sum`, `*_min` or `*_max`, and are read once per
update: `merge_stats` over micro-batches, then `read_stats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from intfast.batch import Batch
from intfast.config import PolicyConfig
from intfast.kernels.head.ladder import plan_for
from intfast.kernels.head.plan import Head, HeadOptions
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import ObjectiveOutput, linear_objective
from intfast.kernels.objectives import (
    Cispo,
    Corrected,
    CrossEntropy,
    Either,
    EntropyBonus,
    Kl,
    Objective,
    PolicyClip,
    Reinforce,
    SequenceClip,
    Streams,
    Sum,
    policy_ratio,
    sampler_ratio,
)

Stats = dict[str, Tensor]


@torch.no_grad()
def row_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    batch: Batch,
    temperature: float = 1.0,
    **dealt: Unpack[HeadOptions],
) -> Tensor:
    """logprob_N of the batch's targets, fp32, without gradient: the old or reference stream."""
    _check_rows(hidden_ND, batch)
    # No entropy and no gradient: one matrix product, whose logits are never whole.
    logprob_N, _ = linear_logprob(
        hidden_ND, weight_VD, batch.target_N, temperature=temperature, entropy="none", **dealt
    )
    return logprob_N


def sft_loss(
    hidden_ND: Tensor, weight_VD: Tensor, batch: Batch, **dealt: Unpack[HeadOptions]
) -> tuple[Tensor, Stats]:
    """Sum over the weighted rows of -weight * log-prob (fp32), and its statistics.

    hidden_ND  (N, D) last hidden states of `batch.rows_N`; differentiable
    weight_VD  (V, D) same dtype; differentiable, may be frozen
    dealt      Decoder.head_options
    """
    # Only rows with weight came through the last layer: another number of rows is another batch.
    _check_rows(hidden_ND, batch)
    streams = Streams(batch.weight_N)
    # The op makes log-probs and both gradients in one pass and never holds all logits; autograd
    # sees one function from hidden states to a scalar.
    output = linear_objective(
        hidden_ND, weight_VD, batch.target_N, CrossEntropy(), streams, entropy="none", **dealt
    )
    # The mean over tokens, each counted once; the loss weighs them.
    return output.loss, _counted(output) | {"nll_sum": _sum(-output.logprob_T)}


def policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    batch: Batch,
    config: PolicyConfig,
    temperature: float = 1.0,
    **dealt: Unpack[HeadOptions],
) -> tuple[Tensor, Stats]:
    """Sum over the weighted rows of weight * token loss (fp32), and its statistics.

    batch        without `old_logprob_N` the current values are the old ones and the ratio is 1;
                 KL needs `reference_logprob_N`, a correction the sampler's log-probs
    temperature  the one the tokens were sampled with
    dealt        Decoder.head_options
    raises       ValueError when a stream that the objective needs is missing
    """
    _check_rows(hidden_ND, batch)
    if batch.advantage_N is None and batch.sampler_logprob_N is None:
        # Supervised rows of the same update: in its loss, not in what is said of its policy.
        loss, stats = sft_loss(hidden_ND, weight_VD, batch)
        return loss, {"num_tokens_sum": 0 * stats["num_tokens_sum"], "loss_sum": stats["loss_sum"]}
    # Constants to autograd, all of them: only the current log-prob carries gradient.
    streams = Streams(
        weight_T=batch.weight_N,
        advantage_T=batch.advantage_N,
        old_T=batch.old_logprob_N,
        reference_T=batch.reference_logprob_N,
        sampler_T=batch.sampler_logprob_N,
        sequence_T=batch.sequence_N,
        goal_T=batch.goal_N,
    )
    # What the loss is made of is decided once per batch; the kernels know tensors only.
    objective = objective_of(config, len(batch.lengths))
    if batch.goal_N is not None:
        objective = Either(objective)
    output = linear_objective(
        hidden_ND, weight_VD, batch.target_N, objective, streams, temperature=temperature, **dealt
    )
    if batch.goal_N is not None:
        # Rows with a goal were not sampled: nothing is said of their ratios.
        ordinary = batch.goal_N.isnan().nonzero()[:, 0]
        kept = (output.logprob_T[ordinary], output.entropy_T[ordinary])
        output = output._replace(logprob_T=kept[0], entropy_T=kept[1])
        streams = streams.rows(ordinary)
    measured = policy_stats(output, streams, config, len(batch.lengths))
    return output.loss, _counted(output) | measured


def head_plans(
    weight_VD: Tensor, max_rows: int, policy: PolicyConfig, temperature: float, **dealt: Any
) -> dict[str, str]:
    """How the losses run the loss head on up to so many rows, a line each for "sft" and "rl"."""
    entropy = "gradient" if objective_of(policy, 1).entropy_gradient else "value"
    sft, rl = {"entropy": "none"}, {"entropy": entropy, "temperature": temperature}
    heads = {"sft": Head(**sft, **dealt), "rl": Head(**rl, **dealt)}
    return {name: plan_for(max_rows, weight_VD, head).describe() for name, head in heads.items()}


def objective_of(config: PolicyConfig, num_sequences: int) -> Objective:
    """correction * surrogate + kl * divergence - entropy bonus, for a batch of so many sequences.

    Each row's derivative takes its own correction, weight and advantage. With objective="gspo" that
    is the derivative of the sequence's loss where these are equal within the sequence, so not with
    correction_level="token" (GSPO-token).
    """
    # PPO clips a gain from above; without a second bound a token of negative advantage that the
    # policy now likes far better would be charged without limit.
    dual = config.dual_clip or None
    objective: Objective = {
        "grpo": PolicyClip(config.clip_low, config.clip_high, dual),
        "gspo": SequenceClip(num_sequences, config.clip_low, config.clip_high, dual),
        # CISPO clips the factor of the gradient and not the loss, so no token loses its gradient.
        "cispo": Cispo(1 - config.clip_low, 1 + config.clip_high),
        "reinforce": Reinforce(),
    }[config.objective]
    # Rollouts come from the engine, whose log-probs differ by rounding from the trainer's. The
    # ratio between the two is an importance weight, constant for the gradient.
    if config.correction != "off":
        objective = Corrected(
            objective,
            high=config.correction_bounds[1],
            low=_correction_low(config),
            mode=config.correction,
            level=config.correction_level,
            num_sequences=num_sequences,
        )
    # Divergence and entropy are of every token, whatever its advantage: this is why
    # credit.with_gradient then keeps all sequences.
    parts = [objective]
    if config.kl != 0:
        parts.append(Kl(config.kl, config.kl_estimator))
    if config.entropy != 0:
        parts.append(EntropyBonus(config.entropy))
    return Sum(tuple(parts)) if len(parts) > 1 else objective


def policy_stats(
    output: ObjectiveOutput, streams: Streams, config: PolicyConfig, num_sequences: int
) -> Stats:
    """What the objective did to the rows: ratios, clipped shares, mismatch with the sampler."""
    level = "sequence-mean" if config.objective == "gspo" else "token"
    # GSPO clips the ratio of a whole sequence: all tokens of it are counted as clipped.
    ratio_N, _ = policy_ratio(output.logprob_T, streams, level, num_sequences)
    stats = {"ratio_sum": _sum(ratio_N), "entropy_sum": _sum(output.entropy_T)}
    stats |= _clip_stats(ratio_N, streams.advantage_T, config)
    if streams.sampler_T is not None:
        stats |= _sampler_stats(output.logprob_T, streams, config, num_sequences)
    if config.kl != 0:
        divergence = Kl(1.0, config.kl_estimator)
        stats["kl_sum"] = _sum(divergence(output.logprob_T, None, streams).loss_T)
    return stats


def _clip_stats(ratio_N: Tensor, advantage_N: Tensor, config: PolicyConfig) -> Stats:
    if config.objective == "reinforce":
        return {}
    # Which tokens the clip took out of the gradient: CISPO keeps them all and only bounds their
    # factor, so for it both ends count, whatever the sign.
    below_N, above_N = ratio_N < 1 - config.clip_low, ratio_N > 1 + config.clip_high
    if config.objective == "cispo":
        return {"clip_low_sum": _sum(below_N), "clip_high_sum": _sum(above_N)}
    negative_N = advantage_N < 0
    stats = {
        "clip_low_sum": _sum(below_N & negative_N),
        "clip_high_sum": _sum(above_N & (advantage_N > 0)),
    }
    if config.dual_clip > 0:
        stats["clip_dual_sum"] = _sum((ratio_N > config.dual_clip) & negative_N)
    return stats


def _sampler_stats(
    logprob_N: Tensor, streams: Streams, config: PolicyConfig, num_sequences: int
) -> Stats:
    # In the only update of a step the current log-probs are those of the policy that sampled.
    old_N = logprob_N if streams.old_T is None else streams.old_T
    difference_N = (old_N - streams.sampler_T).abs()
    level = config.correction_level
    ratio_N = sampler_ratio(logprob_N, streams, level, num_sequences)
    stats = {
        "sampler_diff_sum": _sum(difference_N),
        "sampler_diff_max": difference_N.max(),
        # A mean hides a mismatch that cancels; this share does not.
        "sampler_outside_sum": _sum(difference_N > 0.1),
        "sampler_ratio_sum": _sum(ratio_N),
        "sampler_ratio_min": ratio_N.min(),
        "sampler_ratio_max": ratio_N.max(),
    }
    if config.correction != "off":
        outside_N = (ratio_N < _correction_low(config)) | (ratio_N > config.correction_bounds[1])
        stats["corrected_sum"] = _sum(outside_N)
    return stats


def _correction_low(config: PolicyConfig) -> float:
    return config.correction_bounds[0] if config.correction == "mask" else 0.0


def _check_rows(hidden_ND: Tensor, batch: Batch) -> None:
    if len(hidden_ND) != len(batch.rows_N):
        raise ValueError(
            f"hidden_ND: expected the {len(batch.rows_N)} rows of this batch that carry loss, got "
            f"{len(hidden_ND)}; give the decoder rows_C=batch.rows_N"
        )


def _sum(value_N: Tensor) -> Tensor:
    # A sum of a million fp32 terms loses digits that a mean over an update shows.
    return value_N.sum(dtype=torch.float64)


def _counted(output: ObjectiveOutput) -> Stats:
    logprob_N = output.logprob_T
    # full() fills on the device; torch.tensor() would copy and wait.
    count = torch.full((), len(logprob_N), dtype=torch.float64, device=logprob_N.device)
    return {"num_tokens_sum": count, "loss_sum": output.loss.detach().double()}


def merge_stats(total: Stats | None, stats: Stats) -> Stats:
    """Statistics of two sets of rows together; `total` None starts a new total. No device wait."""
    if total is None:
        return dict(stats)
    if not (total.keys() <= stats.keys() or stats.keys() <= total.keys()):
        raise ValueError(
            f"stats: expected the names {sorted(total)}, got {sorted(stats)}; "
            "merge micro-batches of one update and one objective"
        )
    # `*_sum` adds, `*_min` and `*_max` keep the extreme: then it is a statistic of the update.
    merge = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
    both = {
        name: merge[name.rsplit("_", 1)[1]](total[name], stats[name])
        for name in total
        if name in stats
    }
    # Supervised batches have fewer.
    return total | stats | both


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


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain statistics of several updates of one step, `read_stats` and the optimizer's row each.

    Extremes stay extremes, counts add up, means are weighted by tokens; the first cause stays.
    """
    # `loss`, `lr` and `grad_norm` are plain averages over the updates.
    found: dict[str, Any] = {"updates": len(rows)}
    if not rows:
        return found
    for key in dict.fromkeys(key for row in rows for key in row):
        # An update of supervised rows alone has no figures of a policy.
        tokens = [row["num_tokens"] for row in rows if key in row]
        values = [row[key] for row in rows if key in row]
        if key in ("num_tokens", "skipped"):
            found[key] = sum(values)
        elif key.endswith("_max"):
            found[key] = max(values)
        elif key.endswith("_min"):
            found[key] = min(values)
        elif key.endswith("_mean"):
            total = sum(value * count for value, count in zip(values, tokens, strict=True))
            found[key] = total / max(1, sum(tokens))
        elif key != "cause":
            found[key] = sum(values) / len(values)
    causes = [row["cause"] for row in rows if row["skipped"]]
    return found | ({"cause": causes[0]} if causes else {})
