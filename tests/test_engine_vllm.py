"""What the vLLM engine promises beyond the protocol: one copy of the weights, and clean manners."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bounds
import pytest
import torch
from engine_cases import needs_vllm, prompts, request, same, vllm
from tiny import make_model
from transformers import AutoModelForCausalLM

from intfast import cli
from intfast.batch import pack
from intfast.config import BatchConfig, OptimConfig
from intfast.loss import sft_loss
from intfast.model.decoder import PackedAttention
from intfast.model.optim import Optimizer
from intfast.records import Example

pytestmark = needs_vllm
ROOT = Path(__file__).parents[1]
SHAPE = {"max_position_embeddings": 512, "head_dim": 32}


def make(folder, family="qwen3", **changes):
    # These have no head_dim of their own: their heads are hidden_size / heads.
    shape = {"hidden_size": 128} if family in ("qwen2", "olmo2") else {"head_dim": 32}
    if family == "gemma3_text":
        # vLLM shares no model with windows in some layers only.
        shape["layer_types"] = ["full_attention"] * 4
    return make_model(folder, family, **{"max_position_embeddings": 512, **shape, **changes})


def step(decoder, lr=0.02):
    """An update of every weight, as the trainer makes it."""
    optimizer = Optimizer(decoder.named_parameters(), OptimConfig(lr=lr, max_grad_norm=0), 1)
    example = Example(token_ids=list(range(3, 40)), weights=[0.0] + [1.0] * 36)
    (batch,) = pack([example], BatchConfig(max_tokens=64)).batches
    attend = PackedAttention(batch.lengths)
    hidden_ND = decoder(batch.token_ids_T, batch.position_ids_T, attend, rows_C=batch.rows_N)
    sft_loss(hidden_ND, decoder.head_weight_VD, batch)[0].backward()
    optimizer.step()
    optimizer.close()


def gaps(engine, requests):
    """|engine - trainer| of each new token's log-prob, and the completions."""
    found = engine.generate(requests)
    flat = [(r.prompt_ids, c) for r, group in zip(requests, found, strict=True) for c in group]
    scores = engine.score([[*prompt_ids, *c.token_ids] for prompt_ids, c in flat])
    pairs = zip(scores, flat, strict=True)
    gap = [torch.tensor(s[-len(c.token_ids) :]) - torch.tensor(c.logprobs) for s, (_, c) in pairs]
    return torch.cat(gap).abs(), found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    make(path, tie_word_embeddings=True)
    return path


@pytest.fixture(scope="module")
def rounding(folder):
    """What two computations of this model's log-probs may differ by."""
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    return bounds.of_log_probs(hf, prompts(24, longest=60, seed=1))


@pytest.fixture(scope="module")
def engine(folder):
    return vllm(folder)


# --- one copy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,tied,dtype",
    [
        ("qwen3", True, "float32"),
        ("qwen3", False, "float32"),
        ("llama", False, "float32"),
        ("qwen2", True, "float32"),
        ("mistral", False, "float32"),
        ("glm4", False, "float32"),
        ("granite", False, "float32"),
        ("gemma3_text", True, "float32"),
        ("olmo2", False, "float32"),
        ("smollm3", False, "float32"),
        ("qwen3", True, "bfloat16"),
        ("llama", False, "bfloat16"),
    ],
)
def test_an_optimizer_step_is_the_weight_update(tmp_path, family, tied, dtype):
    hf = make(tmp_path, family, tie_word_embeddings=tied).eval().to(getattr(torch, dtype))
    errors = bounds.log_prob_errors(hf, prompts(24, longest=60, seed=1))
    engine = vllm(tmp_path, dtype)
    pointers = {name: p.data_ptr() for name, p in engine.decoder.named_parameters()}
    requests = [request(p, [1, 2], max_new_tokens=16) for p in prompts(6)]

    def assert_small(gap):
        if dtype == "float32":
            assert gap.max() < bounds.PEER * errors.max()
        assert gap.mean() < bounds.PEER * errors.mean()

    for seed in range(2):
        gap, before = gaps(engine, requests)
        assert_small(gap)
        old = engine.score([[*prompts(6)[0], *before[0][0].token_ids]])
        step(engine.decoder)
        engine.weights_changed()
        new = engine.score([[*prompts(6)[0], *before[0][0].token_ids]])
        # Far more than the gap: old weights in vLLM would show.
        assert (torch.tensor(new) - torch.tensor(old)).abs().mean() > 0.3, seed
    gap, after = gaps(engine, requests)
    assert_small(gap)
    assert [c.token_ids for (c, _) in after] != [c.token_ids for (c, _) in before]
    assert {c.policy_version for group in after for c in group} == {2}
    assert {name: p.data_ptr() for name, p in engine.decoder.named_parameters()} == pointers


def test_without_sharing_an_update_is_copied(folder, rounding):
    engine = vllm(folder, engine="vllm_copy")
    requests = [request(p, [1], max_new_tokens=16) for p in prompts(4)]
    assert gaps(engine, requests)[0].max() < rounding
    step(engine.decoder)
    engine._llm.reset_prefix_cache()
    assert gaps(engine, requests)[0].mean() > 0.1
    engine.weights_changed()
    assert gaps(engine, requests)[0].max() < rounding


def test_a_broken_alias_is_caught(folder):
    engine = vllm(folder)
    norm = engine.decoder.model.norm.weight
    norm.data = norm.data.clone()
    for call in (engine.weights_changed, lambda: engine.generate([request([1])])):
        with pytest.raises(RuntimeError, match=r"no longer share.*model\.norm\.weight"):
            call()


def test_the_engine_can_reload_nothing(engine):
    with pytest.raises(RuntimeError, match="cannot be reloaded"):
        engine._llm.collective_rpc("reload_weights")


# --- the prefix cache --------------------------------------------------------------------------


def test_a_stale_prefix_cache_is_caught(folder, rounding, monkeypatch):
    engine = vllm(folder)
    requests = [request(prompts(1)[0] * 4, [1, 2])]
    gaps(engine, requests)
    with monkeypatch.context() as patch:
        # It says that it was reset, and was not.
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        step(engine.decoder)
        engine.weights_changed()
        with pytest.raises(RuntimeError, match="prefix cache that should be empty"):
            engine.generate(requests)
        # Without this guard the samples come from a mixture of two sets of weights.
        engine._cache_is_empty = False
        assert gaps(engine, requests)[0].mean() > 1e-3
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
        version = engine.policy_version
        with pytest.raises(RuntimeError, match="could not be reset"):
            engine.weights_changed()
        assert engine.policy_version == version
    engine.weights_changed()
    assert gaps(engine, requests)[0].max() < rounding


def test_a_continuation_reuses_its_prefix_until_the_weights_change(engine):
    prompt_ids = prompts(1)[0] * 4
    ((attempt,),) = engine.generate([request(prompt_ids, max_new_tokens=40)])

    def reused():
        before = engine.prompt_reuse
        cut = [*prompt_ids, *attempt.token_ids[:30], 7]
        engine.generate([request(cut, [1], max_new_tokens=2)])
        asked, again = (a - b for a, b in zip(engine.prompt_reuse, before, strict=True))
        return again / asked

    assert reused() > 0.7
    engine.weights_changed()
    assert reused() == 0


# --- manners -----------------------------------------------------------------------------------


def test_what_is_left_of_a_failed_call_is_gone(engine, rounding):
    requests = [request(p, [1, 2], max_new_tokens=5 + i) for i, p in enumerate(prompts(6))]
    before = engine.generate(requests)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, fail)
    assert not engine._llm.llm_engine.has_unfinished_requests()
    engine.weights_changed()
    assert same(engine.generate(requests), before, rounding)


def test_asleep_the_cache_has_no_memory_and_scores_work(engine):
    def kv_bytes():
        [caches] = engine._llm.collective_rpc(lambda worker: worker.model_runner.kv_caches)
        return sum(
            {s._cdata: s.nbytes() for s in map(torch.Tensor.untyped_storage, caches)}.values()
        )

    awake = kv_bytes()
    engine.sleep()
    assert kv_bytes() == 0 < awake
    assert len(engine.score([[1, 2, 3]])[0]) == 2
    engine.sleep()
    engine.wake()
    engine.wake()
    assert kv_bytes() == awake


def test_temperatures_that_vllm_would_change_are_refused(engine):
    with pytest.raises(ValueError, match=r"requests\[0\].*0\.01, got 0\.005"):
        engine.generate([request([1], temperature=0.005)])


HYGIENE = """
import os, sys, threading
os.environ["MINE"] = "kept"
import psutil, torch
sys.path.insert(0, "tests")
from engine_cases import vllm
from pathlib import Path
from intfast.engine import hygiene
torch.set_num_threads(2)
torch.set_float32_matmul_precision("high")
torch.manual_seed(5)
before = hygiene.state()
engine = vllm(Path(sys.argv[1]))
after = hygiene.state()
wrong = [name for name in before if repr(before[name]) != repr(after[name])]
assert not wrong, [(name, before[name], after[name]) for name in wrong]
torch.set_num_threads(1)
assert torch.get_num_threads() == 1
me = psutil.Process()
listening = [c.laddr.ip for c in me.net_connections("inet") if c.status == "LISTEN"]
loopback = {"127.0.0.1", "::1"}
assert set(listening) <= loopback, listening
reached = {c.raddr.ip for c in me.net_connections("inet") if c.raddr}
assert reached <= loopback, reached
assert not me.children(), me.children()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
print("clean", end="")
"""


def test_the_process_is_as_it_was(folder):
    done = subprocess.run(
        [sys.executable, "-c", HYGIENE, folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout[-5:]) == (0, "clean"), done.stderr[-3000:]


def test_the_quickstart_runs_with_one_word_changed(tmp_path):
    from intfast.train import main

    words = ["data.train_limit=8", "data.test_limit=2", "rollout.cache_gib=0.1", "rl.steps=1"]
    words += ["rollout.engine=vllm", "rollout.sleep=true", f"run={tmp_path}/run"]
    assert main([str(ROOT / "configs/quickstart_short.toml"), *words]) == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["engine"] == "vllm"
    assert any(name.startswith("vllm") for name in manifest["packages"])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    checked = [row for row in rows if row["stage"] == "parity"]
    assert len(checked) >= 2
    assert all(row["mean"] < 1e-5 for row in checked)
    shares = [row["prompt_reuse"] for row in rows if "prompt_reuse" in row]
    assert shares and max(shares) > 0.3
    # The same command again has nothing left to do.
    cli.load(ROOT / "configs/quickstart_short.toml", words)
    assert main([str(ROOT / "configs/quickstart_short.toml"), *words]) == 0
