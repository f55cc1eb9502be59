"""The memory plan: against arithmetic by hand, and against the peak that torch reports."""

import tracemalloc

import pytest
import torch
from test_learn import folder  # noqa: F401
from test_train import ROOT, SMALLER, arguments
from tiny import config_dict

from intfast import cli, loss, plan
from intfast.batch import pack
from intfast.config import BatchConfig
from intfast.engine import memory
from intfast.engine.memory import GIB, Plan, Target
from intfast.model.decoder import Architecture, Decoder
from intfast.records import Example
from intfast.train import main

QWEN3 = {
    # name: layers, hidden, feed-forward, heads, key/value heads, tied, parameters as published
    "0.6B": (28, 1024, 3072, 16, 8, True, 596_049_920),
    "1.7B": (28, 2048, 6144, 16, 8, True, 1_720_574_976),
    "4B": (36, 2560, 9728, 32, 8, True, 4_022_468_096),
    "8B": (36, 4096, 12288, 32, 8, False, 8_190_735_360),
}
H200 = Target("cuda", "native", 139 * GIB, 139 * GIB)


def qwen3(name):
    layers, hidden, ffn, heads, kv_heads, tied, _ = QWEN3[name]
    return Architecture.from_hf(
        config_dict(
            "qwen3",
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=128,
            max_position_embeddings=40_960,
            tie_word_embeddings=tied,
        )
    )


def paper(*overrides):
    words = ["data.train=my.jsonl", "model.activation_checkpointing=true", *overrides]
    return cli.load(ROOT / "configs" / "int_qwen3_4b.toml", words)


def bytes_of(made, word):
    (item,) = [item for item in made.items() if word in item.what]
    return item


# --- by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN3)
def test_state_per_parameter(name):
    architecture, published = qwen3(name), QWEN3[name][-1]
    assert memory.num_parameters(architecture) == published
    made = Plan(paper(), architecture, H200)
    words = ("weights", "masters", "moments", "gradients")
    state = [bytes_of(made, word).training / published for word in words]
    assert state == [2, 4, 8, 4]
    # Gradients are gone while tokens are drawn.
    assert bytes_of(made, "gradients").generating == 0


def test_4b_by_hand():
    made = Plan(paper("rollout.cache_gib=30"), qwen3("4B"), H200)
    # 16 bytes a parameter with gradients in bf16 are 64 GB; ours add up in fp32, 18 bytes.
    assert 16 * QWEN3["4B"][-1] == pytest.approx(64e9, rel=0.01)
    state = sum(bytes_of(made, w).training for w in ("weights", "masters", "moments", "gradients"))
    assert state == pytest.approx(72.4e9, rel=0.001)
    # Keys and values: 2 x 36 layers x 8 heads x 128 x 2 bytes = 147 KB a token, 30 GiB hold 218k.
    slot = memory.bytes_per_slot(qwen3("4B"), torch.bfloat16)
    assert slot == 147_456
    assert bytes_of(made, "keys").training // slot == 218_453
    # Checkpointing keeps 36 inputs of 2,560 numbers; a whole layer is
    # 4 x 2560 + 6144 + 5120 + 5120 + 4096 + 4 x 9728 = 69,632.
    assert memory.layer_numbers(qwen3("4B")) == 69_632
    # The loss head: 1.25 GB of logits, the head's gradient in fp32 and bf16, hidden states.
    head = 1_250_000_000 + 151_936 * 2560 * 6 + 2 * 20_480 * 2560 * 2
    # The query's norm, in fp32: four times 4,096 numbers a token, more than attention's 12 bytes.
    norm = 4 * 4096 * 4
    assert norm > 12 * 4096 > 2 * 9728 * 2
    top = (69_632 * 2 + norm) * 20_480
    assert top > head > norm * 20_480
    assert bytes_of(made, "micro-batch").training == 36 * 2560 * 20_480 * 2 + top
    plain = paper("model.activation_checkpointing=false", "rollout.cache_gib=30")
    made = Plan(plain, qwen3("4B"), H200)
    assert bytes_of(made, "micro-batch").training == 36 * 69_632 * 20_480 * 2 + head


def test_what_settings_add():
    def peak(*overrides, engine="native"):
        target = H200._replace(engine=engine)
        return Plan(paper("rollout.cache_gib=8", *overrides), qwen3("4B"), target).peaks()

    weights = 2 * QWEN3["4B"][-1]
    plain, vllm = peak(), peak(engine="vllm")
    assert peak("rl.policy.kl=0.1") == tuple(x + weights for x in plain)
    assert peak("rollout.engine=vllm_copy", engine="vllm") == tuple(x + weights for x in vllm)
    assert peak("rollout.sleep=true") == (plain[0] - 8 * GIB, plain[1])


def test_what_cuda_adds_inside_a_layer():
    """Without a norm of queries attention's backward is what counts; fp32 expands the heads."""
    llama = Architecture.from_hf(
        config_dict(
            "llama", hidden_size=1024, intermediate_size=2048, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, num_hidden_layers=2,
        )
    )  # fmt: skip

    def micro_batch(kind, dtype):
        words = [f"model.dtype={dtype}", "model.activation_checkpointing=false"]
        made = Plan(paper(*words, "batch.max_tokens=32768"), llama, H200._replace(kind=kind))
        return made.micro_batch() / 32_768

    layer = memory.layer_numbers(llama)
    # dO and dQ, and dK and dV of 32 heads, in bf16; the sum of dQ in fp32.
    assert micro_batch("cuda", "bfloat16") == 2 * layer * 2 + (4 * 2 + 4) * 4096
    # Four fp32 temporaries of a norm over 1,024 numbers.
    assert micro_batch("cpu", "bfloat16") == 2 * layer * 2 + 4 * 4 * 1024
    # 24 more heads of keys and of values in each of the two layers.
    more = micro_batch("cuda", "float32") - micro_batch("cpu", "float32")
    assert more == 2 * 2 * 24 * 128 * 4 + (4 * 4 + 4) * 4096 - 2 * 2048 * 4


# --- measured -----------------------------------------------------------------------------------


def measured_peak(work):
    """Bytes that torch's CPU allocator holds at once while `work` runs, on top of before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "lengths", "vocab"),
    [
        ("qwen3", [256] * 8, 512),
        ("llama", [256] * 8, 512),
        ("qwen3", [500, 400, 300, 256, 200, 150, 100, 80, 62], 512),
        ("qwen3", [256] * 4, 8192),
    ],
    ids=["qwen3", "llama", "lengths", "vocabulary"],
)
def test_the_estimate_against_the_measured_peak(checkpointing, dtype, family, lengths, vocab):
    shape = {
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "head_dim": 32,
        "max_position_embeddings": 512,
    }
    architecture = Architecture.from_hf(config_dict(family, **shape))
    decoder = Decoder(architecture, dtype)
    decoder.activation_checkpointing = checkpointing
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.02)
    # All rows carry loss, as the planner assumes.
    examples = [Example(token_ids=[5] * (n + 1), weights=[0.0] + [1.0] * n) for n in lengths]
    (batch,) = pack(examples, BatchConfig(max_tokens=10_000)).batches

    def work():
        hidden_ND = decoder(*batch.inputs())
        loss_sum, _ = loss.sft_loss(hidden_ND, decoder.head_weight_VD, batch)
        loss_sum.backward()

    work()
    decoder.zero_grad(set_to_none=True)
    words = [
        f"model.activation_checkpointing={str(checkpointing).lower()}",
        f"model.dtype={str(dtype).removeprefix('torch.')}",
    ]
    made = Plan(paper(*words), architecture, Target("cpu", "native", GIB, GIB))
    estimate = made.changed("batch.max_tokens", sum(lengths)).micro_batch()
    estimate += memory.num_parameters(architecture) * dtype.itemsize
    peak = measured_peak(work)
    assert 0.98 * peak <= estimate <= 1.3 * peak


# --- what is chosen, and what is refused --------------------------------------------------------


def test_samples_that_are_not_yet_on_the_disk_are_planned_on_the_host():
    tracemalloc.start()
    ids = [1000 + n for n in range(100_000)]
    logprobs = [-n / 7 for n in range(100_000)]
    measured = tracemalloc.get_traced_memory()[0] / len(ids)
    tracemalloc.stop()
    assert len(logprobs) == len(ids) and measured == pytest.approx(memory.SAMPLE_BYTES, rel=0.2)
    planned = {}
    for kind in ("cpu", "cuda"):
        made = Plan(paper(), qwen3("4B"), Target(kind, "native", 999 * GIB, 999 * GIB))
        (planned[kind],) = [i for i in made.items() if "before they are on the disk" in i.what]
    assert planned["cpu"][1:] == (0, 4096 * 16384 * memory.SAMPLE_BYTES)
    assert planned["cuda"][1:] == (0, 0)


def test_auto_takes_what_is_left_and_no_more_than_is_of_use():
    made, architecture = Plan(paper(), qwen3("4B"), H200), qwen3("4B")
    cache = made.cache_bytes()
    left = made.changed("rollout.cache_gib", 0).left(H200.total)
    assert cache == left > 30 * GIB
    assert made.left(H200.total) == 0
    few = Plan(paper("rollout.max_rows=2"), architecture, H200)
    assert few.cache_bytes() == 3 * few.sample_bytes()
    # A run that is continued beside another process keeps its size.
    crowded = H200._replace(free=GIB)
    assert Plan(paper(), architecture, crowded).cache_bytes() == cache


def test_a_plan_that_fits_is_settled_with_a_number():
    made = Plan(paper(), qwen3("4B"), H200)
    assert made.settled().rollout.cache_gib * GIB == made.cache_bytes()
    given = Plan(paper("rollout.cache_gib=3"), qwen3("4B"), H200).settled()
    assert given.rollout.cache_gib == 3


@pytest.mark.parametrize(
    ("overrides", "name", "gib", "remedy"),
    [
        (["model.activation_checkpointing=false"], "1.7B", 80, 'checkpointing = "selective"'),
        (["model.activation_checkpointing=false"], "1.7B", 60, "checkpointing = true"),
        (["batch.max_tokens=300000"], "4B", 120, "fits with batch.max_tokens = "),
        (["rollout.cache_gib=60"], "4B", 120, 'fits with rollout.cache_gib = "auto"'),
        (["rollout.max_rows=8192"], "0.6B", 60, "fits with rollout.max_rows = "),
        (["model.dtype=float32", "batch.max_tokens=18000"], "8B", 60, "a larger device"),
        ([], "8B", 80, "a smaller model"),
        (["batch.max_tokens=16384"], "4B", 80, 'fits with model.optimizer_state = "short"'),
        (["batch.max_tokens=16384"], "8B", 141, 'fits with model.optimizer_state = "short"'),
        (["model.activation_checkpointing=false"], "4B", 70, "true, model.optimizer_state"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(overrides, name, gib, remedy):
    config, target = paper(*overrides), Target("cuda", "native", gib * GIB, gib * GIB)
    with pytest.raises(ValueError, match="the run does not fit") as caught:
        Plan(config, qwen3(name), target).settled()
    assert remedy in str(caught.value)
    for line in str(caught.value).splitlines():
        if "fits with batch" in line or "fits with rollout.max" in line:
            word = line.strip().removeprefix("fits with ").replace(" ", "")
            Plan(paper(*overrides, word), qwen3(name), target).settled()


def test_4b_fits_80_gb_beside_vllm_with_split_masters():
    target = Target("cuda", "vllm", 80 * GIB, 80 * GIB)
    made = Plan(paper("batch.max_tokens=16384"), qwen3("4B"), target)
    assert made.remedies() == ['fits with model.optimizer_state = "split"']


def test_free_memory_decides_not_the_size_of_the_card():
    crowded = H200._replace(free=60 * GIB)
    with pytest.raises(ValueError, match=r"of 139.0 GiB \(cuda\) 60.0 GiB are free"):
        Plan(paper(), qwen3("4B"), crowded).settled()


def test_automatic_checkpointing_recomputes_as_little_as_there_is_room_for():
    for gib, how in ((700, False), (200, "selective"), (90, True)):
        target = Target("cuda", "native", gib * GIB, 5 * GIB)
        made = Plan(paper("model.activation_checkpointing=auto"), qwen3("4B"), target)
        assert made.config.model.activation_checkpointing == how
        # Half of the keys and values that there would be, or more.
        most = made.changed("model.activation_checkpointing", True).cache_bytes()
        assert made.cache_bytes() >= most / 2


def test_state_per_parameter_of_what_keeps_less():
    def state(num, *words):
        made = Plan(paper(*words), qwen3("4B"), H200._replace(ranks=num))
        found = sum(bytes_of(made, w).training for w in ("masters", "moments", "gradients"))
        return round(found / QWEN3["4B"][-1], 6)

    assert state(1, "model.optimizer_state=split") == 14
    assert state(1, "model.optimizer_state=short") == 10
    assert state(1, "ranks.gradients=dealt") == 16
    table = 151_936 * 2560 / QWEN3["4B"][-1]
    dealt = pytest.approx(16 / 4 + 4 * table, abs=1e-5)
    assert state(4, "ranks.gradients=dealt") == dealt
    words = ["ranks.gradients=dealt", "model.optimizer_state=short"]
    assert state(4, *words) == pytest.approx(10 / 4 + 4 * table, abs=1e-5)


def test_the_largest_batch_fits_and_the_next_does_not():
    made = Plan(paper("rollout.cache_gib=20"), qwen3("4B"), H200)
    tokens = made.largest_batch(20_480)
    assert made.changed("batch.max_tokens", tokens).fits()
    assert not made.changed("batch.max_tokens", tokens + 1024).fits()


def test_a_dry_run_plans_a_device_that_is_not_here(tmp_path, capsys):
    planned = ["model.device=cuda", "model.memory_gib=141", "model.dtype=bfloat16"]
    assert main([*arguments(tmp_path / "run", *planned), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Memory plan, cuda" in shown and "fits; keys and values" in shown
    assert "left of 133.9 GiB" in shown  # 95 % of 141


def test_a_dry_run_prints_the_verdict_and_a_run_refuses(tmp_path, capsys):
    small = ["model.memory_gib=0.3"]
    assert main([*arguments(tmp_path / "run", *small), "--dry-run"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(arguments(tmp_path / "run", *small)) == 2
    said = capsys.readouterr().err
    assert "the run does not fit" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_plan_of_this_machine_is_of_this_machine():
    config = cli.load(ROOT / "configs" / "quickstart.toml", SMALLER)
    target = plan.planned_target(config)
    assert (target.kind, target.engine) == ("cpu", "native")
    assert 0 < target.free <= target.total
