"""Settings of credit, batching, objective and optimizer; embedded in the tree of config.py.

This module imports only msgspec, so that reading a config does not load torch.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings: immutable, strict about its fields."""

    def check(self) -> list[str]:
        """What is wrong, one message per fault: field, expected, got, remedy. Empty when sound."""
        try:
            msgspec.convert(msgspec.structs.asdict(self), type(self))
        except msgspec.ValidationError as error:
            return [f"{error}; see the allowed values in {type(self).__name__}"]
        return []

    def _expect(self, ok: bool, field: str, expected: str, remedy: str) -> list[str]:
        got = getattr(self, field)
        return [] if ok else [f"{field}: expected {expected}, got {got!r}; {remedy}"]

    def _unused(self, fields: str, when: bool, because: str) -> list[str]:
        """A changed field that this combination never reads is a misunderstanding."""
        defaults = type(self)()
        changed = [
            name for name in fields.split() if getattr(self, name) != getattr(defaults, name)
        ]
        if not when:
            return []
        return [
            f"{name}: expected its default {getattr(defaults, name)!r}, got "
            f"{getattr(self, name)!r}; it has no effect with {because}, remove it"
            for name in changed
        ]


def at_least(section: Settings, **bounds: float) -> list[str]:
    """A message for each field below its bound; absent values pass."""
    return [
        f"{name} must be >= {bound}, got {value}"
        for name, bound in bounds.items()
        if (value := getattr(section, name)) is not None and value < bound
    ]


class CreditConfig(Settings):
    """How rewards of a group become per-token weights and advantages."""

    baseline: Literal["mean", "leave-one-out"] = "mean"
    """What is subtracted from a reward: mean of its group, or mean of the others in it."""
    scale: Literal["none", "group", "group-population", "batch"] = "none"
    """Divide by a standard deviation: unbiased or population of the group, unbiased of the step."""
    eps: float = 1e-4
    """Added to the standard deviation."""
    normalisation: Literal["token", "sequence-mean", "sequence-sum", "constant"] = "sequence-sum"
    """What the summed loss is divided by; see credit.divisor."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss (their reward still counts)."""
    process: Literal["none", "vppo", "capo"] = "none"
    """Credit inside wrong rollouts, located by verification: "vppo" rewards the tokens before the
    wrong step, "capo" penalises those of the step."""
    process_weight: float = 0.5
    """That reward or penalty; a right rollout earns 1."""
    process_rollouts: int = 2
    """Wrong rollouts of a group that are verified, at most."""
    process_margin: float = 1.0
    """Tokens right before the wrong step that "vppo" does not reward, in prompt lengths."""
    process_clamp: bool = True
    """No negative advantage on the tokens that "vppo" rewards."""

    def check(self) -> list[str]:
        """See Settings.check."""
        return super().check() or [
            *self._expect(0 <= self.eps < math.inf, "eps", "a number >= 0", "use 1e-4"),
            *self._unused("eps", self.scale == "none", "scale='none'"),
            *self._check_process(),
        ]

    def _check_process(self) -> list[str]:
        process = self.process
        others = "process_margin process_clamp"
        return [
            *self._expect(0 < self.process_weight < 1, "process_weight", "0 < weight < 1", "0.5"),
            *self._expect(self.process_rollouts >= 1, "process_rollouts", "a count >= 1", "use 2"),
            *self._expect(
                0 <= self.process_margin < math.inf, "process_margin", "a number >= 0", "use 1"
            ),
            *self._unused("process_weight process_rollouts", process == "none", "process='none'"),
            *self._unused(others, process != "vppo", f"process='{process}'"),
            *self._unused("baseline scale", process == "vppo", "process='vppo'"),
        ]


class BatchConfig(Settings):
    """How training sequences are packed."""

    max_tokens: int = 16384
    """Token budget of one packed micro-batch."""
    too_long: Literal["error", "alone"] = "error"
    """A sequence above the budget: refuse it, or give it a micro-batch of its own."""

    def check(self) -> list[str]:
        """See Settings.check."""
        return super().check() or self._expect(
            self.max_tokens >= 1, "max_tokens", "an integer >= 1", "use the longest sequence"
        )


class PolicyConfig(Settings):
    """The reinforcement-learning objective of one token."""

    objective: Literal["grpo", "cispo", "reinforce", "gspo"] = "grpo"
    """Clipped ratio; clipped ratio as a constant factor; no ratio; clipped ratio of sequences."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; 1 switches the lower bound off."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Highest ratio that a negative advantage is charged with (PPO dual clip); 0 is off."""
    kl: float = 0.0
    """Factor of the divergence from the reference policy; 0 is off."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """d, d**2 / 2 or exp(-d) - 1 + d, with d = log-prob - reference log-prob."""
    entropy: float = 0.0
    """Factor of the entropy bonus; 0 is off."""
    correction: Literal["off", "truncate", "mask"] = "off"
    """Weight by the ratio trainer / sampler: capped above, or zeroed outside its bounds."""
    correction_level: Literal["token", "sequence", "sequence-mean"] = "token"
    """Ratio of a token, of the whole sequence (product), or its geometric mean per token."""
    correction_low: float = 0.5
    """Lower bound of the ratio; only for correction="mask"."""
    correction_high: float = 2.0
    """Upper bound of the ratio."""

    @property
    def zero_advantage_is_zero_gradient(self) -> bool:
        """True when a token of advantage 0 cannot move the weights, so it need not be computed."""
        return self.kl == 0 and self.entropy == 0

    def check(self) -> list[str]:
        """See Settings.check."""
        return super().check() or [*self._check_ranges(), *self._check_effect()]

    def _check_ranges(self) -> list[str]:
        dual = self.dual_clip
        bounds = 0 <= self.correction_low < 1 <= self.correction_high < math.inf
        return [
            *self._expect(0 <= self.clip_low <= 1, "clip_low", "0 <= clip_low <= 1", "use 0.2"),
            *self._expect(0 <= self.clip_high < math.inf, "clip_high", "a number >= 0", "use 0.2"),
            *self._expect(
                dual == 0 or 1 + self.clip_high < dual < math.inf,
                "dual_clip",
                f"0 (off) or more than 1 + clip_high = {1 + self.clip_high:g}",
                "use 3",
            ),
            *self._expect(0 <= self.kl < math.inf, "kl", "a number >= 0", "use 0 to switch it off"),
            *self._expect(math.isfinite(self.entropy), "entropy", "a finite number", "use 0"),
            *self._expect(
                bounds,
                "correction_low" if not 0 <= self.correction_low < 1 else "correction_high",
                "0 <= correction_low < 1 <= correction_high",
                "use 0.5 and 2",
            ),
        ]

    def _check_effect(self) -> list[str]:
        off = self.correction == "off"
        return [
            *self._unused(
                "clip_low clip_high", self.objective == "reinforce", "objective='reinforce'"
            ),
            *self._unused(
                "dual_clip",
                self.objective not in ("grpo", "gspo"),
                f"objective='{self.objective}'",
            ),
            *self._unused("kl_estimator", self.kl == 0, "kl=0"),
            *self._unused("correction_level correction_high", off, "correction='off'"),
            *self._unused(
                "correction_low", self.correction != "mask", f"correction='{self.correction}'"
            ),
        ]


class OptimConfig(Settings):
    """AdamW, its schedule and its safeguards."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    floor: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_ratio: float = 0.0
    """Share of the steps with a linearly rising learning rate; 0 when warmup_steps says it."""
    warmup_steps: int = 0
    """Steps with a linearly rising learning rate; 0 when warmup_ratio says it."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    decay_vectors: bool = False
    """Decay norms and biases too."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    max_skipped: int = 5
    """Steps in a row with a non-finite gradient after which the run stops."""

    def check(self) -> list[str]:
        """See Settings.check."""
        return super().check() or [
            *self._expect(0 < self.lr < math.inf, "lr", "a number > 0", "use 1e-6"),
            *self._expect(0 <= self.floor <= 1, "floor", "0 <= floor <= 1", "use 0.1"),
            *self._expect(0 <= self.warmup_ratio < 1, "warmup_ratio", "0 <= ratio < 1", "use 0.1"),
            *self._expect(self.warmup_steps >= 0, "warmup_steps", "an integer >= 0", "use 0"),
            *self._expect(
                self.warmup_ratio == 0 or self.warmup_steps == 0,
                "warmup_steps",
                "0 because warmup_ratio is set",
                "keep one of the two",
            ),
            *self._expect(0 <= self.beta1 < 1, "beta1", "0 <= beta1 < 1", "use 0.9"),
            *self._expect(0 <= self.beta2 < 1, "beta2", "0 <= beta2 < 1", "use 0.999"),
            *self._expect(0 < self.eps < math.inf, "eps", "a number > 0", "use 1e-8"),
            *self._expect(
                0 <= self.weight_decay < math.inf, "weight_decay", "a number >= 0", "use 0"
            ),
            *self._expect(
                0 <= self.max_grad_norm < math.inf, "max_grad_norm", "a number >= 0", "use 1"
            ),
            *self._expect(self.max_skipped >= 1, "max_skipped", "an integer >= 1", "use 5"),
            *self._unused("floor", self.schedule == "constant", "schedule='constant'"),
            *self._unused("decay_vectors", self.weight_decay == 0, "weight_decay=0"),
        ]


class AnalysisConfig(Settings):
    """The tables of analysis.json: likelihoods and entropies of texts, pass@k and RL curves."""

    texts: int = 64
    """Texts of each kind that are scored under the base and the trained weights; 0 is off."""

    def check(self) -> list[str]:
        """See Settings.check."""
        return super().check() or self._expect(self.texts >= 0, "texts", "a count >= 0", "use 64")
