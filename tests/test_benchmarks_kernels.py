"""The kernel benchmark: its cost card, its gate, its peers and one run on a CPU."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import costs, harness, kernel_cases, kernels, peers, timing
from benchmarks.kernel_cases import Case, Variant


def arguments(*words):
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    kernels.add_arguments(parser)
    fixed = ["--device", "cpu", "--rounds", "2", "--warmup", "1", "--shapes", "small"]
    return parser.parse_args([*words, *fixed])


def test_floors_equal_the_table_of_the_h200():
    """ms of Qwen3-4B's head at 790 TFLOP/s: forward, both gradients, logits made twice."""
    roof = costs.roof("NVIDIA H200")
    shape = (16_384, 2560, 151_936)
    floors = [
        costs.head_forward(*shape),
        costs.head_step(*shape),
        costs.head_step(*shape, products=4),
    ]
    found = [1e3 * cost.floor_seconds(roof) for cost in floors]
    assert found == pytest.approx([16.13, 48.40, 64.53], abs=0.01)
    assert costs.head_step(*shape).bytes == pytest.approx(2.59e9, rel=0.01)
    # With 327 rows and an fp32 gradient the bytes decide.
    few = costs.head_step(327, 2560, 151_936, dw=costs.ADDED)
    assert few.floor_seconds(roof) == few.bytes / roof.bytes
    assert costs.roof("an unknown device") is None


def test_cases_cover_the_shapes_and_shares():
    full = kernel_cases.cases(list(kernel_cases.OPS), "full")
    assert len(full) == len(set(full))
    dense = {(c.rows, c.hidden, c.vocabulary) for c in full if c.share == 1 and c.vocabulary}
    assert len(dense) == 27
    sparse = {(c.rows, c.share, c.live) for c in full if c.share < 1}
    assert (16_384, 0.05, 819) in sparse and (65_536, 0.02, 1311) in sparse
    assert full[0].op == "group_advantages" and full[0].rows == 512


@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_each_op_runs_on_a_cpu(op):
    rows = list(kernels.run(arguments(op)))
    for row in rows:
        assert row["setting"]["op"] == op
        for name, entry in row["figures"].items():
            assert "status" not in entry, (name, entry)
            assert not any(key.endswith(("_ms", "_mb")) for key in entry)
            assert name == "intfast" or entry["hot_intfast_times_as_fast"]["p50"] > 0
    assert {"intfast", "eager"} <= rows[0]["figures"].keys()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_variant_gets_no_figures(index):
    case = Case("span_cross_entropy", 40, 16, 50)
    op = kernel_cases.OPS[case.op]
    data = op.inputs(case, "cpu", 0)
    truth = op.truth(case, data)
    right = kernel_cases.variants(case, ())[0]

    def spoil(data, main):
        step = right.build(data, main)

        def wrong():
            found = list(step())
            found[index] = found[index] * 1.05
            return tuple(found)

        return wrong

    def raises(data, main):
        raise ImportError("a broken package\nwith details")

    figures = {}
    steps = kernels._gated(
        [right, Variant("wrong", spoil, ours=True), Variant("broken", raises)],
        data, False, truth, figures, "cpu",
    )  # fmt: skip
    assert list(steps) == ["intfast"]
    assert figures["wrong"]["status"].startswith("WRONG")
    assert figures["broken"]["status"] == "ImportError: a broken package"


def test_pytest_benchmark_runs_the_same_cases_and_compares(tmp_path):
    words = ["benchmarks", "--benchmark-only", "-k", "group_advantages", "--device", "cpu"]
    words += ["--shapes", "small", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    words += [f"--benchmark-storage={tmp_path}", f"--benchmark-json={tmp_path / 'all.json'}"]

    # A process of its own, also where this one is a worker of pytest-xdist.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}

    def pytest_of(*more):
        return subprocess.run(
            [sys.executable, "-m", "pytest", *words, *more], cwd=Path(__file__).parents[1],
            env=env, capture_output=True, text=True,
        )  # fmt: skip

    done = pytest_of("--benchmark-save=before")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "all.json").read_text())["benchmarks"]
    label = "group_advantages-64"
    assert {row["name"] for row in rows} == {
        f"test_kernel[{label}-{name}]" for name in ("intfast", "eager")
    }
    assert all(row["extra_info"]["errors"]["value"] < 1e-3 for row in rows)
    assert {row["group"] for row in rows} == {label}
    assert "before" in pytest_of("--benchmark-compare=0001").stdout


def test_nan_is_wrong():
    truth = (torch.tensor(1.0), torch.ones(2, 2), torch.ones(3, 2))
    bad = truth[2].clone()
    bad[1, 1] = float("nan")
    assert kernels._errors((truth[0], truth[1], bad), truth)["gradient"] != 0
    assert not kernels._errors((truth[0], truth[1], bad), truth)["gradient"] <= 1


def test_peers_say_what_is_missing():
    absent = peers.Peer("absent", lambda: None, "no_such_module", "pip install absent")
    assert absent.missing("cpu") == "not installed: pip install absent"
    needs_gpu = peers.Peer("gpu", lambda: None, "torch", gpu_only=True)
    assert needs_gpu.missing("cpu") == "needs a CUDA device"
    assert needs_gpu.missing("cuda") is None
    assert next(p for p in peers.LOGPROB if p.name == "eager").missing("cpu") is None


def test_turns_alternate_and_drop_the_warmup():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    sample = timing.Sample("cpu", rounds=2, warmup=1, cold=True)
    seconds = timing.in_turns(steps, sample)
    assert calls == list("baabba")
    assert [len(values) for values in seconds.values()] == [2, 2]
