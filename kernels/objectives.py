"""Objectives: what a token costs, as a small pure function of its log-prob and its streams.

Each returns the loss of every token and its derivatives; `linear_objective` multiplies by the
weights, so Dr.GRPO, DAPO, per-sequence means and so on are choices of weights and not of
objectives. A new objective is a frozen dataclass on `Objective`; its derivative is held against
autograd in tests/test_kernels_objectives.py.

    logprob_T   log-prob of the target under the current policy, natural log
    entropy_T   entropy of the row, or None
    A, r, d     advantage; exp(logprob - old); reference - logprob
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

# verl clamps log-ratios here; the derivative of the clamped ratio is 0 outside.
RATIO_BOUND = 20.0

Level = Literal["token", "sequence", "sequence-mean"]
"""Ratio of a token; of its sequence, over the tokens of weight other than 0: the product, or the
geometric mean (the mean of the log-ratios, GSPO's)."""


class Streams(NamedTuple):
    """What is known of each token before the forward pass; all (T,), floating, one device.

    A missing `old_T` means that the current policy sampled: the ratio is 1 in value. NaN in
    `sampler_T` means not recorded and corrects nothing.
    """

    weight_T: Tensor
    """Loss weight; tokens of weight 0 have no effect, whatever the other streams hold."""
    advantage_T: Tensor | None = None
    old_T: Tensor | None = None
    reference_T: Tensor | None = None
    sampler_T: Tensor | None = None
    sequence_T: Tensor | None = None
    """int64, not decreasing: the sequence of each token, for sequence-level objectives."""
    goal_T: Tensor | None = None
    """The log-prob that a token should have, for `Either`; NaN for an ordinary one."""

    def rows(self, index: Tensor | slice) -> Streams:
        """The streams of some tokens."""
        return Streams(*(None if stream is None else stream[index] for stream in self))


class Terms(NamedTuple):
    """Loss per token before weighting, and its derivatives."""

    loss_T: Tensor
    dlogprob_T: Tensor
    dentropy_T: Tensor | None = None


class Objective:
    """What `linear_objective` asks of an objective."""

    whole_batch: ClassVar[bool] = False
    """Whether a token's terms depend on other tokens, so that no chunk can be done alone."""
    entropy_gradient: ClassVar[bool] = False

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-logprob: maximum likelihood, the InT loss over spans."""

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        return Terms(-logprob_T, torch.full_like(logprob_T, -1.0))


@dataclass(frozen=True)
class Reinforce(Objective):
    """-A logprob: the plain policy gradient, without a ratio."""

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        advantage_T = _need(streams, "advantage_T", self).to(logprob_T.dtype)
        return Terms(-advantage_T * logprob_T, -advantage_T)


@dataclass(frozen=True)
class PolicyClip(Objective):
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO, GRPO, Dr.GRPO, DAPO (high > low).

    dual   an upper bound c > 1 on r where A < 0, so that the loss is at most -c A there
           (dual clip; TRL calls it delta, verl clip_ratio_c); None for none
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        advantage_T = _need(streams, "advantage_T", self).to(logprob_T.dtype)
        ratio_T, dratio_T = policy_ratio(logprob_T, streams)
        return self.terms(ratio_T, dratio_T, advantage_T)

    def terms(self, ratio_T: Tensor, dratio_T: Tensor, advantage_T: Tensor) -> Terms:
        """Loss and derivative for a ratio whose derivative by the log-prob is given."""
        ceiling = float("inf") if self.dual is None else self.dual
        bounded_T = torch.where(
            advantage_T > 0, ratio_T.clamp(max=1 + self.high), ratio_T.clamp(1 - self.low, ceiling)
        )
        # min() takes the unclipped branch wherever the bound does not bite
        free_T = bounded_T == ratio_T
        return Terms(-bounded_T * advantage_T, torch.where(free_T, -dratio_T * advantage_T, 0))


@dataclass(frozen=True)
class SequenceClip(Objective):
    """GSPO: the clip of `PolicyClip` on exp(mean over the sequence of logprob - old).

    The mean is over the tokens of weight other than 0. With weights and advantages that are equal
    within a sequence this is the derivative of the sequence loss; otherwise it is GSPO-token.
    """

    num_sequences: int
    low: float = 3e-4
    high: float = 4e-4
    dual: float | None = None
    whole_batch: ClassVar[bool] = True

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        advantage_T = _need(streams, "advantage_T", self).to(logprob_T.dtype)
        ratio_T, dratio_T = policy_ratio(logprob_T, streams, "sequence-mean", self.num_sequences)
        return PolicyClip(self.low, self.high, self.dual).terms(ratio_T, dratio_T, advantage_T)


@dataclass(frozen=True)
class Cispo(Objective):
    """-w A logprob with the constant w = clip(r, low, high): no token's gradient is cut off.

    The bounds are on the ratio itself. TRL's `epsilon_high` is `high` and not 1 + high.
    """

    low: float = 0.0
    high: float = 5.0

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        advantage_T = _need(streams, "advantage_T", self).to(logprob_T.dtype)
        ratio_T, _ = policy_ratio(logprob_T, streams)
        scaled_T = ratio_T.clamp(self.low, self.high) * advantage_T
        return Terms(-scaled_T * logprob_T, -scaled_T)


@dataclass(frozen=True)
class Kl(Objective):
    """coefficient times an estimate of KL(policy || reference): "k1", "k2" or "k3".

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1; the derivative is the estimate's own.
    """

    coefficient: float
    kind: Literal["k1", "k2", "k3"] = "k3"

    def __post_init__(self) -> None:
        if self.kind not in ("k1", "k2", "k3"):
            raise ValueError(f"Kl.kind: expected 'k1', 'k2' or 'k3', got {self.kind!r}")

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        d_T = _need(streams, "reference_T", self).to(logprob_T.dtype) - logprob_T
        if self.kind == "k1":
            value_T, slope_T = -d_T, torch.ones_like(d_T)
        elif self.kind == "k2":
            value_T, slope_T = 0.5 * d_T.square(), -d_T
        else:
            bounded_T = d_T.clamp(-RATIO_BOUND, RATIO_BOUND)
            # expm1 keeps the relative accuracy of both where the policies agree
            value_T, slope_T = torch.expm1(bounded_T) - bounded_T, -torch.expm1(bounded_T)
            slope_T = torch.where(bounded_T == d_T, slope_T, 0)
        return Terms(self.coefficient * value_T, self.coefficient * slope_T)


@dataclass(frozen=True)
class ScaledK3(Objective):
    """coefficient * r * k3 with the gradient through r: TRL's `use_bias_correction_kl`."""

    coefficient: float

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        ratio_T, _ = policy_ratio(logprob_T, streams)
        d_T = _need(streams, "reference_T", self).to(logprob_T.dtype) - logprob_T
        d_T = d_T.clamp(-RATIO_BOUND, RATIO_BOUND)
        scaled_T = self.coefficient * ratio_T
        return Terms(scaled_T * (torch.expm1(d_T) - d_T), -scaled_T * d_T)


@dataclass(frozen=True)
class TrustRegion(Objective):
    """prime-rl's: -r A where exp(logprob) - exp(old) is inside the region, plus kl times log^2 r.

    A token is dropped when its probability has moved further than `high` up (A > 0) or further
    than `low` down (otherwise).
    """

    low: float
    high: float
    kl: float

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        advantage_T = _need(streams, "advantage_T", self).to(logprob_T.dtype)
        old_T = _need(streams, "old_T", self)
        log_ratio_T = logprob_T - old_T
        moved_T = logprob_T.exp() - old_T.exp()
        dropped_T = torch.where(advantage_T > 0, moved_T > self.high, moved_T < -self.low)
        gain_T = torch.where(dropped_T, 0, log_ratio_T.exp() * advantage_T)
        return Terms(-gain_T + self.kl * log_ratio_T.square(), -gain_T + 2 * self.kl * log_ratio_T)


@dataclass(frozen=True)
class EntropyBonus(Objective):
    """-coefficient times the entropy of the row; costs one pass over the chunk's logits."""

    coefficient: float
    entropy_gradient: ClassVar[bool] = True

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        assert entropy_T is not None
        slope_T = torch.full_like(entropy_T, -self.coefficient)
        return Terms(-self.coefficient * entropy_T, torch.zeros_like(logprob_T), slope_T)


@dataclass(frozen=True)
class Corrected(Objective):
    """`inner` times the constant importance weight exp(old - sampler), bounded.

    mode    "truncate" limits the weight to [low, high]; "mask" drops what lies outside
    level   of the weight, see `Level`; "sequence" is heavy-tailed when sequences are long
    """

    inner: Objective
    high: float
    low: float = 0.0
    mode: Literal["truncate", "mask"] = "truncate"
    level: Level = "token"
    num_sequences: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("truncate", "mask"):
            raise ValueError(f"Corrected.mode: expected 'truncate' or 'mask', got {self.mode!r}")
        if self.level not in get_args(Level):
            known = get_args(Level)
            raise ValueError(f"Corrected.level: expected one of {known}, got {self.level!r}")
        if self.level != "token" and self.num_sequences < 1:
            raise ValueError(f"Corrected.num_sequences: expected >= 1, got {self.num_sequences}")

    @property
    def whole_batch(self) -> bool:
        return self.level != "token" or self.inner.whole_batch

    @property
    def entropy_gradient(self) -> bool:
        return self.inner.entropy_gradient

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        _need(streams, "sampler_T", self)
        weight_T = sampler_ratio(logprob_T, streams, self.level, self.num_sequences)
        if self.mode == "truncate":
            weight_T = weight_T.clamp(self.low, self.high)
        else:
            weight_T = torch.where((weight_T < self.low) | (weight_T > self.high), 0, weight_T)
        terms = self.inner(logprob_T, entropy_T, streams)
        return Terms(*(None if term is None else weight_T * term for term in terms))


@dataclass(frozen=True)
class Either(Objective):
    """`inner`, and where there is a goal (logprob - goal)^2 in its place.

    inner  of single tokens: a row with a goal was not sampled and is in no ratio of a sequence
    """

    inner: Objective

    def __post_init__(self) -> None:
        if self.inner.whole_batch:
            raise ValueError(f"Either.inner: expected an objective of tokens, got {self.inner}")

    @property
    def entropy_gradient(self) -> bool:
        return self.inner.entropy_gradient

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        goal_T = _need(streams, "goal_T", self).to(logprob_T.dtype)
        terms, gap_T = self.inner(logprob_T, entropy_T, streams), logprob_T - goal_T
        own = Terms(gap_T.square(), 2 * gap_T, torch.zeros_like(gap_T))
        pairs = zip(terms, own, strict=True)
        return Terms(*(t if t is None else torch.where(goal_T.isnan(), t, o) for t, o in pairs))


@dataclass(frozen=True)
class Sum(Objective):
    """The sum of several objectives, for example a clip, a KL term and an entropy bonus."""

    parts: tuple[Objective, ...]

    @property
    def whole_batch(self) -> bool:
        return any(part.whole_batch for part in self.parts)

    @property
    def entropy_gradient(self) -> bool:
        return any(part.entropy_gradient for part in self.parts)

    def __call__(self, logprob_T: Tensor, entropy_T: Tensor | None, streams: Streams) -> Terms:
        terms = [part(logprob_T, entropy_T, streams) for part in self.parts]
        slopes = [term.dentropy_T for term in terms if term.dentropy_T is not None]
        return Terms(
            sum(term.loss_T for term in terms),
            sum(term.dlogprob_T for term in terms),
            sum(slopes) if slopes else None,
        )


def policy_ratio(
    logprob_T: Tensor, streams: Streams, level: Level = "token", num_sequences: int = 0
) -> tuple[Tensor, Tensor]:
    """exp(logprob - old), bounded, and its derivative by the log-ratio of that level."""
    old_T = logprob_T if streams.old_T is None else streams.old_T
    return _exp_bounded(_fold(logprob_T - old_T, streams, level, num_sequences))


def sampler_ratio(
    logprob_T: Tensor, streams: Streams, level: Level = "token", num_sequences: int = 0
) -> Tensor:
    """exp(old - sampler), bounded: 1 where the sampler's log-prob was not recorded."""
    old_T = logprob_T if streams.old_T is None else streams.old_T.to(logprob_T.dtype)
    sampler_T = streams.sampler_T.to(logprob_T.dtype)
    log_ratio_T = torch.nan_to_num(old_T - sampler_T, nan=0.0)
    return _exp_bounded(_fold(log_ratio_T, streams, level, num_sequences))[0]


def _need(streams: Streams, name: str, objective: Objective) -> Tensor:
    stream_T = getattr(streams, name)
    if stream_T is None:
        raise ValueError(f"{type(objective).__name__}: expected streams.{name}, got None; pass it")
    return stream_T


def _exp_bounded(log_ratio_T: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the clamped log-ratio, and its derivative."""
    bounded_T = log_ratio_T.clamp(-RATIO_BOUND, RATIO_BOUND)
    ratio_T = bounded_T.exp()
    return ratio_T, torch.where(bounded_T == log_ratio_T, ratio_T, 0)


def _fold(value_T: Tensor, streams: Streams, level: Level, num_sequences: int) -> Tensor:
    """Sum or mean of `value_T` over the live tokens of each token's sequence, at each token."""
    if level == "token":
        return value_T
    if streams.sequence_T is None:
        raise ValueError("a sequence-level objective: expected streams.sequence_T, got None")
    live_T = streams.weight_T != 0
    # Sums over sorted segments are in a fixed order, unlike atomic adds.
    edge_S1 = torch.arange(num_sequences + 1, device=value_T.device)
    offset_S1 = torch.searchsorted(streams.sequence_T, edge_S1)
    total_S = torch.segment_reduce(torch.where(live_T, value_T, 0), "sum", offsets=offset_S1)
    if level == "sequence-mean":
        count_S = torch.segment_reduce(live_T.to(value_T.dtype), "sum", offsets=offset_S1)
        total_S = total_S / count_S.clamp(min=1)
    return total_S[streams.sequence_T]
