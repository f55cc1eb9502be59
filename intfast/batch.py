"""Examples -> packed Batches under a token budget, and the counts of the whole update.

The next-token shift of training batches is in `_sequence`: row t of a sequence holds token t and
predicts token t + 1. Everything behind it works with rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from intfast.config import BatchConfig
from intfast.engine.protocol import derive_seed
from intfast.model.decoder import PackedAttention
from intfast.records import Aimed, Example


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One packed micro-batch: S sequences, T rows, and the N of them that carry loss.

    The streams ending in N are aligned with `hidden_TD[rows_N]`.
    Example: tokens [1, 2, 7, 8] with weights [0, 0, 1, 1] give token_ids_T [1, 2, 7],
    lengths (3,), rows_N [1, 2] and target_N [7, 8].
    """

    token_ids_T: Tensor
    """int64, input tokens of all sequences, end to end."""
    position_ids_T: Tensor
    """int64, 0.. within each sequence."""
    lengths: tuple[int, ...]
    """Rows of each sequence, in order; they sum to T."""
    rows_N: Tensor
    """int64, strictly increasing: the rows whose weight is not 0."""
    target_N: Tensor
    """int64, the token each of these rows predicts."""
    weight_N: Tensor
    """fp32, > 0."""
    sequence_N: Tensor
    """int64, the sequence of each row, 0..S-1."""
    examples_S: tuple[int, ...]
    """Where each sequence stands in the list given to `pack`."""
    advantage_N: Tensor | None = None
    """fp32; None for supervised Examples."""
    sampler_logprob_N: Tensor | None = None
    """fp32; None when the Examples carry no sampler log-probs."""
    old_logprob_N: Tensor | None = None
    """fp32, of the policy at the start of a step; None where the current policy is the old one."""
    reference_logprob_N: Tensor | None = None
    """fp32, of the reference policy; None without a KL term."""
    goal_N: Tensor | None = None
    """fp32, the log-prob that a row should have, NaN for an ordinary one; None where all are."""

    def inputs(self) -> tuple[Tensor, Tensor, PackedAttention, Tensor]:
        """The arguments of `Decoder.forward`: hidden states of the rows that carry loss."""
        attend = PackedAttention(self.lengths, self.token_ids_T.device)
        return self.token_ids_T, self.position_ids_T, attend, self.rows_N

    def to(self, device: torch.device | str) -> Batch:
        """The same Batch on a device; copies to CUDA do not wait for it."""
        to_cuda = torch.device(device).type == "cuda"
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                # Only from pinned memory is a copy asynchronous.
                # The copy runs beside the compute of the micro-batch before it.
                source = value.pin_memory() if to_cuda and not value.is_cuda else value
                moved[field.name] = source.to(device, non_blocking=to_cuda)
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """All micro-batches of one update, and its global counts."""

    batches: tuple[Batch, ...]
    num_tokens: int
    """Rows of all batches."""
    num_loss_tokens: int
    """Rows with a weight."""
    weight_sum: float
    """Sum of the weights; the divisor of a weighted mean."""
    num_sequences: int
    """Sequences with a weighted token."""


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    example: int
    token_ids: np.ndarray
    rows: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    advantage: np.ndarray | None
    sampler_logprob: np.ndarray | None
    goal: np.ndarray


def pack(examples: Sequence[Example], config: BatchConfig) -> Packed:
    """Pack by first-fit-decreasing; the same list gives the same batches.

    A sequence ends with its last weighted token: later tokens cannot reach the loss. Examples
    without a weighted token are left out.
    Raises ValueError when no token is trainable, when a sequence does not fit, and on streams that
    are not finite where they are used.
    """
    # First what would silently drop a stream, then the rows.
    _check_streams(examples)
    found = (_sequence(index, example) for index, example in enumerate(examples))
    sequences = [sequence for sequence in found if sequence is not None]
    if not sequences:
        raise ValueError(
            f"update of {len(examples)} examples: expected a token with a weight, got none; "
            "skip the update, or look at why every example was dropped"
        )
    # No padding: sequences lie end to end, and attention keeps them apart.
    bins = _first_fit_decreasing([len(sequence.token_ids) for sequence in sequences], config)
    return Packed(
        batches=tuple(_batch([sequences[index] for index in members]) for members in bins),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        num_loss_tokens=sum(len(sequence.rows) for sequence in sequences),
        # Exactly rounded: the divisor must not depend on how the update was packed.
        weight_sum=math.fsum(weight for item in sequences for weight in item.weight.tolist()),
        num_sequences=len(sequences),
    )


def pack_apart(examples: Sequence[Example], config: BatchConfig) -> Packed:
    """As `pack`, with the supervised Examples in batches of their own behind those of a policy."""
    kinds = ([e for e in examples if (e.advantages is None) == last] for last in (False, True))
    first, *more = [pack(kind, config) for kind in kinds if kind]
    for other in more:
        counts = {f.name: getattr(first, f.name) + getattr(other, f.name) for f in fields(first)}
        first = Packed(**counts)
    return first


def split(examples: Sequence[Example], num_minibatches: int, seed: int) -> list[list[Example]]:
    """Deal the Examples at random into minibatches whose sizes differ by at most one.

    Raises ValueError when there are fewer Examples than minibatches.
    """
    if not 1 <= num_minibatches <= max(1, len(examples)):
        raise ValueError(
            f"num_minibatches: expected 1..{len(examples)} (the number of examples), "
            f"got {num_minibatches}; use fewer minibatches or more completions"
        )
    order = shuffled(len(examples), derive_seed(seed, "minibatches"))
    return [
        # Sorted within a part: chance decides who is together, and nothing else.
        [examples[index] for index in sorted(order[part::num_minibatches])]
        for part in range(num_minibatches)
    ]


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers 0 .. count - 1 in an order that the seed decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _check_streams(examples: Sequence[Example]) -> None:
    for name in ("advantages", "sampler_logprobs"):
        missing = [i for i, example in enumerate(examples) if getattr(example, name) is None]
        if 0 < len(missing) < len(examples):
            raise ValueError(
                f"{name}: expected in all examples or in none, got none in example {missing[0]} "
                f"and {len(missing)} of {len(examples)}; pack the two kinds apart"
            )


def _sequence(index: int, example: Example) -> _Sequence | None:
    """The rows of one Example up to its last weighted token; None without a weighted token."""
    # Rows without weight never reach the head: of them only the input token is kept.
    weight = _stream(index, example, "weights")
    rows = np.flatnonzero(weight[1:])
    if rows.size == 0:
        return None
    targets = rows + 1  # the shift: row t predicts token t + 1
    token_ids = np.asarray(example.token_ids, dtype=np.int64)
    if not (np.isfinite(weight[targets]).all() and (weight[targets] > 0).all()):
        raise ValueError(
            f"weights of example {index}: expected finite numbers >= 0, got "
            f"{weight[targets].min()} .. {weight[targets].max()}; put a sign into the advantage"
        )
    goal = np.full(rows.size, math.nan)
    if isinstance(example, Aimed):
        goal[-1] = example.goal
        if not math.isfinite(example.goal):
            raise ValueError(f"goal of example {index}: expected a finite number, got {goal[-1]}")
    return _Sequence(
        example=index,
        token_ids=token_ids[: targets[-1]],
        rows=rows,
        target=token_ids[targets],
        weight=weight[targets],
        advantage=_used(index, example, "advantages", targets),
        sampler_logprob=_used(index, example, "sampler_logprobs", targets),
        goal=goal,
    )


def _stream(index: int, example: Example, name: str) -> np.ndarray:
    values = np.asarray(getattr(example, name), dtype=np.float64)
    if len(values) != len(example.token_ids):
        raise ValueError(
            f"{name} of example {index}: expected one per token ({len(example.token_ids)}), "
            f"got {len(values)}; build the lists together"
        )
    return values


def _used(index: int, example: Example, name: str, targets: np.ndarray) -> np.ndarray | None:
    if getattr(example, name) is None:
        return None
    values = _stream(index, example, name)[targets]
    if not np.isfinite(values).all():
        token = targets[~np.isfinite(values)][0]
        raise ValueError(
            f"{name} of example {index}: expected finite numbers at weighted tokens, got "
            f"{values[~np.isfinite(values)][0]} at token {token}; give such a token weight 0"
        )
    return values


def _first_fit_decreasing(lengths: list[int], config: BatchConfig) -> list[list[int]]:
    """Bins of sequence numbers; ties keep their order, so the result is deterministic."""
    longest = max(lengths)
    if longest > config.max_tokens and config.too_long == "error":
        raise ValueError(
            f"sequence of {longest} tokens: expected at most max_tokens={config.max_tokens}; "
            "raise max_tokens, shorten the completions, or set too_long='alone'"
        )
    bins: list[list[int]] = []
    free: list[int] = []
    # The longest first leaves the fewest gaps; Python's sort is stable, so ties keep their order.
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = (place for place, room in enumerate(free) if room >= lengths[index])
        place = next(fits, len(bins))
        if place == len(bins):
            bins.append([])
            free.append(config.max_tokens)
        bins[place].append(index)
        free[place] -= lengths[index]
    return bins


def _batch(sequences: list[_Sequence]) -> Batch:
    lengths = [len(sequence.token_ids) for sequence in sequences]
    # Rows of a sequence become rows of the batch by where it begins.
    starts = np.cumsum([0, *lengths[:-1]])
    counts = [len(sequence.rows) for sequence in sequences]

    def joined(name: str, dtype: torch.dtype) -> Tensor | None:
        parts = [getattr(sequence, name) for sequence in sequences]
        return None if parts[0] is None else torch.from_numpy(np.concatenate(parts)).to(dtype)

    goal_N = joined("goal", torch.float32)
    rows = [start + sequence.rows for start, sequence in zip(starts, sequences, strict=True)]
    return Batch(
        token_ids_T=joined("token_ids", torch.int64),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        lengths=tuple(lengths),
        rows_N=torch.from_numpy(np.concatenate(rows)),
        target_N=joined("target", torch.int64),
        weight_N=joined("weight", torch.float32),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(lengths)), counts)),
        examples_S=tuple(sequence.example for sequence in sequences),
        advantage_N=joined("advantage", torch.float32),
        sampler_logprob_N=joined("sampler_logprob", torch.float32),
        goal_N=None if goal_N.isnan().all() else goal_N,
    )
