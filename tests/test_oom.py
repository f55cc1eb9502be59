"""Out of memory in any phase: named, with what to lower; nothing that was recorded is lost."""

import pytest
import torch
from small_run import Quiet
from test_learn import folder, weights_of  # noqa: F401
from test_parity import run_of  # noqa: F401
from test_train import arguments, config_of

from intfast import cli, rl
from intfast.checks import MAY_CHANGE
from intfast.engine.native import NativeEngine
from intfast.grading.grader import Grader
from intfast.state import checkpoint, oom
from intfast.state.metrics import Metrics
from intfast.state.runfolder import Journal, RunFolder
from intfast.train import main

SPOKEN = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]
PLACES = {
    "generate": (NativeEngine, "generate", 3, "rollout.max_rows"),
    "train": (rl, "update", 2, "model.activation_checkpointing"),
    "grade": (Grader, "grade_many", 2, "grade.workers"),
    "save": (checkpoint, "save", 2, "main memory"),
}

LOWERED = {
    "rollout.max_rows": "rollout.max_rows=64",
    "model.activation_checkpointing": "model.activation_checkpointing=true",
    "grade.workers": "grade.workers=1",
}


@pytest.mark.parametrize("advice", [*oom.KNOBS.values(), oom._ELSEWHERE])
def test_what_a_continued_run_may_not_change_is_said_to_need_a_new_folder(advice):
    here, _, elsewhere = advice.partition("in a new run folder")
    known = {path for path, *_ in cli.walk()}
    for text, may_change in ((here, True), (elsewhere, False)):
        named = {word.strip(",;:()") for word in text.split()} & known
        assert {name in MAY_CHANGE for name in named} <= {may_change}
    assert "rl.group_size" in known


def failing(function, call, error):
    """`function`, but for one call, which raises."""
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("phase", PLACES)
def test_the_phase_and_the_setting_are_named_and_the_run_continues(
    run_of,  # noqa: F811
    monkeypatch,
    phase,
):
    options = ("rl.steps=2", "rl.checkpoint_every=1")
    with run_of(*options, run="whole") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        expected, rows = weights_of(run), run.metrics.rows("base_rl")
    owner, name, call, setting = PLACES[phase]
    with monkeypatch.context() as patch, run_of(*options) as run:
        patch.setattr(owner, name, failing(getattr(owner, name), call, SPOKEN[0]))
        with pytest.raises(oom.OutOfMemory, match=f"out of memory in phase {phase}") as caught:
            rl.rl(run, "base_rl", "base", run.problems)
    assert setting in str(caught.value)
    assert "Tried to allocate 2.00 GiB." in str(caught.value) and "GPU 0" not in str(caught.value)
    # With the setting lowered it continues, and ends where the run without a fault did.
    lowered = LOWERED.get(setting, "rollout.cache_gib=0.05")
    with run_of(*options, lowered) as run:
        (row,) = run.metrics.rows("settings")
        assert list(row["changed"]) == [lowered.partition("=")[0]]
        rl.rl(run, "base_rl", "base", run.problems)
        assert all(torch.equal(weights_of(run)[key], expected[key]) for key in expected)
        again = run.metrics.rows("base_rl")
    assert [row["reward"] for row in again] == [row["reward"] for row in rows]


def test_out_of_memory_while_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("intfast.model.weights.load", failing(None, 1, SPOKEN[0]))
    assert main(arguments(tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "out of memory in phase load" in said and "smaller" in said


@pytest.mark.parametrize("error", SPOKEN, ids=lambda error: type(error).__name__)
def test_every_kind_of_it_is_known(tmp_path, error):
    metrics = Metrics(Journal(tmp_path / "m.jsonl", dict), Quiet())
    with pytest.raises(oom.OutOfMemory, match="in phase train: ") as caught, metrics.phase("train"):
        raise error
    assert caught.value.__cause__ is error


def test_it_is_explained_once_and_by_the_innermost_phase(tmp_path):
    metrics = Metrics(Journal(tmp_path / "m.jsonl", dict), Quiet())
    with (
        pytest.raises(oom.OutOfMemory) as caught,
        oom.explained("load"),
        metrics.phase("train"),
        metrics.phase("save"),
    ):
        raise MemoryError
    assert str(caught.value).startswith("out of memory in phase save of train: ")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, oom.explained("train"):
        raise error
    assert caught.value is error


def test_a_real_allocation_that_cannot_succeed_is_one(tmp_path):
    metrics = Metrics(Journal(tmp_path / "m.jsonl", dict), Quiet())
    with pytest.raises(oom.OutOfMemory, match="can't allocate memory"), metrics.phase("train"):
        torch.empty(2**60, dtype=torch.uint8)


def test_settings_that_matter_still_may_not_change(tmp_path):
    config = config_of(tmp_path / "run")
    RunFolder(config).__exit__()
    with RunFolder(config_of(tmp_path / "run", "batch.max_tokens=5000")) as run_folder:
        assert run_folder.changed == {"batch.max_tokens": (4096, 5000)}
    with RunFolder(config_of(tmp_path / "run", "batch.max_tokens=5000")) as run_folder:
        assert run_folder.changed == {}
    with pytest.raises(ValueError, match=r"sft.epochs: was 1, is 3"):
        RunFolder(config_of(tmp_path / "run", "batch.max_tokens=5000", "sft.epochs=3"))
