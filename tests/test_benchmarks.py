"""The benchmarks run, check before they time, and stamp what they store."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import engine, harness
from intfast.engine.native import NativeEngine

SMALL = {
    "engine": ["--batch", "4", "--samples", "2", "--prompt", "10", "--new", "4", "--mixed"],
    "training_step": ["--sequences", "3", "--length", "20"],
}


def run(monkeypatch, folder, name, *more):
    argv = [name, "--device", "cpu", "--rounds", "2", "--warmup", "1", *SMALL[name], *more]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *argv, "--results", str(folder)])
    command.main()
    return [json.loads(line) for line in (folder / "cpu.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SMALL)
def test_a_cpu_row_holds_ratios_and_a_stamp_but_no_times(monkeypatch, tmp_path, capsys, name):
    (row,) = run(monkeypatch, tmp_path, name)
    assert row["benchmark"] == name
    assert {"commit", "dirty", "command", "device", "threads", "torch", "time"} <= row.keys()
    assert row["arguments"]["seed"] == 0
    assert row["figures"]
    for figure, values in row["figures"].items():
        assert figure.startswith("speedup_over_transformers")
        assert 0 < values["p20"] <= values["p50"] <= values["p80"]
    assert str(tmp_path) not in json.dumps(row["arguments"])
    assert "not GPU figures" in capsys.readouterr().out
    assert len(run(monkeypatch, tmp_path, name)) == 2


def test_every_benchmark_explains_itself(monkeypatch, capsys):
    names = [module.NAME for module in command.BENCHMARKS]
    assert set(SMALL) <= set(names) and len(set(names)) == len(names)
    for name in names:
        monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            command.main()
        assert "--rounds" in capsys.readouterr().out


def test_nothing_is_timed_when_the_two_sides_differ(monkeypatch, tmp_path):
    generate = NativeEngine.generate

    def wrong(*args):
        found = generate(*args)
        found[0][0].logprobs[0] += 0.01
        return found

    monkeypatch.setattr(engine.NativeEngine, "generate", wrong)
    with pytest.raises(RuntimeError, match=r"largest difference.*no time is reported"):
        run(monkeypatch, tmp_path, "engine")
    assert not (tmp_path / "cpu.jsonl").exists()


def test_a_gate_is_shut_for_nan():
    harness.gate("equal", 1.0, 1.0)
    for error in (1.01, math.nan):
        with pytest.raises(RuntimeError, match=r"apart: .* is above 1"):
            harness.gate("apart", error, 1.0)


@pytest.mark.parametrize(("device", "threads", "is_cpu_time"), [
    ("cpu", 1, True), ("cpu", 0, False), ("cpu", 2, False),
])  # fmt: skip
def test_one_thread_is_timed_in_cpu_seconds(monkeypatch, device, threads, is_cpu_time):
    monkeypatch.setattr(harness.time, "process_time", iter(range(0, 99, 7)).__next__)
    monkeypatch.setattr(harness.time, "perf_counter", iter(range(0, 99, 3)).__next__)
    args = SimpleNamespace(warmup=0, rounds=2, device=device, threads=threads)
    assert harness.times({"a": int}, args) == {"a": [7, 7] if is_cpu_time else [3, 3]}


def test_variants_take_turns_and_warm_up_is_left_out():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    args = SimpleNamespace(warmup=1, rounds=3, device="cpu", threads=0)
    seconds = harness.times(variants, args)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_percentiles_and_ratios_are_taken_round_by_round():
    assert harness.percentiles([1.0, 2.0, 3.0, 4.0, 6.0]) == {"p20": 1.8, "p50": 3.0, "p80": 4.4}
    seconds = {"peer": [2.0, 30.0, 8.0], "ours": [1.0, 10.0, 4.0]}
    found = harness.figures(seconds, "ours", "cpu")
    assert found == {"speedup_over_peer": {"p20": 2.0, "p50": 2.0, "p80": 2.6}}


def test_on_a_gpu_times_are_stored():
    seconds = {"peer": [0.002], "ours": [0.001]}
    found = harness.figures(seconds, "ours", "cuda:0")
    assert found["ours_ms"]["p50"] == 1.0 and found["peer_ms"]["p50"] == 2.0
