"""What the tests of the engines share: a small model, requests, and the definitions to test by."""

from __future__ import annotations

import random

import pytest
import torch

from intfast.config import Config, ModelConfig, RolloutConfig
from intfast.engine.native import NativeEngine
from intfast.engine.protocol import Request, Sampling, pick_engine
from intfast.model import weights

try:
    pick_engine("vllm", "cpu")
    NO_VLLM = ""
except RuntimeError as error:
    NO_VLLM = str(error)
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(bool(NO_VLLM), reason=NO_VLLM)]

VOCAB = 62
CONTEXT = 512


def native(folder, **settings):
    decoder, _ = weights.load(folder)
    return NativeEngine(decoder, **settings)


def vllm(folder, dtype="float32", engine="vllm", **rollout):
    from intfast.engine import vllm_start

    config = Config(
        model=ModelConfig(path=str(folder), dtype=dtype, device="cpu", kernels="torch"),
        rollout=RolloutConfig(engine=engine, **{"cache_gib": 0.05, "max_rows": 64, **rollout}),
    )
    return vllm_start.start(folder, config, torch.device("cpu"))


def same(found_P_G, expected_P_G, tolerance):
    """Whether completions are equal, up to rounding of their log-probs."""
    return all(
        a.token_ids == b.token_ids
        and a.finish_reason == b.finish_reason
        and a.logprobs == pytest.approx(b.logprobs, abs=tolerance)
        for found, expected in zip(found_P_G, expected_P_G, strict=True)
        for a, b in zip(found, expected, strict=True)
    )


def prompts(count, longest=40, seed=0):
    rnd = random.Random(seed)
    return [[rnd.randrange(VOCAB) for _ in range(rnd.randint(1, longest))] for _ in range(count)]


def request(prompt_ids, seeds=(0,), **sampling):
    return Request(
        prompt_ids=prompt_ids,
        seeds=seeds,
        sampling=Sampling(**{"max_new_tokens": 20, **sampling}),
    )


@torch.no_grad()
def next_logits(hf, token_ids):
    """Logits (T, V), fp64, after each token; without a cache."""
    return hf(torch.tensor([token_ids]), use_cache=False).logits[0].double()


def kept_tokens(logit_V, top_k, top_p):
    """The definition: the first top_k by (logit, id), of these the shortest beginning >= top_p."""
    order = sorted(range(len(logit_V)), key=lambda t: (-logit_V[t], t))
    order = order[: top_k or None]
    prob = torch.tensor([logit_V[t] for t in order], dtype=torch.float64).softmax(0).tolist()
    kept, mass = [], 0.0
    for token, p in zip(order, prob, strict=True):
        if kept and mass >= top_p and top_p < 1:
            break
        kept.append(token)
        mass += p
    return kept


def mixed_requests(count, seed=0, longest=150):
    """Requests of random lengths and settings, with 1 to 9 samples each."""
    rnd = random.Random(seed)
    return [
        request(
            [rnd.randrange(VOCAB) for _ in range(rnd.randint(1, longest))],
            [rnd.randrange(2**63) for _ in range(rnd.randint(1, 9))],
            max_new_tokens=rnd.randint(1, 60),
            temperature=rnd.choice([1.0, 1.0, 0.7, 0.0]),
            top_k=rnd.choice([0, 0, 5]),
            top_p=rnd.choice([1.0, 1.0, 0.9]),
            stop_ids=rnd.choice([(), (5,), (7, 11)]),
        )
        for _ in range(count)
    ]
