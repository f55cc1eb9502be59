"""The Engine protocol: what every engine does. What only ours promises is in test_engine_native."""

from __future__ import annotations

import json
import math

import bounds
import pytest
import torch
from engine_cases import (
    CONTEXT,
    VOCAB,
    kept_tokens,
    mixed_requests,
    native,
    needs_vllm,
    next_logits,
    prompts,
    request,
    same,
    vllm,
)
from tiny import make_model

DEFAULTS = {
    "eos_token_id": list(range(3, 60, 2)),
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "repetition_penalty": 5.0,
    "presence_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [5, 6, 7],
    "max_new_tokens": 2,
    "max_length": 3,
}
ENGINES = [native, pytest.param(vllm, marks=needs_vllm)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder and transformers model: Qwen3 with a context of 512 tokens."""
    folder = tmp_path_factory.mktemp("qwen3")
    # vLLM's attention on a CPU has no smaller heads.
    shape = {"max_position_embeddings": CONTEXT, "head_dim": 32}
    made = make_model(folder, "qwen3", **shape).eval()
    # No default of the folder may take part: what is drawn is what a request says.
    (folder / "generation_config.json").write_text(json.dumps(DEFAULTS))
    return folder, made


@pytest.fixture(scope="module")
def rounding(model):
    """What two computations of this model's log-probs may differ by, at temperature 1."""
    return bounds.of_log_probs(model[1], prompts(24, longest=60, seed=1))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, model):
    return request.param(model[0])


def test_greedy_equals_transformers(engine, model):
    hf = model[1]
    found = engine.generate([request(p, temperature=0.0) for p in prompts(24)])
    for prompt_ids, (completion,) in zip(prompts(24), found, strict=True):
        expected = hf.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt_ids) :]
        assert completion.token_ids == expected.tolist()
        assert completion.logprobs == [0.0] * 20
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (4, 1.0), (0, 0.8), (6, 0.7)])
def test_logprobs_are_those_of_the_distribution_drawn_from(
    engine, model, rounding, temperature, top_k, top_p
):
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = engine.generate([request(p, [3, 4], **settings) for p in prompts(6)])
    num_cut = 0
    for prompt_ids, group in zip(prompts(6), found, strict=True):
        for completion in group:
            logits = next_logits(model[1], [*prompt_ids, *completion.token_ids]) / temperature
            steps = zip(completion.token_ids, completion.logprobs, strict=True)
            for t, (token, logprob) in enumerate(steps, len(prompt_ids) - 1):
                kept = kept_tokens(logits[t].tolist(), top_k, top_p)
                num_cut += VOCAB - len(kept)
                expected = logits[t, token] - logits[t, kept].logsumexp(0)
                assert token in kept
                assert logprob == pytest.approx(expected.item(), abs=rounding / temperature)
    assert (num_cut > 0) == (top_k > 0 or top_p < 1)


def test_sampled_tokens_have_the_frequencies_of_the_model(engine, model):
    prompt_ids, count = prompts(1)[0], 4000
    (group,) = engine.generate([request(prompt_ids, range(count), max_new_tokens=2)])
    prob_V = next_logits(model[1], prompt_ids)[-1].softmax(0)
    first = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=VOCAB)
    assert chi_square_is_plausible(first, prob_V)
    # The second token, given the most frequent first: its noise is another.
    common = first.argmax().item()
    second = [c.token_ids[1] for c in group if c.token_ids[0] == common]
    prob_V = next_logits(model[1], [*prompt_ids, common])[-1].softmax(0)
    assert chi_square_is_plausible(torch.bincount(torch.tensor(second), minlength=VOCAB), prob_V)


def chi_square_is_plausible(count_V, prob_V):
    expected = prob_V * count_V.sum()
    # The usual rule: bins of at least 5 expected, the others put together.
    rare = expected < 5
    count_V = torch.cat([count_V[~rare], count_V[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp_min(1e-9)
    assert len(count_V) > 5
    statistic = ((count_V - expected) ** 2 / expected).sum()
    freedom = len(count_V) - 1
    return statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_the_seed_decides_the_sample(engine):
    prompt_ids = prompts(1)[0]
    seeds = [7, 8, 7, 2**63 - 1]
    (group,) = engine.generate([request(prompt_ids, seeds)])
    a, b, again, largest = (c.token_ids for c in group)
    assert a == again
    assert len({tuple(a), tuple(b), tuple(largest)}) == 3


def test_samples_that_share_a_prompt_equal_separate_requests(engine, rounding):
    prompt_ids = prompts(1)[0]
    (together,) = engine.generate([request(prompt_ids, range(20))])
    apart = engine.generate([request(prompt_ids, [seed]) for seed in range(20)])
    assert same([together], [[group[0] for group in apart]], rounding)


def test_a_partial_answer_can_be_continued_to_the_same_end(engine):
    prompt_ids = prompts(1)[0]
    ((whole,),) = engine.generate([request(prompt_ids, temperature=0.0)])
    cut = [*prompt_ids, *whole.token_ids[:7]]
    ((rest,),) = engine.generate([request(cut, temperature=0.0, max_new_tokens=13)])
    assert rest.token_ids == whole.token_ids[7:]


def test_stop_ids_and_lengths_end_a_completion(engine, rounding):
    free = engine.generate([request(p, max_new_tokens=30 + i) for i, p in enumerate(prompts(20))])
    stops = (3, 17, 40)
    stopped = engine.generate(
        [
            request(p, max_new_tokens=30 + i, stop_ids=stops[: i % 4])
            for i, p in enumerate(prompts(20))
        ]
    )
    reasons = set()
    for i, ((long,), (short,)) in enumerate(zip(free, stopped, strict=True)):
        ends = [t for t, token in enumerate(long.token_ids) if token in stops[: i % 4]]
        length = ends[0] + 1 if ends else 30 + i
        assert len(long.token_ids) == 30 + i
        assert short.token_ids == long.token_ids[:length]
        assert short.logprobs == pytest.approx(long.logprobs[:length], abs=rounding)
        assert short.finish_reason == ("stop" if ends else "length")
        reasons.add(short.finish_reason)
    assert reasons == {"stop", "length"}


def test_each_completion_is_handed_over_as_it_ends(engine):
    calls = []
    requests = [
        request(p, [1, 2], max_new_tokens=n) for n, p in zip((9, 3, 30), prompts(3), strict=True)
    ]
    found = engine.generate(requests, lambda *ended: calls.append(ended))
    assert [p for p, _, _ in calls] == [1, 1, 0, 0, 2, 2]
    assert all(found[p][g] == completion for p, g, completion in calls)


def test_reuse_of_prompts_is_counted(engine):
    before = engine.prompt_reuse
    prompt_ids = prompts(1)[0] * 4
    engine.generate([request(prompt_ids, range(6)), request([9], [])])
    asked, reused = (a - b for a, b in zip(engine.prompt_reuse, before, strict=True))
    assert asked == 6 * len(prompt_ids)
    assert 0.5 * asked < reused < asked


def test_scores_equal_generated_logprobs_and_transformers(engine, model, rounding):
    found = engine.generate([request(p, [1, 2], temperature=0.8) for p in prompts(10)])
    sequences, spans = [], []
    for prompt_ids, group in zip(prompts(10), found, strict=True):
        for completion in group:
            sequences.append([*prompt_ids, *completion.token_ids])
            spans.append((len(prompt_ids) - 1, completion.logprobs))
    scores = engine.score([*sequences, [5]], temperature=0.8)
    assert scores.pop() == []
    for tokens, score, (start, logprobs) in zip(sequences, scores, spans, strict=True):
        assert score[start:] == pytest.approx(logprobs, abs=rounding / 0.8)
        logprob = (next_logits(model[1], tokens)[:-1] / 0.8).log_softmax(-1)
        expected = logprob.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert score == pytest.approx(expected.tolist(), abs=rounding / 0.8)


def test_policy_version_counts_weight_updates(engine):
    before = engine.policy_version
    engine.weights_changed()
    ((completion,),) = engine.generate([request([1, 2])])
    assert completion.policy_version == engine.policy_version == before + 1


def test_an_engine_sleeps_and_wakes(engine, rounding):
    requests = mixed_requests(4)
    before = engine.generate(requests)
    coldest = min(r.sampling.temperature or 1.0 for r in requests)
    engine.sleep()
    with pytest.raises(RuntimeError, match="wake"):
        engine.generate(requests)
    engine.wake()
    assert same(engine.generate(requests), before, rounding / coldest)


def test_nothing_asked_is_nothing_given(engine):
    assert engine.generate([]) == []
    assert engine.generate([request([1], [])]) == [[]]
    assert engine.score([]) == []
    empty, (one,) = engine.generate([request([1], []), request([2], [5])])
    assert empty == [] and len(one.token_ids) == 20


@pytest.mark.parametrize(
    "bad,message",
    [
        (request([]), "prompt_ids.*at least one token"),
        (request([1, VOCAB]), "token id 62"),
        (request([-1]), "token id -1"),
        (request([1] * 500, max_new_tokens=13), "500 tokens.*13.*512"),
        (request([1], max_new_tokens=0), "max_new_tokens must be >= 1, got 0"),
        (request([1], temperature=-0.5), "temperature"),
        (request([1], temperature=math.nan), "temperature"),
        (request([1], temperature=math.inf), "temperature"),
        (request([1], top_p=0.0), "top_p"),
        (request([1], top_p=1.5), "top_p"),
        (request([1], top_k=-1), "top_k"),
        (request([1], [2**63]), "seeds"),
        (request([1], [-1]), "seeds"),
    ],
)
def test_bad_requests_are_refused_by_number_before_any_work(engine, bad, message):
    def work(*_):
        raise AssertionError("a sample was decoded")

    with pytest.raises(ValueError, match=rf"requests\[1\].*{message}"):
        engine.generate([request([1, 2]), bad], work)


def test_the_context_may_be_filled_to_the_last_token(engine):
    ((completion,),) = engine.generate([request([1] * 500, max_new_tokens=12)])
    assert len(completion.token_ids) == 12


@pytest.mark.parametrize("bad", [[], [1, VOCAB], [1] * 513])
def test_bad_sequences_are_not_scored(engine, bad):
    with pytest.raises(ValueError, match=r"sequences\[1\]"):
        engine.score([[1, 2], bad])


def test_requests_that_come_while_others_run_are_drawn_as_if_they_came_first(engine, rounding):
    requests = mixed_requests(24, seed=3)
    expected = engine.generate(requests)
    coldest = min(r.sampling.temperature or 1.0 for r in requests)
    found: dict[int, dict] = {p: {} for p in range(len(requests))}
    left, ended_before = list(requests[2:]), []

    def ended(p, g, completion):
        found[p][g] = completion

    def more(room):
        assert room > 0
        taken = [left.pop(0) for _ in range(min(len(left), 2))]
        ended_before.extend(sum(map(len, found.values())) for _ in taken)
        return taken

    first = engine.generate(requests[:2], ended, more)
    assert not left and ended_before[-1] > 0
    groups = [[found[p][g] for g in range(len(r.seeds))] for p, r in enumerate(requests)]
    assert same(groups, expected, rounding / coldest)
    assert same(first, expected[:2], rounding / coldest)


def test_bad_requests_that_come_later_are_refused_by_number(engine, rounding):
    before = engine.generate([request([1, 2])])
    with pytest.raises(ValueError, match=r"requests\[1\].*token id 62"):
        engine.generate([request([1, 2])], lambda *_: None, lambda room: [request([VOCAB])])
    # Nothing of it is left.
    assert same(engine.generate([request([1, 2])]), before, rounding)
