"""Out of memory: an error that names the phase and the settings to lower, of torch or of Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from intfast.state import interrupt

_GENERATING = (
    "lower rollout.max_rows (samples decoded at once) or rollout.cache_gib, or set "
    "rollout.sleep = true"
)
_NEW_RUN = "; in a new run folder also lower "
_TRAINING = (
    "set model.activation_checkpointing = true, or lower batch.max_tokens, at least the longest "
    "sequence, or rollout.cache_gib, which takes from the same memory"
)
KNOBS = {
    "generate": _GENERATING + _NEW_RUN + "rollout.context",
    "parity": _TRAINING + "; while sampling: " + _GENERATING + _NEW_RUN + "rollout.context",
    "prepare": "in a new run folder lower rl.problems_per_step x rl.group_size",
    "train": _TRAINING + _NEW_RUN + "rl.policy.kl to 0: it takes a second model",
    "score": _TRAINING,
    "grade": "lower grade.workers; these processes take main memory, not that of the device",
    "save": "free main memory: a checkpoint passes through it",
}
"""What to change, by phase of metrics.Metrics.phase; outside checks.MAY_CHANGE in a new run."""
_ELSEWHERE = (
    "the model and the optimizer come first, 18 bytes a parameter in bfloat16: lower "
    "rollout.cache_gib; in a new run folder also use a smaller model or model.dtype = bfloat16"
)


class OutOfMemory(RuntimeError):
    """The memory of the device or of the machine did not suffice."""


@contextmanager
def explained(phase: str) -> Iterator[None]:
    """Raise OutOfMemory, with the phase and what to change, for any such error inside.

    phase: a key of KNOBS; anything else gets the advice for what is loaded at the start
    """
    stage, _ = interrupt.last_sign()
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip()
        # Python's, torch's on CUDA, and that of torch's CPU allocator.
        words = ("OutOfMemoryError", "can't allocate memory", "out of memory")
        is_full = any(word in f"{type(error).__name__} {said}" for word in words)
        if not (is_full or isinstance(error, MemoryError)):
            raise
        where = phase if stage in ("start", phase) else f"{phase} of {stage}"
        raise OutOfMemory(
            f"out of memory in phase {where}: {KNOBS.get(phase, _ELSEWHERE)}. --dry-run shows the "
            "plan. What was recorded is kept: the same command with these settings continues"
            + (f". The allocator said: {said.splitlines()[0]}" if said else "")
        ) from error
