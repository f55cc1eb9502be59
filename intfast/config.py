"""Every setting with its help text: the InT paper's defaults, but for `intervene.stop`."""

from __future__ import annotations

import os
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import asdict, force_setattr, replace

from intfast import labels


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings: immutable, strict about its fields."""


class SamplingConfig(Settings):
    """How tokens are drawn. A stage's None is what `[sampling]` says: see Config."""

    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Smallest set of tokens with this probability; 1 switches it off."""
    top_k: int | None = None
    """This many most likely tokens; 0 switches it off."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens."""


class ModelConfig(Settings):
    """The model that is trained, and that attempts, verifies and intervenes."""

    path: str = "Qwen/Qwen3-4B-Instruct-2507"
    """Hugging Face folder or hub name (config.json, safetensors, tokenizer.json)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of the weights; the optimizer always keeps fp32 masters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is CUDA where torch sees it, else the CPU; the choice is printed."""
    kernels: Literal["auto", "torch", "liger", "fused"] = "auto"
    """Of norms, rotation, SwiGLU; "auto" is Liger's on CUDA where it is installed, and printed."""
    activation_checkpointing: bool | Literal["selective", "auto"] = "auto"
    """Recompute activations; "selective": but products and attention; "auto": what must be."""
    optimizer_state: Literal["fp32", "split", "short"] = "fp32"
    """Of bfloat16: 12 bytes a parameter; "split": 10, masters exact; "short": 6, less exact."""
    threads: int | None = None
    """CPU threads of torch; absent: torch's own choice."""
    memory_gib: float | None = None
    """Memory to plan for, in GiB; absent: the device's. For --dry-run, 141 on cuda is an H200."""


class RanksConfig(Settings):
    """How the processes of torchrun share the work."""

    tp: int = 1
    """Of so many, each holds a shard of the model (tensor parallel, with vLLM); 1: the whole."""
    gradients: Literal["whole", "dealt"] = "whole"
    """Fp32 gradients on each rank: whole, or those of its part, reduced in every micro-batch."""


class DataConfig(Settings):
    """Problems with answers and reference solutions."""

    train: str | None = None
    """Training problems: a .jsonl, .json, .parquet, a folder, a hub name, "reasoning-gym:NAME"."""
    test: str | None = None
    """Held-out problems; absent: no evaluation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Your column names where ours do not fit: {problem = "question_text"}."""
    train_limit: int | None = None
    """Use only the first so many training problems."""
    test_limit: int | None = None
    """Use only the first so many test problems."""


class PromptConfig(Settings):
    """What the model is asked, and how its text is cut into steps."""

    style: Literal["chat", "compact"] = "chat"
    """"chat": the two-turn conversation for instruct models; "compact": the quickstart's."""
    system: str = ""
    """System turn of the chat style; empty: none, or what the model's template says by itself."""
    template_args: dict[str, bool | int | float | str | list[str]] = field(default_factory=dict)
    """What the model's chat template reads besides the turns: {enable_thinking = false}."""
    instruction: str = ""
    """Text added to every problem in the chat style, for example how to box the answer."""
    separator: str = "\n\n"
    """What ends a step, "re:..." as a pattern. Steps keep it and join to the attempt's bytes."""
    domain: str = "math"
    """Words of the chat style: "math", "general", or a .toml file of yours (intfast/words.py)."""


class GradeConfig(Settings):
    """How the answer is found in a text and compared, or what function scores it."""

    function: str = ""
    """Scores instead: "package.module:function", "trl:...", "reasoning-gym", "verifiers:NAME"."""
    correct_at: float = 1.0
    """The least reward of a function that counts as a right answer."""
    range: tuple[float, float] | None = None
    """Lowest and highest reward of a function; any other is unscored. Absent: none is."""

    mode: str = "boxed"
    """"boxed": last \\boxed{}, else "Answer:"; "stated": else "answer is"; "tail:WORD": as text."""
    workers: int = 2
    """Processes for answers that need a computer-algebra comparison, or for the function."""
    timeout_s: float = 5.0
    """Seconds after which such a process is killed and its answer counted as unscored."""
    digits: int = 0
    """Decimals of so many significant digits may be the gold answer rounded; 0: none may."""


class RolloutConfig(Settings):
    """The engine that generates."""

    engine: Literal["auto", "native", "vllm", "vllm_copy"] = "auto"
    """"native"; "vllm" on the trainer's weights, or "vllm_copy" on a copy; "auto": vLLM on CUDA."""
    max_rows: int = 256
    """Sequences decoded at once."""
    cache_gib: Literal["auto"] | float = "auto"
    """Memory for keys and values, in GiB; "auto": what the plan leaves, as far as it is of use."""
    context: int | None = None
    """Longest sequence, prompt and completion, in tokens; absent: the model's."""
    sleep: bool = False
    """Give the memory for keys and values to the trainer during its updates."""


# Stage 1 to 4 in the order in which they run; what they share comes first.
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
    """"never": all, as in the paper; "first_success": until `min_correct` are right, which keeps
    the same ones; "futility": or until that has become unlikely."""
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


class BatchConfig(Settings):
    """How training sequences are packed."""

    max_tokens: int = 16384
    """Token budget of one packed micro-batch."""
    too_long: Literal["error", "alone"] = "error"
    """A sequence above the budget: refuse it, or give it a micro-batch of its own."""


class OptimConfig(Settings):
    """AdamW and its schedule; what hardly anybody changes is a constant of model/optim.py."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Its shape after the warm-up, over all planned steps, with an update or without."""
    floor: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_ratio: float = 0.0
    """Share of the steps with a linearly rising learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""


class SftConfig(Settings):
    """Stage 3: fine-tuning on prefix + intervention, or on the data of a rival method."""

    data: labels.SftData = "intervention"
    """What it learns from: study/README.md and methods/README.md."""
    target: labels.SftTarget = "recipe"
    """"recipe": prefix + intervention of all that are kept; its "intervention" or "prefix" alone;
    "suffix": and a right continuation; "one_per_problem"; "no_filter": all that pass the gates."""
    samples: int = 4
    """"star", "regft": solutions with the reference in view, per problem that is asked."""
    prefix_tokens: int = 32
    """"prefix": tokens of each beginning."""
    prefix_whole: float = 0.1
    """"prefix": share of the problems that keep their whole attempt."""
    epochs: int = 4
    """Passes over the examples; 0 skips the stage."""
    batch_size: int = 64
    """Examples per optimizer step."""
    optim: OptimConfig = OptimConfig(warmup_ratio=0.1)
    """Optimizer and schedule."""


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
    correction_bounds: tuple[float, float] = (0.5, 2.0)
    """Lowest (only for correction="mask") and highest ratio."""


class CreditConfig(Settings):
    """How rewards of a group become per-token weights and advantages."""

    baseline: Literal["mean", "leave-one-out"] = "mean"
    """What is subtracted from a reward: mean of its group, or mean of the others in it."""
    scale: Literal["none", "group", "group-population", "batch"] = "none"
    """Divide by a standard deviation: unbiased or population of the group, unbiased of the step."""
    normalisation: Literal["token", "sequence-mean", "sequence-sum", "constant"] = "sequence-sum"
    """What the summed loss is divided by; see credit.divisor."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss (their reward still counts)."""


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
    hint: Literal["off", "shortest"] | float = "off"
    """Problems also appear with this share of their reference; "shortest": one that is enough."""
    method: labels.Method = "outcome"
    """What is changed of RL on the outcome: methods/README.md."""
    method_args: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Settings of the method's own: {alpha = 0.3}."""
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


class ParityConfig(Settings):
    """Trainer and engine score the same tokens: always checked where weights were loaded."""

    every: int = 10
    """RL steps between checks of the step's own rollouts; 0: only after weights were loaded."""


class EvaluateConfig(Settings):
    """Accuracy and pass@k on the test problems."""

    samples: int = 128
    """Samples per problem."""
    ks: list[int] = field(default_factory=lambda: [1, 8, 32])
    """k of pass@k; each at most `samples`."""
    sampling: SamplingConfig = SamplingConfig()
    """How test answers are drawn."""


class AnalysisConfig(Settings):
    """The tables of analysis.json: likelihoods and entropies of texts, pass@k and RL curves."""

    texts: int = 64
    """Texts of each kind that are scored under the base and the trained weights; 0 is off."""
    held_out: float = 0.0
    """Share of the problems whose interventions SFT does not see; they are scored apart."""


class MetricsConfig(Settings):
    """What is recorded for people. Nothing here changes a result."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Also send the rows of metrics.jsonl to these; one that fails is dropped, not the run."""
    example_logprobs: int = 64
    """SFT examples whose tokens the report colours by what SFT did to them; 0 is off."""


SAMPLED = "attempts.sampling intervene.sampling intervene.continuation rl.sampling "
SAMPLED += "evaluate.sampling"
"""Where the stages say how they draw tokens."""


class Config(Settings):
    """A whole run. Every stage starts from `sampling`: those of a Config hold no None."""

    run: str = "runs/int"
    """The run folder (~ is yours, in every path). The same command continues an interrupted run."""
    seed: int = 0
    """Drives sampling and data order through named streams."""
    watchdog_s: float = 1800.0
    """Seconds without progress after which the run says where it is stuck and ends; 0 is off."""
    sampling: SamplingConfig = SamplingConfig(
        temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=16384
    )
    model: ModelConfig = ModelConfig()
    ranks: RanksConfig = RanksConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    grade: GradeConfig = GradeConfig()
    rollout: RolloutConfig = RolloutConfig()
    attempts: AttemptConfig = AttemptConfig()
    intervene: InterveneConfig = InterveneConfig()
    batch: BatchConfig = BatchConfig(max_tokens=20480)
    sft: SftConfig = SftConfig()
    rl: RlConfig = RlConfig()
    parity: ParityConfig = ParityConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self) -> None:
        data, model = self.data, self.model
        for section, name in (self, "run"), (model, "path"), (data, "train"), (data, "test"):
            if isinstance(path := getattr(section, name), str):
                force_setattr(section, name, os.path.expanduser(path))
        for section, _, name in (path.partition(".") for path in SAMPLED.split()):
            stage = getattr(self, section)
            own = {k: v for k, v in asdict(getattr(stage, name)).items() if v is not None}
            force_setattr(self, section, replace(stage, **{name: replace(self.sampling, **own)}))

    @property
    def needs_interventions(self) -> bool:
        """Whether interventions are what is trained on, or what selects the problems of RL."""
        by_rl = self.rl.steps > 0 and self.rl.problems == "unlocked"
        by_sft = bool(self.sft.epochs) and self.sft.data == "intervention"
        return by_rl or by_sft or labels.by_method(self.rl, "interventions")

    @property
    def needs_attempts(self) -> bool:
        """Whether training data or the choice of problems come from attempts."""
        by_sft = bool(self.sft.epochs) and self.sft.data != "reference"
        return self.needs_interventions or self.attempts.unsolved_only or by_sft

    @property
    def needs_references(self) -> bool:
        """Whether a reference solution takes part anywhere."""
        by_sft = bool(self.sft.epochs) and self.sft.data not in labels.WITHOUT_REFERENCES
        by_rl = self.rl.hint != "off" or labels.by_method(self.rl, "references")
        return self.needs_interventions or by_sft or by_rl
