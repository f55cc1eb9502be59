"""The trainer on a CUDA device that is not there: no mixed devices, few waits for it."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from small_run import MODEL, Quiet, words, write_inputs
from torch.nn.attention.varlen import varlen_attn

from benchmarks import traffic
from benchmarks.fake_cuda import FakeCuda
from benchmarks.quickstart_task import base
from intfast import cli, loss, pipeline, rl, sft
from intfast.batch import Batch
from intfast.config import ModelConfig
from intfast.engine import sampler
from intfast.engine.generation import Generation
from intfast.model.decoder import Architecture, Decoder, PackedAttention
from intfast.run import open_run

ROOT = Path(__file__).parents[1]
KERNELS = get_args(get_type_hints(ModelConfig)["kernels"])
CUDA = ["model.device=cuda", "rollout.engine=native", "model.kernels=torch"]
RL = ["rl.steps=2", "rl.problems_per_step=2", "rl.group_size=4", "evaluate.samples=2"]
CASES = {
    "grpo, KL, minibatches, checkpointing": [
        "rl.policy.kl=0.01", "rl.minibatches=2", "model.activation_checkpointing=true",
    ],
    "gspo, correction of sequences, sleep": [
        "rl.policy.objective=gspo", "rl.policy.correction=truncate", "rollout.sleep=true",
        "rl.policy.correction_level=sequence", "model.activation_checkpointing=true",
    ],
    "cispo, entropy": ["rl.policy.objective=cispo", "rl.policy.entropy=0.01"],
    "reinforce, correction by masks": [
        "rl.policy.objective=reinforce", "rl.policy.correction=mask",
    ],
    "fp32": ["model.dtype=float32"],
    "fused kernels, checkpointing": ["model.kernels=fused", "model.activation_checkpointing=true"],
    "selective checkpointing": [
        "model.activation_checkpointing=selective", "model.kernels=fused",
    ],
}  # fmt: skip
# The short form of the quickstart with less of everything, every stage of it.
QUICKSTART = [
    "data.train_limit=4", "data.test_limit=2", "attempts.samples=2", "attempts.max_problems=4",
    "evaluate.samples=2", "evaluate.ks=[1,2]", "intervene.continuations=2", "intervene.wave=2",
    "sft.epochs=1", "rl.steps=1", "rl.from_base=false", "rl.problems_per_step=2", "rl.group_size=4",
]  # fmt: skip
LIMITS = {"update": 2, "step": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class Watch:
    """Waits of the host in every update and every decode step of a run, by kind and line."""

    def __init__(self, device, monkeypatch):
        self.device = device
        self.seen = {"update": [], "step": []}
        for module in (rl, sft):
            monkeypatch.setattr(module, "update", self.watched(module.update, "update"))
        monkeypatch.setattr(Generation, "_step", self.watched(Generation._step, "step"))

    def watched(self, function, name):
        def call(*args):
            before = Counter(self.device.waits)
            found = function(*args)
            self.seen[name].append(self.device.waits - before)
            return found

        return call

    def check(self):
        """At most LIMITS waits in each; the loop around the steps looks once a step."""
        assert all(self.seen.values())
        looks = sum(
            count
            for (_, place), count in self.device.waits.items()
            if place.endswith("Generation.run")
        )
        for name, found in self.seen.items():
            once = looks / len(found) if name == "step" else 0
            for waits in found:
                assert waits.total() + once <= LIMITS[name], (name, once, waits)


def train(settings, monkeypatch, config=None):
    """All stages on the device, with rewards 0, 1, 0, 1 ..., so that RL learns; the rows of RL."""

    def rewards(groups):
        return [[float(i % 2) for i, _ in enumerate(group)] for group in groups]

    monkeypatch.setattr(rl, "rewards", rewards)
    with FakeCuda() as device:
        watch = Watch(device, monkeypatch)
        with open_run(cli.load(config, settings), Quiet()) as run:
            assert run.decoder.head_weight_VD.is_cuda
            pipeline.train(run)
            rows = [row for name in ("base_rl", "int_rl") for row in run.metrics.rows(name)]
    assert (run.folder.path / "export/model.safetensors").is_file()
    return watch, rows


@pytest.mark.parametrize("case", CASES)
def test_rl(folder, tmp_path, monkeypatch, case):
    settings = [*words(folder, tmp_path / "run", 6), "model.dtype=bfloat16", *CUDA, *RL]
    # Micro-batches of two sequences or so: waits must not grow with their number.
    watch, rows = train([*settings, "batch.max_tokens=64", *CASES[case]], monkeypatch)
    watch.check()
    assert len(rows) == 2
    assert all(row["updates"] and not row["skipped"] and row["grad_norm"] > 0 for row in rows)


def test_the_quickstart_in_bf16(tmp_path, monkeypatch):
    settings = ["model.dtype=bfloat16", *CUDA, *QUICKSTART, f"run={tmp_path / 'run'}"]
    monkeypatch.chdir(ROOT)
    watch, rows = train(settings, monkeypatch, "configs/quickstart_short.toml")
    watch.check()
    assert rows


# Liger's kernels are launched outside of any operator, so there is no twin of them.
@pytest.mark.parametrize("kernels", sorted(set(KERNELS) - {"auto", "liger"}))
def test_a_decoder_waits_for_nothing(kernels):
    config = Architecture.from_hf(MODEL)
    found = []
    for kind in ("cpu", "cuda"):
        with FakeCuda() as device:
            decoder = Decoder(config, torch.float32, kind, kernels if kind == "cuda" else "torch")
            base.initialise(decoder, 0)
            decoder.activation_checkpointing = True
            token_T = torch.arange(5).pin_memory().to(kind, non_blocking=True)
            device.waits.clear()
            out = decoder(token_T, token_T, PackedAttention([5], kind))
            out.square().sum().backward()
            assert not device.waits
            found.append([out, *(p.grad for p in decoder.parameters())])
            found[-1] = [x.detach().cpu() for x in found[-1]]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)


# --- each of these checks can fail -------------------------------------------------------------


def plant(folder, tmp_path, monkeypatch):
    """A run of one RL step on the device, checked."""
    settings = [*words(folder, tmp_path / "run", 4), "model.dtype=bfloat16", *CUDA, *RL]
    watch, _ = train([*settings, "rl.steps=1"], monkeypatch)
    watch.check()


def test_a_look_at_every_micro_batch_is_counted(folder, tmp_path, monkeypatch):
    merge = loss.merge_stats

    def looking(total, stats):
        assert stats["loss_sum"].item() < 1e9
        return merge(total, stats)

    monkeypatch.setattr(loss, "merge_stats", looking)
    with pytest.raises(AssertionError, match=r"update'.*look.*update.py:\d+ update"):
        plant(folder, tmp_path, monkeypatch)


def test_a_look_in_a_decode_step_is_counted(folder, tmp_path, monkeypatch):
    draw = sampler.draw

    def looking(logit_BV, *rest):
        assert logit_BV.isfinite().all()
        return draw(logit_BV, *rest)

    monkeypatch.setattr(sampler, "draw", looking)
    # The second step of a shape is captured, and nothing under capture may wait.
    with pytest.raises(RuntimeError, match=r"look at .*generation.py:\d+ Generation._decode: not"):
        plant(folder, tmp_path, monkeypatch)


def test_copies_that_wait_are_counted_per_micro_batch(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    with pytest.raises(AssertionError, match=r"update'.*copy from the host"):
        plant(folder, tmp_path, monkeypatch)


def test_a_tensor_left_on_the_cpu_is_refused(folder, tmp_path, monkeypatch):
    def left_behind(batch):
        attend = PackedAttention(batch.lengths, "cuda")
        return batch.token_ids_T, batch.position_ids_T.cpu(), attend, batch.rows_N

    monkeypatch.setattr(Batch, "inputs", left_behind)
    with pytest.raises(RuntimeError, match=r"expected all tensors on one device, got.* on cpu"):
        plant(folder, tmp_path, monkeypatch)


def test_a_head_size_that_flash_attention_refuses():
    qkv = torch.randn(3, 5, 2, 20, dtype=torch.bfloat16)
    with FakeCuda() as device, pytest.raises(AssertionError, match="head size 20"):
        starts = device.tensor(torch.tensor([0, 5], dtype=torch.int32))
        varlen_attn(*device.tensor(qkv), starts, starts, 5, 5, window_size=(-1, 0))


@pytest.mark.parametrize(("action", "kind"), [
    (lambda x: x.sum().item(), "look"),
    (lambda x: bool(x.any()), "look"),
    (lambda x: x.tolist(), "look"),
    (lambda x: x.cpu(), "copy to the host"),
    (lambda x: x[x > 0], "unknown length"),
    (lambda x: x[torch.tensor([0])], "index on the host"),
    (lambda x: torch.zeros(2).copy_(x), "copy to the host"),
    (lambda x: torch.tensor([1.0], device=x.device), "copy from the host"),
    (lambda x: torch.ones(2).to("cuda"), "copy from the host"),
    (lambda x: torch.ones(2).to(x), "copy from the host"),
    (lambda x: torch.ones(2).to("cuda", non_blocking=True), "copy from the host"),
    (lambda x: x.repeat_interleave(x.long()), "unknown length"),
    (lambda x: torch.cuda.synchronize(), "synchronize"),
    (lambda x: x.nonzero(), "unknown length"),
    (lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True), None),
    (lambda x: x.repeat_interleave(x.long(), output_size=3), None),
    (lambda x: x * 2 + torch.zeros_like(x) + torch.ones((), dtype=x.dtype), None),
])  # fmt: skip
def test_waits(action, kind):
    with FakeCuda() as device:
        x = device.tensor(torch.tensor([1.0, 2.0]))
        action(x)
    assert [kind for kind, _ in device.waits.elements()] == ([kind] if kind else [])
    assert not torch.cuda.is_available()


def test_the_twins_of_attention_are_those_of_the_cpu():
    torch.manual_seed(0)
    qkv = [torch.randn(9, heads, 16).bfloat16() for heads in (4, 2, 2)]
    upstream = torch.randn(9, 4, 16).bfloat16()
    for window in (None, 2):
        found = []
        for device in (None, FakeCuda()):
            with device or nullcontext():
                leaves = [(device.tensor(x) if device else x.float()) for x in qkv]
                leaves = [x.requires_grad_() for x in leaves]
                attend = PackedAttention([2, 7], "cuda" if device else "cpu")
                out = attend(0, *leaves, window)
                out.backward(device.tensor(upstream) if device else upstream.float())
                found.append([x.detach().cpu().float() for x in (out, *(x.grad for x in leaves))])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=2e-2)


def test_bytes_and_launches():
    with FakeCuda(counting=True) as device:
        x = torch.zeros(10, device="cuda")
        y = x + 1
        y.add_(x)
        y.copy_(x)
        x.view(2, 5).T.contiguous()
        torch.empty(100, device="cuda")
    names = {"zeros": 40, "add": 80, "add_": 120, "copy_": 80, "clone": 80}
    assert [(launch.name, launch.bytes) for launch in device.launches][-4:] == [
        (name, size) for name, size in names.items() if name != "zeros"
    ]


def test_the_traffic_of_a_layer():
    tokens, width = 512, 9728
    found = traffic.traffic("torch", tokens)
    # silu reads and writes one half of the projection, in two bytes each.
    assert found.bytes_by_operator["silu"] == 2 * 2 * width
    assert found.bytes == pytest.approx(found.forward_bytes + found.backward_bytes)
    # A layer twice as wide moves about twice as much in as many launches.
    wide = traffic.traffic("torch", tokens, hidden_size=5120, intermediate_size=2 * width)
    assert wide.forward_launches == found.forward_launches
    assert 1.5 < wide.bytes / found.bytes < 2


def test_the_fused_kernels_move_a_fifth_of_the_bytes():
    tokens, width, hidden, query, key = 512, 9728, 2560, 4096, 1024
    found = traffic.traffic("fused", tokens)
    assert found.bytes <= 0.4e6 and found.bytes < 0.2 * traffic.traffic("torch", tokens).bytes
    # In numbers of two bytes: norms with and without a sum before them and the sum after the layer;
    # heads with the angles of half a head, twice; the gate.
    forward = (4 + 2 + 3) * hidden + 2 * (query + key) + 128 + 3 * width
    # The gradients of values are copied into the projection's.
    backward = 2 * 4 * hidden + 3 * (query + key) + 2 * key + 128 + 5 * width
    # Weights and the scales of the norms come on top.
    assert 2 * forward <= found.forward_bytes <= 2 * forward + 60
    assert 2 * backward <= found.backward_bytes <= 2 * backward + 100
    assert (found.forward_launches, found.backward_launches) == (5, 4)
