"""Settings of the engine, of the weights that it shares, and of the check that compares both."""

from __future__ import annotations

from typing import Literal

from intfast.settings.numerics import Settings, at_least


class RolloutConfig(Settings):
    """The engine that generates."""

    engine: Literal["auto", "native", "vllm"] = "auto"
    """"native": the embedded engine; "vllm"; "auto": vLLM on CUDA where it is installed."""
    max_rows: int = 256
    """Sequences decoded at once."""
    cache_gib: Literal["auto"] | float = "auto"
    """Memory for keys and values, in GiB; "auto": what the plan leaves, as far as it is of use."""
    context: int | None = None
    """Longest sequence, prompt and completion, in tokens; absent: the model's."""
    graphs: bool = True
    """vLLM on CUDA: replay decode steps as CUDA graphs; false runs them one by one."""
    sleep: bool = False
    """Give the memory for keys and values to the trainer during its updates."""
    chunk_samples: int = 4096
    """Samples per call of the engine; records are written to disk after every call, an evaluation
    after its last one: interrupted, it is drawn again."""

    def check(self) -> list[str]:
        errors = at_least(self, max_rows=1, chunk_samples=1, context=2)
        if self.cache_gib != "auto" and not self.cache_gib > 0:
            errors.append(f'cache_gib must be > 0, got {self.cache_gib}; "auto" plans it')
        return errors


class WeightsConfig(Settings):
    """Where the weights live that the trainer updates and the engine reads."""

    share: bool = True
    """One copy for both; false: vLLM has its own, written after every update."""


class ParityConfig(Settings):
    """Trainer and engine score the same tokens; see parity.py. Always done once for each set of
    weights that is loaded, before anything is drawn from it."""

    every: int = 10
    """RL steps between checks of the step's own rollouts; 0: only after weights were loaded."""
    threshold: float | None = None
    """Highest mean |difference| of a token's log-prob, in nat; absent: 0.03 in bfloat16, 1e-4 in
    float32. For an exact comparison use model.dtype = "float32", with vLLM also
    VLLM_BATCH_INVARIANT=1."""

    def check(self) -> list[str]:
        positive = self.threshold is None or self.threshold > 0
        errors = at_least(self, every=0)
        return errors + (
            [] if positive else ["threshold must be > 0; leave it out for the default"]
        )
