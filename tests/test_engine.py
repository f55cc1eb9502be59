"""The Engine protocol, for every engine; then what only the native engine promises."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny import hf_model, make_model
from transformers import AutoTokenizer

from intfast import weights
from intfast.engines import cache, generation, sampler
from intfast.engines.native import NativeEngine
from intfast.model import PackedAttention
from intfast.rollout import Request, Sampling

VOCAB = 62
ENGINES = {"native": lambda folder: native(folder)}


def native(folder, **settings):
    decoder, _ = weights.load(folder)
    return NativeEngine(decoder, AutoTokenizer.from_pretrained(folder), **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder and transformers model: Qwen3 with a context of 512 tokens."""
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, make_model(folder, "qwen3", max_position_embeddings=512).eval()


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, model):
    return ENGINES[request.param](model[0])


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


# Every engine


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
    engine, model, temperature, top_k, top_p
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
                assert logprob == pytest.approx(expected.item(), abs=2e-5)
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


def test_samples_that_share_a_prompt_equal_separate_requests(engine):
    prompt_ids = prompts(1)[0]
    (together,) = engine.generate([request(prompt_ids, range(20))])
    apart = engine.generate([request(prompt_ids, [seed]) for seed in range(20)])
    assert together == [group[0] for group in apart]


def test_a_partial_answer_can_be_continued_to_the_same_end(engine):
    prompt_ids = prompts(1)[0]
    ((whole,),) = engine.generate([request(prompt_ids, temperature=0.0)])
    cut = [*prompt_ids, *whole.token_ids[:7]]
    ((rest,),) = engine.generate([request(cut, temperature=0.0, max_new_tokens=13)])
    assert rest.token_ids == whole.token_ids[7:]


def test_stop_ids_and_lengths_end_a_completion(engine):
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
        assert short.logprobs == long.logprobs[:length]
        assert short.finish_reason == ("stop" if ends else "length")
        reasons.add(short.finish_reason)
    assert reasons == {"stop", "length"}


def test_stop_texts_end_a_completion_at_their_first_token(engine, model):
    tokenizer = AutoTokenizer.from_pretrained(model[0])
    stops = ("a", "3x", "</s>", "?!\n")
    seeds = range(40)
    (free,) = engine.generate([request([9], seeds, max_new_tokens=33)])
    (stopped,) = engine.generate([request([9], seeds, max_new_tokens=33, stop=stops)])
    reasons = set()
    for long, short in zip(free, stopped, strict=True):
        text = [tokenizer.decode(long.token_ids[:n]) for n in range(34)]
        ends = [n for n in range(34) if any(stop in text[n] for stop in stops)]
        length = ends[0] if ends else 33
        assert short.token_ids == long.token_ids[:length]
        assert len(short.logprobs) == length
        assert short.finish_reason == ("stop" if ends else "length")
        reasons.add((short.finish_reason, length % generation.STOP_TEXT_INTERVAL))
    assert len(reasons) > 4


def test_a_stop_text_is_found_across_the_places_where_text_is_read(engine, model):
    tokenizer = AutoTokenizer.from_pretrained(model[0])
    (free,) = engine.generate([request([9], range(12), max_new_tokens=40)])
    for seed, long in enumerate(free):
        start = generation.STOP_TEXT_INTERVAL * (1 + seed % 4) - 1 - seed % 3
        stop = tokenizer.decode(long.token_ids[start : start + 4])
        ((short,),) = engine.generate([request([9], [seed], max_new_tokens=40, stop=(stop,))])
        ends = [n for n in range(41) if stop in tokenizer.decode(long.token_ids[:n])]
        assert short.token_ids == long.token_ids[: ends[0]]
        assert short.finish_reason == "stop"


def test_progress_counts_samples_and_tokens(engine):
    calls = []
    requests = mixed_requests(12)
    found = engine.generate(requests, lambda *numbers: calls.append(numbers))
    flat = [completion for group in found for completion in group]
    assert calls == sorted(calls)
    assert calls[-1] == (len(flat), sum(len(c.token_ids) for c in flat))
    assert len(calls) > 5


def test_scores_equal_generated_logprobs_and_transformers(engine, model):
    found = engine.generate([request(p, [1, 2], temperature=0.8) for p in prompts(10)])
    sequences, spans = [], []
    for prompt_ids, group in zip(prompts(10), found, strict=True):
        for completion in group:
            sequences.append([*prompt_ids, *completion.token_ids])
            spans.append((len(prompt_ids) - 1, completion.logprobs))
    scores = engine.score([*sequences, [5]], temperature=0.8)
    assert scores.pop() == []
    for tokens, score, (start, logprobs) in zip(sequences, scores, spans, strict=True):
        assert score[start:] == pytest.approx(logprobs, abs=2e-5)
        logprob = (next_logits(model[1], tokens)[:-1] / 0.8).log_softmax(-1)
        expected = logprob.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert score == pytest.approx(expected.tolist(), abs=2e-5)


def test_policy_version_counts_weight_updates(engine):
    before = engine.policy_version
    engine.weights_changed()
    ((completion,),) = engine.generate([request([1, 2])])
    assert completion.policy_version == engine.policy_version == before + 1


def test_an_engine_sleeps_and_wakes(engine):
    requests = mixed_requests(4)
    before = engine.generate(requests)
    engine.sleep()
    with pytest.raises(RuntimeError, match="wake"):
        engine.generate(requests)
    engine.wake()
    assert engine.generate(requests) == before


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
        (request([1], stop=("",)), "stop"),
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


# The native engine


def test_results_do_not_depend_on_the_batch_to_the_last_bit(model, monkeypatch):
    requests = mixed_requests(60)
    whole = native(model[0]).generate(requests)
    assert sum(len(group) for group in whole) > 250
    lengths = {len(c.token_ids) for group in whole for c in group}
    assert len(lengths) > 40
    for max_rows in (5, 33, 64, 400):
        order = random.Random(max_rows).sample(range(60), 40)
        monkeypatch.setattr(generation, "PREFILL_TOKENS", random.Random(max_rows).choice([1, 999]))
        found = native(model[0], max_rows=max_rows).generate([requests[i] for i in order])
        assert found == [whole[i] for i in order]


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, 16), (6, 2, 24), (4, 1, 32)])
def test_results_do_not_depend_on_the_batch_for_other_shapes(tmp_path, heads, kv_heads, head_dim):
    make_model(
        tmp_path,
        "qwen3",
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
    )
    # Above 256 slots a sum over slots has several parts.
    requests = mixed_requests(16, longest=700)
    whole = native(tmp_path).generate(requests)
    alone = native(tmp_path, max_rows=3)
    for i in range(0, 16, 5):
        assert alone.generate([requests[i]]) == [whole[i]]


def test_a_small_cache_gives_the_same_samples(model):
    requests = mixed_requests(20)
    slot = cache.bytes_per_slot(weights.load(model[0])[0].config, torch.float32)
    small = native(model[0], max_cache_bytes=900 * slot)
    assert small.generate(requests) == native(model[0]).generate(requests)
    assert small._storage.numel() * 4 <= 900 * slot
    with pytest.raises(ValueError, match=r"requests\[0\].*max_cache_bytes"):
        native(model[0], max_cache_bytes=100 * slot).generate([request([1] * 60)])


def test_ended_samples_leave_the_batch(model, monkeypatch):
    """Tokens that pass through the decoder, against what is needed and what waste is allowed."""
    engine = native(model[0], max_rows=64)
    forward, passed = engine.decoder.forward, []

    def counting(token_T, *rest):
        passed.append(len(token_T))
        return forward(token_T, *rest)

    monkeypatch.setattr(engine.decoder, "forward", counting)
    # Many short samples and one long one, which starts in a late row.
    requests = [request([1, 2, 3], [seed], max_new_tokens=1 + seed % 20) for seed in range(300)]
    requests.insert(60, request([1, 2, 3], [0], max_new_tokens=200))
    engine.generate(requests)
    needed = 200 + sum(1 + seed % 20 for seed in range(300))
    # The long sample decodes alone in the end, in the smallest block of rows.
    assert max(passed) == 64
    assert sorted(passed)[len(passed) // 2] == cache.BLOCK
    assert sum(passed) < 1.25 * needed + 200 * cache.BLOCK


def test_a_prompt_is_computed_once(model, monkeypatch):
    engine = native(model[0], max_rows=8)
    forward, prompt_tokens = engine.decoder.forward, []

    def counting(token_T, position_T, attend, *rest):
        if isinstance(attend, cache.Prefill):
            prompt_tokens.append(len(token_T))
        return forward(token_T, position_T, attend, *rest)

    monkeypatch.setattr(engine.decoder, "forward", counting)
    # 30 samples, in two requests, need several turns in 8 rows.
    tokens = prompts(1)[0][:20]
    engine.generate([request(tokens, range(20)), request(tokens, range(10))])
    assert prompt_tokens == [cache.BLOCK]


def test_an_update_in_place_is_seen_by_the_next_call(tmp_path):
    make_model(tmp_path)
    engine = native(tmp_path)
    pointers = {name: p.data_ptr() for name, p in engine.decoder.named_parameters()}
    requests = [request(p, [1, 2]) for p in prompts(5)]
    before = engine.generate(requests)
    other = hf_model("qwen3", seed=1).state_dict()
    with torch.no_grad():
        parameters = dict(engine.decoder.named_parameters())
        for name, place in weights.slices(engine.decoder.config).items():
            parameters[place.parameter][place.start : place.stop].copy_(other[name])
    engine.weights_changed()
    after = engine.generate(requests)
    assert {n: p.data_ptr() for n, p in engine.decoder.named_parameters()} == pointers
    make_model(tmp_path, seed=1)
    fresh = native(tmp_path)
    fresh.weights_changed()
    assert after == fresh.generate(requests) != before


def test_training_goes_on_after_generation(model):
    engine = native(model[0])

    def gradients():
        engine.decoder.zero_grad()
        lengths = [9, 4]
        position_T = torch.cat([torch.arange(n) for n in lengths])
        hidden_TD = engine.decoder(position_T + 3, position_T, PackedAttention(lengths))
        engine.decoder.logits(hidden_TD).square().sum().backward()
        return [p.grad for p in engine.decoder.parameters()]

    before = gradients()
    requests = mixed_requests(4)
    found = engine.generate(requests)
    engine.score([[1, 2, 3]])
    assert not any(p.is_inference() for p in engine.decoder.parameters())
    assert not any(b.is_inference() for b in engine.decoder.buffers())
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))
    optimizer = torch.optim.SGD(engine.decoder.parameters(), lr=1e-3)
    optimizer.step()
    assert engine.generate(requests) != found


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_decodes_as_without_a_cache(tmp_path, family):
    windows = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    hf = make_model(tmp_path, family, **(windows if family == "qwen2" else {"sliding_window": 7}))
    engine = native(tmp_path)
    assert 7 in engine.decoder.config.windows
    found = engine.generate([request(p, [1], max_new_tokens=60) for p in prompts(6)])
    for prompt_ids, (completion,) in zip(prompts(6), found, strict=True):
        tokens = [*prompt_ids, *completion.token_ids]
        logprob = next_logits(hf, tokens).log_softmax(-1)[len(prompt_ids) - 1 : -1]
        expected = logprob.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=5e-5)


def test_bf16_generates_what_it_scores(tmp_path):
    make_model(tmp_path)
    decoder, _ = weights.load(tmp_path, dtype=torch.bfloat16)
    engine = NativeEngine(decoder)
    found = engine.generate([request(p, [1, 2]) for p in prompts(5)])
    sequences = [[*p, *c.token_ids] for p, g in zip(prompts(5), found, strict=True) for c in g]
    scores = engine.score(sequences)
    flat = [c for group in found for c in group]
    gaps = [
        a - b
        for tokens, score, c in zip(sequences, scores, flat, strict=True)
        for a, b in zip(c.logprobs, score[-len(c.token_ids) :], strict=True)
    ]
    assert sum(abs(gap) for gap in gaps) / len(gaps) < 0.05


def test_weights_that_overflow_are_reported(tmp_path):
    make_model(tmp_path)
    engine = native(tmp_path)
    requests = [request(prompts(1)[0], [1, 2], temperature=t) for t in (1.0, 0.0)]
    before = engine.generate(requests)
    weight = engine.decoder.model.layers[0].self_attn.qkv_proj.weight
    kept = weight.detach().clone()
    weight.data[-1, 3] = math.nan
    for one in requests:
        with pytest.raises(RuntimeError, match=r"requests\[0\].*not finite"):
            engine.generate([one])
    weight.data.copy_(kept)
    # Also in slots that are masked: the cache has nothing left of it.
    assert engine.generate(requests) == before


def test_max_rows_must_be_positive(model):
    with pytest.raises(ValueError, match="max_rows"):
        native(model[0], max_rows=0)


def test_stop_texts_need_a_tokenizer(model):
    decoder, _ = weights.load(model[0])
    with pytest.raises(ValueError, match="tokenizer"):
        NativeEngine(decoder).generate([request([1], stop=("a",))])


# The sampler


def test_truncation_keeps_exactly_the_defined_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 37, generator=generator) * 2
    # Ties, within and across every boundary.
    logits[::2] = (logits[::2] * 2).round() / 2
    top_k = torch.tensor([0, 1, 2, 5, 36, 37, 50, 3] * 8)
    top_p = torch.rand(64, generator=generator, dtype=torch.float64)
    top_p[::5] = 1.0
    kept = sampler.truncate(logits, top_k, top_p)
    for row in range(64):
        expected = kept_tokens(logits[row].tolist(), top_k[row].item(), top_p[row].item())
        assert kept[row].isfinite().nonzero()[:, 0].tolist() == sorted(expected)
        assert torch.equal(kept[row, expected], logits[row, expected])


def kept_of(logits, top_k, top_p):
    limits = torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64)
    return sampler.truncate(torch.tensor([logits]), *limits)[0].isfinite().tolist()


def test_top_p_at_exact_boundaries():
    # Eight equal probabilities, which sum exactly; equal logits are in the order of their ids.
    for top_p, count in [(1e-9, 1), (0.125, 1), (0.126, 2), (0.5, 4), (0.874, 7), (0.876, 8)]:
        assert kept_of([1.5] * 8, 0, top_p) == [i < count for i in range(8)], top_p


def test_no_limit_drops_nothing_to_rounding():
    # The second token's share vanishes beside the first's in fp64.
    assert kept_of([0.0, -50.0, -51.0], 0, 1.0) == [True] * 3
    assert kept_of([0.0, -50.0, -51.0], 2, 1.0) == [True, True, False]
    assert kept_of([0.0, -50.0, -51.0], 0, 0.999) == [True, False, False]


def test_draw_inverts_the_distribution_function():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    ends = {0.0: 0, 0.2499: 0, 0.2501: 2, 0.7499: 2, 0.7501: 3, 1 - 2**-53: 3}
    noise = torch.tensor(list(ends), dtype=torch.float64)
    rows = logits.expand(len(ends), -1)
    token, logprob = sampler.draw(rows, noise, torch.ones(len(ends)), None, False)
    assert token.tolist() == list(ends.values())
    assert logprob.exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25, 0.25])


def test_no_token_of_probability_zero_is_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    noise = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, _ = sampler.draw(logits.expand(3, -1), noise, torch.ones(3), None, False)
    assert token.tolist() == [1, 3, 3]


def test_noise_is_splitmix64():
    """Against the published algorithm in Python's integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    # Reference values of the published generator with state 0.
    assert mix(golden) == 0xE220A8397B1DCDAF
    assert mix(2 * golden % 2**64) == 0x6E789E6AA1B965F4
    for seed in (0, 1, 2**63 - 1):
        state = sampler.stream(torch.tensor([seed]))
        for index in (0, 1, 5, 10**6):
            bits = mix((mix((seed + golden) % 2**64) + (index + 1) * golden) % 2**64)
            noise = sampler.uniform(state, torch.tensor([index])).item()
            assert noise == (bits >> 11) / 2**53
            assert 0 <= noise < 1
