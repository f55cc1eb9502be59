"""Every setting of a run: one tree of frozen Structs. `config_io` loads, checks and explains it.

Defaults are the InT paper's, but for `intervene.stop`. They stand here and in `settings/`, and
nowhere else. The text after a field is its help text.
"""

from __future__ import annotations

from typing import Literal

from msgspec import field

from intfast.settings.engine import ParityConfig, RolloutConfig, WeightsConfig
from intfast.settings.metrics import MetricsConfig
from intfast.settings.numerics import (
    AnalysisConfig,
    BatchConfig,
    CreditConfig,
    OptimConfig,
    PolicyConfig,
    Settings,
    at_least,
)
from intfast.settings.problem import DataConfig, GradeConfig, PromptConfig


class ModelConfig(Settings):
    """The model that is trained, and that attempts, verifies and intervenes."""

    path: str = "Qwen/Qwen3-4B-Instruct-2507"
    """Hugging Face folder or hub name (config.json, safetensors, tokenizer.json)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of the weights; the optimizer always keeps fp32 masters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is CUDA where torch sees it, else the CPU; the choice is printed."""
    kernels: Literal["torch", "liger"] = "torch"
    """Norms, rotary embedding and SwiGLU: plain torch, or Liger's Triton kernels on CUDA."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: about a third more time for much less memory."""
    threads: int | None = None
    """CPU threads of torch; absent: torch's own choice."""
    memory_gib: float | None = None
    """Memory to plan for, in GiB; absent: what the device has. With --dry-run another device, for
    example 141 with model.device=cuda for an H200."""

    def check(self) -> list[str]:
        return at_least(self, threads=1, memory_gib=0)


class SamplingConfig(Settings):
    """How tokens are drawn."""

    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.8
    """Smallest set of tokens with this probability; 1 switches it off."""
    top_k: int = 20
    """This many most likely tokens; 0 switches it off."""
    max_new_tokens: int = 16384
    """Longest completion, in tokens."""

    def check(self) -> list[str]:
        errors = at_least(self, temperature=0, top_k=0, max_new_tokens=1)
        if not 0 < self.top_p <= 1:
            errors.append(f"top_p must be in (0, 1], got {self.top_p}")
        return errors


class AttemptConfig(Settings):
    """Stage 1: the model's own solutions."""

    samples: int = 4
    """Attempts per problem."""
    unsolved_only: bool = False
    """Keep only problems that no attempt solved (the paper's pool: none of 64)."""
    max_problems: int | None = None
    """Stop selecting after so many problems."""
    wrong_per_problem: int = 4
    """Wrong attempts per problem that go on to verification."""
    sampling: SamplingConfig = SamplingConfig()
    """How attempts are drawn."""

    def check(self) -> list[str]:
        errors = at_least(self, samples=1, wrong_per_problem=1, max_problems=1)
        if self.wrong_per_problem > self.samples:
            errors.append(
                f"wrong_per_problem ({self.wrong_per_problem}) must be <= samples ({self.samples})"
            )
        return errors


class InterveneConfig(Settings):
    """Stage 2: verify, intervene, continue, keep."""

    guided_solve: bool = True
    """Chat style: first let the model solve the problem along the reference, as in the paper."""
    samples: int = 4
    """Verifications per wrong attempt; the first that passes the gates is used."""
    sampling: SamplingConfig = SamplingConfig()
    """How guided solutions and verifications are drawn."""
    leak_gate: bool = True
    """Drop interventions that give the answer away."""
    max_step_tokens: int = 1024
    """Longest replacement step, in tokens; a longer one is dropped, never cut."""
    continuations: int = 32
    """Continuations from prefix + intervention, per intervention."""
    wave: int = 4
    """Continuations per wave; the stop rule looks between waves."""
    stop: Literal["never", "first_success", "futility"] = "first_success"
    """"never": all continuations, as in the paper; "first_success": no wave once `min_correct` are
    right, which keeps the same interventions; "futility": nor when that has become unlikely."""
    futility: float = 0.05
    """Stop "futility": the chance of a right one, under a Beta prior fitted to the run so far."""
    one_per_problem: bool = False
    """Stop a problem's other interventions too, once one of them is kept."""
    min_correct: int = 1
    """Right continuations that an intervention needs to be kept."""
    baselines: bool = False
    """Also continue from prefix + wrong step and from the prefix alone, for the report."""
    continuation: SamplingConfig = SamplingConfig()
    """How continuations are drawn."""

    def check(self) -> list[str]:
        errors = at_least(
            self, samples=1, max_step_tokens=1, continuations=0, wave=1, min_correct=1
        )
        if 0 < self.continuations < self.min_correct:
            errors.append(
                f"continuations ({self.continuations}) must be >= min_correct ({self.min_correct})"
            )
        if self.stop == "futility" and self.min_correct > 1:
            errors.append('stop = "futility" speaks of one right continuation; use "first_success"')
        if self.stop == "never" and self.one_per_problem:
            errors.append('one_per_problem needs stop = "first_success" or "futility"')
        if not 0 < self.futility < 1:
            errors.append(f"futility must be in (0, 1), got {self.futility}")
        return errors + self._unused("futility", self.stop != "futility", f'stop = "{self.stop}"')


class SftConfig(Settings):
    """Stage 3: fine-tuning on prefix + intervention, or on the data of a rival method."""

    data: Literal["intervention", "reference", "reflection", "rft", "star", "prefix"] = (
        "intervention"
    )
    """"reference": reference solutions; "reflection": the model's rewrites of its wrong attempts;
    "rft": its right attempts; "star": those, and right solutions written with the reference in
    view; "prefix": beginnings of its attempts, right or wrong (UPFT)."""
    samples: int = 4
    """"star": solutions with the reference in view, per problem without a right attempt."""
    prefix_tokens: int = 32
    """"prefix": tokens of each beginning; every tenth problem keeps its whole attempt."""
    epochs: int = 4
    """Passes over the examples; 0 skips the stage."""
    batch_size: int = 64
    """Examples per optimizer step."""
    loss_on: Literal["prefix+intervention", "intervention"] = "prefix+intervention"
    """Which tokens of an intervention example carry loss; the paper trains both."""
    suffix: bool = False
    """Append a right continuation to the target (an ablation; the paper advises against it)."""
    filter: bool = True
    """Only interventions with enough right continuations; false keeps all that passed the gates."""
    rows: Literal["all", "one"] = "all"
    """Every kept intervention, or one per problem (the one with the most right continuations)."""
    held_out: float = 0.0
    """Share of the problems whose interventions are not trained on: see analysis.json for them."""
    optim: OptimConfig = OptimConfig(warmup_ratio=0.1)
    """Optimizer and schedule."""

    def check(self) -> list[str]:
        errors = at_least(self, epochs=0, batch_size=1, samples=1, prefix_tokens=1)
        if not 0 <= self.held_out < 1:
            errors.append(f"held_out must be in [0, 1), got {self.held_out}")
        return errors


class RlConfig(Settings):
    """Stage 4: reinforcement learning on the outcome."""

    steps: int = 400
    """Rollout steps; 0 skips the stage."""
    problems_per_step: int = 32
    """Groups per step."""
    group_size: int = 8
    """Rollouts per problem."""
    minibatches: int = 2
    """Optimizer steps per rollout step."""
    problems: Literal["selected", "unlocked"] = "unlocked"
    """"selected": all of stage 1; "unlocked": those with a kept intervention (the paper)."""
    hint: Literal["off", "shortest", "fixed"] = "off"
    """Hint-guided RL: problems also appear with the beginning of their reference, one to one.
    "shortest": the first of `hint_shares` from which a sample is right; "fixed": the first."""
    hint_shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Shares of the reference's characters, in rising order."""
    hint_samples: int = 8
    """Samples from each share, until one is right."""
    refill: int = 0
    """Dynamic sampling: extra rounds that replace groups without variance, at most so many."""
    sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0)
    """How rollouts are drawn; importance correction needs the full distribution."""
    policy: PolicyConfig = PolicyConfig()
    """The objective."""
    credit: CreditConfig = CreditConfig()
    """From rewards to per-token advantages and weights."""
    optim: OptimConfig = OptimConfig(schedule="constant", weight_decay=0.01, max_grad_norm=0.3)
    """Optimizer and schedule."""
    until_tokens: int | None = None
    """Go on after `steps` until the run has generated so many tokens, collection included."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    evaluate_every: int | None = None
    """Steps between evaluations on the test problems; absent: only at the end."""
    from_base: bool = False
    """Also run the same RL from the base model, for comparison."""

    def check(self) -> list[str]:
        errors = at_least(
            self,
            steps=0,
            problems_per_step=1,
            group_size=2,
            minibatches=1,
            refill=0,
            hint_samples=1,
            until_tokens=1,
            checkpoint_every=1,
            evaluate_every=1,
        )
        rollouts = self.problems_per_step * self.group_size
        if rollouts % self.minibatches:
            errors.append(
                f"minibatches ({self.minibatches}) must divide problems_per_step x group_size "
                f"({self.problems_per_step} x {self.group_size} = {rollouts})"
            )
        truncated = self.sampling.top_p < 1 or self.sampling.top_k > 0
        if truncated and self.policy.correction != "off":
            errors.append(
                "policy.correction needs the full distribution, as the kept tokens of a truncated "
                "one are not replayed (vLLM returns them from 0.28 on and on CUDA only): set "
                'sampling.top_p = 1 and sampling.top_k = 0, or policy.correction = "off"'
            )
        process = self.credit.process != "none"
        if process and self.refill:
            errors.append("refill drops the groups that are all wrong, where credit.process acts")
        if process and self.hint != "off":
            errors.append("credit.process reads whole solutions; hint leaves their beginning out")
        if process and self.policy.objective == "gspo":
            errors.append(
                'policy.objective = "gspo" has one advantage a sequence, credit.process many'
            )
        shares = self.hint_shares
        if not shares or sorted(set(shares)) != shares or not 0 < shares[0] <= shares[-1] < 1:
            errors.append(f"hint_shares must rise within (0, 1), got {shares}")
        if self.until_tokens and self.optim.schedule != "constant":
            errors.append(
                'until_tokens leaves the number of steps open: set optim.schedule = "constant"'
            )
        if self.sampling.temperature == 0:
            errors.append("sampling.temperature must be > 0: greedy rollouts of a group are equal")
        return errors


class EvaluateConfig(Settings):
    """Accuracy and pass@k on the test problems."""

    samples: int = 128
    """Samples per problem."""
    ks: list[int] = field(default_factory=lambda: [1, 8, 32])
    """k of pass@k; each at most `samples`."""
    sampling: SamplingConfig = SamplingConfig()
    """How test answers are drawn."""

    def check(self) -> list[str]:
        errors = at_least(self, samples=1)
        if bad := [k for k in self.ks if not 1 <= k <= self.samples]:
            errors.append(f"ks must lie in 1..samples ({self.samples}), got {bad}")
        return errors


class Config(Settings):
    """A whole run: problems in, trained, evaluated and exported model out."""

    run: str = "runs/int"
    """The run folder. The same command continues an interrupted run."""
    seed: int = 0
    """Drives sampling and data order through named streams."""
    watchdog_s: float = 1800.0
    """Seconds without progress after which the run prints where it is stuck and ends with code 124;
    0 switches it off."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    grade: GradeConfig = GradeConfig()
    rollout: RolloutConfig = RolloutConfig()
    weights: WeightsConfig = WeightsConfig()
    attempts: AttemptConfig = AttemptConfig()
    intervene: InterveneConfig = InterveneConfig()
    batch: BatchConfig = BatchConfig(max_tokens=20480)
    sft: SftConfig = SftConfig()
    rl: RlConfig = RlConfig()
    parity: ParityConfig = ParityConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def needs_interventions(self) -> bool:
        """Whether interventions are what is trained on, or what selects the problems of RL."""
        by_rl = bool(self.rl.steps) and self.rl.problems == "unlocked"
        return by_rl or (bool(self.sft.epochs) and self.sft.data == "intervention")

    @property
    def needs_attempts(self) -> bool:
        """Whether training data or the choice of problems come from attempts."""
        by_sft = bool(self.sft.epochs) and self.sft.data != "reference"
        return self.needs_interventions or self.attempts.unsolved_only or by_sft

    @property
    def needs_references(self) -> bool:
        """Whether a reference solution takes part anywhere."""
        by_sft = bool(self.sft.epochs) and self.sft.data not in ("rft", "prefix")
        return self.needs_interventions or by_sft or self.rl.hint != "off"

    def check(self) -> list[str]:
        """Combinations that cannot work, or settings that would have no effect."""
        errors = at_least(self, watchdog_s=0)
        if self.data.train is None:
            errors.append('data.train is missing; name a problem file: data.train = "my.jsonl"')
        if not self.sft.epochs and not self.rl.steps:
            errors.append("sft.epochs = 0 and rl.steps = 0: nothing would be trained")
        longest = self.rl.sampling.max_new_tokens
        if self.rl.steps and self.batch.too_long == "error" and self.batch.max_tokens < longest:
            errors.append(
                f"batch.max_tokens ({self.batch.max_tokens}) must hold a prompt and "
                f"rl.sampling.max_new_tokens ({longest})"
            )
        continued = self.intervene.continuations
        on_interventions = self.sft.epochs and self.sft.data == "intervention"
        if self.sft.filter and on_interventions and not continued:
            errors.append(
                "sft.filter = true needs intervene.continuations > 0 (or set sft.filter = false)"
            )
        if self.sft.suffix and not continued:
            errors.append("sft.suffix = true needs intervene.continuations > 0")
        if self.intervene.baselines and not continued:
            errors.append("intervene.baselines = true needs intervene.continuations > 0")
        if self.rl.steps and self.rl.problems == "unlocked" and not continued:
            errors.append('rl.problems = "unlocked" needs intervene.continuations > 0')
        if not self.sft.epochs and self.rl.from_base:
            errors.append("rl.from_base repeats plain RL when sft.epochs = 0; set it to false")
        if self.rl.from_base and not self.rl.steps:
            errors.append("rl.from_base = true has no effect while rl.steps = 0")
        if self.rl.evaluate_every and self.data.test is None:
            errors.append("rl.evaluate_every has no effect without data.test")
        return errors
