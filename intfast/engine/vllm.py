"""vLLM as an engine inside this process, reading the trainer's own parameters.

`vllm_start.start` makes one. vLLM is imported in the files vllm*.py only, when this engine is
chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from intfast import ranks
from intfast.engine import scoring, sharing
from intfast.engine.protocol import (
    Completion,
    More,
    OnFinished,
    PromptReuse,
    Request,
    Sampling,
    check_requests,
)
from intfast.model.decoder import Decoder
from intfast.state import interrupt

# vLLM samples at this temperature when asked for one between 0 and it.
LOWEST_TEMPERATURE = 0.01


class _Sample(NamedTuple):
    """Which sample of which request it is."""

    p: int
    g: int
    request: Request


class VllmEngine:
    """`protocol.Engine` on vLLM's engine loop; samples of one prompt share its prefix cache.

    A greedy sample has log-probs of 0: it is drawn from a distribution of one token. On a CPU a
    sample's log-probs depend on the batch by rounding, about 1e-6 nat in fp32.
    """

    def __init__(self, llm: Any, decoder: Decoder, link: sharing.Link, context: int) -> None:
        """llm: a vllm.LLM; link: how updates of `decoder` reach its model."""
        self.decoder = decoder
        self.context = context
        self.max_rows = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self.policy_version = 0
        self.prompt_reuse = PromptReuse()
        self._llm, self._link = llm, link
        self._is_cuda = decoder.head_weight_VD.is_cuda
        self._num_calls = 0
        self._cache_is_empty = True
        self._asleep = False

    @property
    def is_apart(self) -> bool:
        """Whether each call takes requests of one sampling alone."""
        return self.decoder.head_weight_VD.device.type == "cpu"

    def generate(
        self,
        requests_P: Sequence[Request],
        on_finished: OnFinished | None = None,
        more: More | None = None,
    ) -> list[list[Completion]]:
        """See protocol.Engine. Raises ValueError, before any work, for bad requests."""
        self._check(requests_P, 0)
        if self._asleep:
            raise RuntimeError("the engine is asleep; call wake() before generate()")
        self._link.check()
        self._num_calls += 1
        running: dict[str, _Sample] = {}
        found_P_G: list[list[Any]] = [[None] * len(request.seeds) for request in requests_P]
        num_requests, first, loop = len(requests_P), "", self._llm.llm_engine
        try:
            self._add(requests_P, 0, running)
            while True:
                if more is not None and len(running) < self.max_rows:
                    requests = more(self.max_rows - len(running))
                    self._check(requests, num_requests)
                    self._add(requests, num_requests, running)
                    num_requests += len(requests)
                if not running:
                    break
                first = first or next(iter(running))
                interrupt.check()
                for output in loop.step():
                    if not output.finished or output.request_id not in running:
                        continue
                    p, g, request = running.pop(output.request_id)
                    self._count(output, output.request_id == first)
                    completion = self._completion(p, request, output.outputs[0])
                    if p < len(found_P_G):
                        found_P_G[p][g] = completion
                    if on_finished is not None:
                        on_finished(p, g, completion)
        except BaseException:
            # What is left would go on in the next call.
            loop.abort_request(list(running))
            raise
        self._synchronise()
        self._cache_is_empty = False
        # vLLM's ranks schedule and draw alone, and do not look whether they still agree.
        ranks.now().require_same(
            "tokens", lambda: repr([hash(tuple(c.token_ids)) for g in found_P_G for c in g])
        )
        return found_P_G

    def _check(self, requests_P: Sequence[Request], first: int) -> None:
        check_requests(requests_P, self.decoder.config.vocab_size, self.context, first)
        for i, request in enumerate(requests_P, first):
            if 0 < (asked := request.sampling.temperature) < LOWEST_TEMPERATURE:
                raise ValueError(
                    f"requests[{i}]: vLLM samples at a temperature of 0 or >= "
                    f"{LOWEST_TEMPERATURE}, got {asked}"
                )

    def _add(self, requests: Sequence[Request], first: int, running: dict[str, _Sample]) -> None:
        """Give vLLM all samples of requests that count from `first`; running: its id of each.

        Prompts with the same beginning are neighbours, so that the later finds it in the cache.
        """
        numbered = enumerate(requests, first)
        for p, request in sorted(numbered, key=lambda entry: [*entry[1].prompt_ids]):
            prompt = {"prompt_token_ids": list(request.prompt_ids)}
            for g, seed in enumerate(request.seeds):
                name = f"{self._num_calls}/{p}/{g}"
                running[name] = _Sample(p, g, request)
                self._llm.llm_engine.add_request(name, prompt, _parameters(request.sampling, seed))

    def _count(self, output: Any, is_first: bool) -> None:
        """Raises RuntimeError when the first sample after a reset reused a part of its prompt."""
        num_reused = output.num_cached_tokens or 0
        if num_reused and is_first and self._cache_is_empty:
            raise RuntimeError(
                f"vLLM took {num_reused} prompt tokens from a prefix cache that should be empty: "
                "they were computed with older weights; please report this version of vLLM"
            )
        asked, reused = self.prompt_reuse
        self.prompt_reuse = PromptReuse(asked + len(output.prompt_token_ids), reused + num_reused)

    def _completion(self, p: int, request: Request, sample: Any) -> Completion:
        logprobs = list(sample.logprobs.logprobs)
        if not math.isfinite(sum(logprobs)):
            raise RuntimeError(
                f"requests[{p}]: the model's logits are not finite; "
                "its weights or activations overflowed"
            )
        return Completion(
            token_ids=list(sample.token_ids),
            logprobs=[0.0] * len(logprobs) if request.sampling.temperature == 0 else logprobs,
            finish_reason=sample.finish_reason,
            policy_version=self.policy_version,
        )

    def score(
        self, sequences_P: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """See protocol.Engine; this is the decoder's forward pass, not vLLM's."""
        return scoring.score(self.decoder, sequences_P, temperature)

    def weights_changed(self) -> None:
        """See protocol.Engine.

        Raises RuntimeError when parameters are no longer vLLM's, or its cache could not be reset.
        """
        self._synchronise()
        self._link.update()
        self._reset_cache()
        self.policy_version += 1

    def sleep(self) -> None:
        """Give the KV memory back; `score` works on, `generate` needs `wake()`."""
        if self._asleep:
            return
        self._synchronise()
        if self._is_cuda:
            self._llm.sleep(level=1)
        else:
            self._llm.collective_rpc("release_kv")
        self._asleep = True

    def wake(self) -> None:
        """Take the KV memory again, empty."""
        if not self._asleep:
            return
        if self._is_cuda:
            self._llm.wake_up()
        else:
            self._llm.collective_rpc("restore_kv")
        self._reset_cache()
        self._asleep = False

    def _synchronise(self) -> None:
        """vLLM works asynchronously, on tensors that the trainer writes."""
        if self._is_cuda:
            torch.cuda.synchronize()

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM's prefix cache could not be reset: a request still holds blocks of it; "
                "update weights only between calls of generate()"
            )
        self._cache_is_empty = True


def _parameters(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=list(sampling.stop_ids),
        seed=seed,
        # The sampled token's, under the distribution it was drawn from.
        logprobs=0,
        flat_logprobs=True,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
