"""check_parity: the same tokens, scored by the trainer's forward and by the engine that drew them.

A weight update that did not reach the engine, a stale cache, a wrong temperature or position leave
no error behind: rewards only grow more slowly. Here the log-probs that came with sampled tokens are
compared with those of the forward that the losses differentiate; above WARNING in the mean the
run says so, above THRESHOLDS it stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from msgspec.structs import replace
from torch import Tensor

from intfast import ranks
from intfast.batch import pack
from intfast.engine.protocol import Completion, derive_seed
from intfast.model import shards
from intfast.model.decoder import Decoder
from intfast.records import Example
from intfast.run import Run
from intfast.sample import Graded, Start
from intfast.update import logprobs

Pair = tuple[Sequence[int], Completion]
"""(prompt ids, what the engine drew after them)."""
THRESHOLDS = {"float32": 1e-4, "bfloat16": 0.05}
"""Allowed mean of |trainer - engine| of a token's log-prob, in nat, by the dtype of the weights.

Sound bfloat16 pairs of vLLM and a trainer were reported up to 0.03 (standard deviation of a token
0.05). A check sees 256 tokens, whose mean scatters by 0.003: six of that lie between the two."""
WARNING = 0.03
"""Above this mean a run that goes on says so."""
NUM_PROMPTS = 4
NUM_SAMPLES = 2
NUM_TOKENS = 32
"""What a check draws where no rollouts are at hand: prompts, samples of each, tokens of a sample.

A fault of positions or of a cache shows within the first tokens; sampling must stay cheap."""

CAUSES = """\
Likely causes, and what to change:
  - stale weights: the parameters changed without engine.weights_changed(), or the engine reads a
    copy; a stale prefix cache. rollout.engine = "native" reads the trainer's own parameters
  - temperature or truncated sampling: the engine must report log-probs as it drew, that is after
    rl.sampling.temperature; its own defaults (generation_config.json) must not add top_p or top_k
  - head: logits rounded to bfloat16 cost 1e-2 nat; both sides must compute them in fp32
  - vocabulary: the engine's softmax includes padding rows, or its tokenizer is another model's
  - attention: wrong positions, an off-by-one between tokens and log-probs, another window or rope
To tell rounding from a fault, run a few steps with model.dtype = "float32" (with vLLM also
VLLM_BATCH_INVARIANT=1): what is left then is a fault."""


def before_generating(run: Run) -> None:
    """Check fresh short samples, once for each set of weights that the engine is told of."""
    if run.checked_version != run.sampler.engine.policy_version:
        _check_samples(run, run.holds)


def check_rollouts(
    run: Run, where: str, starts_P: Sequence[Start], groups_P_G: Sequence[Sequence[Graded]]
) -> None:
    """Check rollouts that were drawn with the current weights; nothing is generated.

    Truncated log-probs (top-p, top-k) are those of another distribution than the trainer's: then
    fresh untruncated samples take the rollouts' place.
    """
    sampling = run.config.rl.sampling
    if sampling.top_p < 1 or sampling.top_k > 0:
        _check_samples(run, where)
        return
    pairs_P_G = [
        [(run.sampler.start_prompt(start), graded.completion) for graded in group]
        for start, group in zip(starts_P, groups_P_G, strict=True)
    ]
    # The first sample of every prompt before the second of any: the budget sees many prompts.
    by_sample = chain.from_iterable(zip_longest(*pairs_P_G))
    check_parity(run, where, [pair for pair in by_sample if pair is not None])


def _check_samples(run: Run, where: str) -> None:
    whole = {"top_p": 1.0, "top_k": 0, "max_new_tokens": NUM_TOKENS}
    sampling = replace(run.config.rl.sampling, **whole)
    sampler, requests = run.sampler, []
    for problem in run.problems:
        prompt_ids = sampler.prompt(problem)
        if sampler.fits(len(prompt_ids), sampling) and len(requests) < NUM_PROMPTS:
            seeds = [
                derive_seed(run.config.seed, "parity", problem.id, n) for n in range(NUM_SAMPLES)
            ]
            requests.append(sampler.request(prompt_ids, seeds, sampling))
    with run.metrics.phase("parity"):
        groups = sampler.engine.generate(requests)
    pairs = [
        (request.prompt_ids, completion)
        for request, group in zip(requests, groups, strict=True)
        for completion in group
    ]
    check_parity(run, where, pairs)


def check_parity(run: Run, where: str, pairs: Sequence[Pair]) -> dict[str, float]:
    """Compare (prompt ids, completion) pairs, in order up to one micro-batch of tokens.

    where   names the check in metrics.jsonl (a row of stage "parity") and in the error
    pairs   drawn at `rl.sampling.temperature`, without top-p and top-k, by the current weights
    raises  RuntimeError above the threshold, for numbers that are not finite, and for tokens of
            another policy version than the engine's; the row is written before
    """
    engine = run.sampler.engine
    config = run.config
    allowed = THRESHOLDS[config.model.dtype]
    with run.metrics.phase("parity"):
        _check_ranks(run.decoder, where)
        chosen = _within(pairs, config.batch.max_tokens)
        if not chosen:
            run.metrics.say(f"parity of {where}: not checked, there is no sample to compare")
            return {}
        batch = replace(config.batch, too_long="alone")
        packed = pack([_example(*pair) for pair in chosen], batch)
        temperature = config.rl.sampling.temperature
        trainer_N = torch.cat(logprobs(run.decoder, packed, run.device, temperature)).cpu()
    order = [index for batch in packed.batches for index in batch.examples_S]
    values = compare(trainer_N, torch.tensor([x for i in order for x in chosen[i][1].logprobs]))
    versions = {completion.policy_version for _, completion in chosen}
    about = {"of": where, "version": engine.policy_version, "threshold": allowed}
    run.metrics.aside("parity", len(run.metrics.rows("parity")) + 1, about | values)
    if versions != {engine.policy_version}:
        raise RuntimeError(
            f"parity of {where}: the engine is at policy version {engine.policy_version}, but the "
            f"tokens were drawn by version {sorted(versions)}: they are stale. Draw them after "
            "engine.weights_changed(), and learn from them before the next update"
        )
    # Written so that a mean that is not a number fails.
    if not values["mean"] <= allowed:
        raise RuntimeError(
            f"parity of {where}: trainer and engine disagree about {values['tokens']} tokens that "
            f"the engine drew: mean |difference| {values['mean']:.2e} nat (p99 "
            f"{values['p99']:.2e}, max {values['max']:.2e}, signed mean {values['signed']:+.2e}), "
            f"allowed are {allowed:g} in {config.model.dtype}.\n{CAUSES}"
        )
    if values["mean"] > WARNING:
        run.metrics.say(
            f"parity of {where}: mean |difference| {values['mean']:.3f} nat is more than the "
            f"{WARNING:g} of rounding in {config.model.dtype}; the run stops above {allowed:g}. "
            'model.dtype = "float32" tells rounding from a fault'
        )
    run.checked_version = engine.policy_version
    return values


def _check_ranks(decoder: Decoder, where: str) -> None:
    """Raise RuntimeError where ranks hold other weights: one that drifted would train on silently.

    A sum of the bits of every parameter, as integers: exact in any order.
    """
    if ranks.now().world == 1:
        return
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: p.detach().view(integer[p.itemsize]).sum(dtype=torch.int64).item()
        for name, p in decoder.named_parameters()
    }
    found_R, tp = ranks.now().gather(sums), ranks.now().tp
    for rank, found in enumerate(found_R):
        # A shard is that of the first copy's rank; what is whole on every rank, that of rank 0.
        first = found_R[0] | {k: v for k, v in found_R[rank % tp].items() if shards.is_dealt(k)}
        if bad := [name for name in first if found[name] != first[name]]:
            raise RuntimeError(
                f"parity of {where}: rank {rank} holds other weights than rank 0 in {len(bad)} of "
                f"{len(first)} parameters, first {bad[0]}: a step did not reach it, or its memory "
                "is at fault; the same command continues from the last checkpoint"
            )


def _within(pairs: Sequence[Pair], max_tokens: int) -> list[Pair]:
    """Pairs with a token, in order, as many as the budget holds; one at least."""
    chosen: list[Pair] = []
    total = 0
    for prompt_ids, completion in pairs:
        count = len(prompt_ids) + len(completion.token_ids)
        if completion.token_ids and (not chosen or total + count <= max_tokens):
            chosen.append((prompt_ids, completion))
            total += count
    return chosen


def _example(prompt_ids: Sequence[int], completion: Completion) -> Example:
    # Without sampler log-probs: pack refuses those that are not finite, here they must be reported.
    return Example(
        token_ids=[*prompt_ids, *completion.token_ids],
        weights=[0.0] * len(prompt_ids) + [1.0] * len(completion.token_ids),
    )


def compare(trainer_N: Tensor, sampler_N: Tensor) -> dict[str, float]:
    """Statistics of trainer - engine per token, in nat, and of the raw ratio exp(difference)."""
    difference_N = trainer_N.double() - sampler_N.double()
    size_N, ratio_N = difference_N.abs(), difference_N.exp()
    low, high = torch.quantile(ratio_N, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
    return {
        "tokens": len(difference_N),
        "mean": size_N.mean().item(),
        "p99": torch.quantile(size_N, 0.99).item(),
        "max": size_N.max().item(),
        "signed": difference_N.mean().item(),
        "ratio_mean": ratio_N.mean().item(),
        "ratio_min": ratio_N.min().item(),
        "ratio_p01": low,
        "ratio_p99": high,
        "ratio_max": ratio_N.max().item(),
    }
