"""What the native engine promises beyond the protocol, and its sampler."""

from __future__ import annotations

import math
import random

import bounds
import pytest
import torch
from engine_cases import CONTEXT, kept_tokens, mixed_requests, native, next_logits, prompts, request
from tiny import hf_model, make_model

from intfast.engine import cache, generation, sampler
from intfast.engine.native import NativeEngine
from intfast.model import fixed, weights
from intfast.model.decoder import PackedAttention


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder and transformers model: Qwen3 with a context of 512 tokens."""
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, make_model(folder, "qwen3", max_position_embeddings=CONTEXT).eval()


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
    assert sorted(passed)[len(passed) // 2] == fixed.BLOCK
    assert sum(passed) < 1.25 * needed + 200 * fixed.BLOCK


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
    assert prompt_tokens == [fixed.BLOCK]


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
    rounding = bounds.of_log_probs(hf, prompts(12, longest=100, seed=1))
    for prompt_ids, (completion,) in zip(prompts(6), found, strict=True):
        tokens = [*prompt_ids, *completion.token_ids]
        logprob = next_logits(hf, tokens).log_softmax(-1)[len(prompt_ids) - 1 : -1]
        expected = logprob.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=rounding)


def test_bf16_generates_what_it_scores(tmp_path):
    hf = make_model(tmp_path).eval()
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
    # Means of two errors, each as large as that of transformers in bf16 on the same tokens.
    peer = bounds.log_prob_errors(hf.bfloat16(), sequences).mean()
    assert sum(abs(gap) for gap in gaps) / len(gaps) < 2 * peer


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


@pytest.mark.parametrize("vocabulary", [7, 90, 1_300])
def test_the_first_tokens_are_kept_as_by_a_sort_of_all(vocabulary):
    """Equal logits, both zeros, infinities: to the last bit, so no draw depends on its batch."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(96, vocabulary, generator=generator)).round() / 2
    logits[::4] = torch.randn(24, vocabulary, generator=generator)
    logits[1::4, ::2] = -0.0
    logits[2::4, ::3] = -math.inf
    top_k = 1 + torch.arange(96) % 60
    top_p = torch.rand(96, generator=generator, dtype=torch.float64)
    top_p[::5] = 1.0
    whole = sampler.truncate(logits, top_k, top_p)
    assert torch.equal(sampler.truncate(logits, top_k, top_p, most=60), whole)
    ordered, token = sampler.first(logits, 6)
    stable = logits.sort(descending=True, stable=True)
    assert torch.equal(token, stable.indices[:, :6]) and torch.equal(ordered, stable.values[:, :6])


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


def rounding_of_draw(logits, temperature, token, logprob):
    """(B,): bound of a log-prob's rounding, by the operations of `sampler.draw`.

    Of a = (logit - largest) / temperature two, u |a| each; of its exponential one or two units; of
    the total, whose groups add up in fp32, those of one group; and that of the result.
    """
    argument = (logits - logits.amax(1, True)).double() / temperature[:, None]
    square = 2 * argument.gather(1, token[:, None])[:, 0].square() + 4 + sampler._GROUP
    return bounds.FACTOR * bounds.unit() * (square + logprob.double().square()).sqrt()


def test_log_probs_over_a_large_vocabulary_are_not_biased():
    # torch's fp32 log_softmax is 1e-5 nat too high here, in every row.
    logits = 10 + 4 * torch.randn(16, 151_936, generator=torch.Generator().manual_seed(0))
    noise = torch.linspace(0, 0.99, 16, dtype=torch.float64)
    token, logprob = sampler.draw(logits, noise, torch.ones(16), None, False)
    exact = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    # The roundings of 16 rows are independent; a bias does not fall with the number of rows.
    bound = rounding_of_draw(logits, torch.ones(16), token, logprob).square().mean().sqrt()
    assert (logprob - exact).mean().abs() < bound / 4


@pytest.mark.parametrize("vocabulary", [128, 129, 200, 384, 50_257])
def test_a_large_vocabulary_is_searched_as_a_small_one(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(64, vocabulary, generator=generator)
    logits[:, ::3] = -math.inf
    noise = torch.rand(64, generator=generator, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1 - 2**-53])
    temperature = torch.linspace(0.5, 2.0, 64)
    token, logprob = sampler.draw(logits, noise, temperature, None, False)
    prob = (logits.double() / temperature[:, None]).softmax(-1)
    above = prob.cumsum(-1).gather(1, token[:, None])[:, 0]
    drawn = prob.gather(1, token[:, None])[:, 0]
    # The borders between tokens move by the roundings of fp32 weights and of sums in a group.
    argument = (logits - logits.amax(1, True)).double() / temperature[:, None]
    own = (prob * (2 * argument.abs().nan_to_num(posinf=0) + 2)).sum(1)
    moved = bounds.unit() * own + bounds.of_sum(sampler._GROUP, 1.0)
    assert (noise > above - drawn - moved).all() and (noise < above + moved).all()
    assert (drawn > 0).all()
    bound = rounding_of_draw(logits, temperature, token, logprob)
    assert ((drawn.log() - logprob).abs() < bound).all()
    some = slice(5, 38)
    parts = sampler.draw(logits[some], noise[some], temperature[some], None, False)
    assert torch.equal(parts[0], token[some]) and torch.equal(parts[1], logprob[some])


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


def test_a_longer_request_that_comes_later_gets_a_wider_cache(model):
    engine = native(model[0], max_rows=4)
    widths, cache = [], engine._cache

    def recorded(*arguments):
        made = cache(*arguments)
        widths.append((made[0].width, made[0].num_rows))
        return made

    engine._cache = recorded
    prompt_ids = prompts(1)[0]
    requests = [request(prompt_ids, range(3), max_new_tokens=n) for n in (20, 20, 400, 30, 400)]
    expected = native(model[0]).generate(requests)
    left, found = requests[:], {}

    def ended(p, g, completion):
        found[p, g] = completion

    taken = []

    def more(room):
        taken.append(len(widths))
        return [left.pop(0)] if left else []

    assert engine.generate([], ended, more) == []
    # Nothing passes the long one by: it would wait as long as shorter ones come.
    assert taken[:5] == [0, 1, 1, 2, 2]
    assert [[found[p, g] for g in range(3)] for p in range(5)] == expected
    # All rows from the beginning, though the first request has fewer samples.
    assert len(widths) == 2 and [rows for _, rows in widths] == [5, 5]
    assert widths[0][0] < 400 <= widths[1][0]


def test_requests_that_have_ended_are_forgotten(model, monkeypatch):
    """A flow has no end that is near: what is kept must not grow with it."""
    made, left = [], [request(p, [1, 2], max_new_tokens=3) for p in prompts(60)]
    init = generation.Generation.__init__
    kept = lambda call, *arguments: (made.append(call), init(call, *arguments))[1]  # noqa: E731
    monkeypatch.setattr(generation.Generation, "__init__", kept)
    sizes = []

    def more(room):
        sizes.extend(len(call.requests) + len(call.left) for call in made)
        return [left.pop()] if left else []

    native(model[0], max_rows=8).generate([], lambda *_: None, more)
    assert not left and max(sizes) <= 2 * 8 and made[0].requests == {}
