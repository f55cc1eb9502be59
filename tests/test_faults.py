"""Faults from outside: requests to stop, stuck phases, a full disk, other inputs on the way."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.reliability import bed
from intfast import cli, collect, pipeline, rl, sft
from intfast.sample import _Drawn
from intfast.state import checkpoint, files, identity, interrupt
from intfast.state.runfolder import RunFolder
from intfast.train import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an undisturbed run comes to."""
    folder = tmp_path_factory.mktemp("faults")
    bed.prepare(folder, 0)
    assert main(bed.words(folder, "run")) == 0
    return bed.outcome(folder / "run")


@pytest.fixture
def words(tmp_path):
    """The command line of that run, in a folder of its own."""
    bed.prepare(tmp_path, 0)
    return bed.words(tmp_path, "run")


def send_at(monkeypatch, owner, name, call, number):
    """Send this process a signal at the call-th call of owner.name."""
    original, calls = getattr(owner, name), []

    def sending(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, sending)


# --- requests to stop --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "call", "number", "code"),
    [
        (_Drawn, "end", 9, signal.SIGINT, 130),
        (sft, "update", 2, signal.SIGHUP, 129),
        (rl, "draw", 2, signal.SIGTERM, 143),
    ],
)
def test_a_stopped_run_says_so_saves_and_continues_to_the_same_result(
    expected, words, tmp_path, monkeypatch, capfd, owner, name, call, number, code
):
    with monkeypatch.context() as patched:
        send_at(patched, owner, name, call, number)
        assert main(words) == code
    said = capfd.readouterr()
    assert f"stopped by {signal.Signals(number).name}; the same command continues" in said.err
    if (owner, name) == (rl, "draw"):
        assert "step 1 is saved" in said.out
    assert main(words) == 0
    assert "first new result" in capfd.readouterr().out
    assert bed.outcome(tmp_path / "run") == expected


def test_a_stop_before_the_first_step_does_not_speak_of_a_saved_one(words, monkeypatch, capfd):
    send_at(monkeypatch, rl, "draw", 1, signal.SIGTERM)
    assert main(words) == 143
    said = capfd.readouterr().out
    assert "stopped; no step was finished" in said and "is saved" not in said


def test_a_stop_breaks_generation_off_between_two_tokens(words, monkeypatch):
    from intfast.engine.generation import Generation

    steps = []
    step = Generation._step

    def counted(self):
        steps.append(1)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Generation, "_step", counted)
    assert main(words) == 143
    assert len(steps) == 20


def test_outside_of_the_command_line_signals_are_not_touched(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with interrupt.handling():
        assert signal.getsignal(signal.SIGINT) is not before
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(interrupt.Stopped):
            interrupt.check()
        # The system's own action, which no code that hangs can hold up.
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    with interrupt.handling():
        interrupt.check()


def child(code: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_second_interrupt_leaves_at_once():
    process = child(
        "from intfast.state import interrupt\nimport time\n"
        "with interrupt.handling():\n    print('up', flush=True)\n    time.sleep(60)"
    )
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    # The request is answered on stderr, so that the second one cannot overtake it.
    assert process.stderr.readline() == b"\n" and b"Ctrl-C leaves" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


# --- a stuck phase -----------------------------------------------------------------------------

STUCK = """
import sys, time
from pathlib import Path
from intfast.state import interrupt, watchdog
with watchdog.Watchdog(0.2, Path(sys.argv[1])):
    for _ in range(10):
        time.sleep(0.1)
        interrupt.beat()
    with interrupt.phase("generate"):
        def asleep():
            {stuck}
        asleep()
"""


def test_the_watchdog_names_the_phase_and_dumps_all_stacks(tmp_path):
    path = tmp_path / "watchdog.txt"
    process = child(STUCK.format(stuck="time.sleep(60)"), str(path))
    _, said = process.communicate()
    assert process.returncode == 124
    for text in (said.decode(), path.read_text()):
        assert "in phase 'generate'" in text and "in asleep" in text


def test_the_watchdog_ends_code_that_never_yields_to_its_thread(tmp_path):
    # A regular expression that backtracks for years holds the interpreter's lock all the time.
    path = tmp_path / "watchdog.txt"
    process = child(STUCK.format(stuck="__import__('re').match('(a+)+b', 'a' * 60)"), str(path))
    _, said = process.communicate()
    assert process.returncode == -signal.SIGABRT
    assert b"no thread could run" in said and b"in asleep" in said
    assert "in phase" in path.read_text()


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_process_that_was_stopped_goes_on(tmp_path, whole_group):
    """Ctrl-Z stops the guard as well, a scheduler's SIGSTOP the process alone."""
    code = STUCK.format(stuck="print('up', flush=True); time.sleep(0.5)").replace("(0.2", "(1.0")
    words = [sys.executable, "-c", code, str(tmp_path / "watchdog.txt")]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    send = os.killpg if whole_group else os.kill
    assert process.stdout.readline() == b"up\n"
    send(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    send(process.pid, signal.SIGCONT)
    assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_a_stop_does_not_hide_that_a_process_is_stuck(tmp_path):
    code = STUCK.format(stuck="print('up', flush=True); time.sleep(60)")
    process = child(code, str(tmp_path / "watchdog.txt"))
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    assert b"in phase 'generate'" in process.communicate()[1] and process.returncode == 124


def test_a_run_that_lives_is_left_alone(tmp_path):
    code = STUCK.format(stuck="pass")
    process = child(code, str(tmp_path / "watchdog.txt"))
    assert (process.communicate()[1], process.returncode) == (b"", 0)
    assert not list(tmp_path.iterdir())


# --- the disk ----------------------------------------------------------------------------------


class FullDisk:
    """`os` for files.py, whose k-th operation that needs the disk fails, and all after it."""

    NEEDS_DISK = ("open", "write", "fsync", "rename", "mkdir")

    def __init__(self, fail_at: int, code: int = errno.ENOSPC) -> None:
        self.left, self.code = fail_at, code

    def __getattr__(self, name):
        if name in self.NEEDS_DISK:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))
        return getattr(os, name)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((64, 5), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_save_that_fails_at_any_operation_leaves_the_last_good_one(tmp_path, monkeypatch, code):
    for k in range(100):
        stage = tmp_path / str(k)
        checkpoint.save(stage, 1, state(1), {"cursor": 1})
        monkeypatch.setattr(files, "os", FullDisk(k, code))
        try:
            checkpoint.save(stage, 2, state(2), {"cursor": 2})
        except RuntimeError as error:
            assert "cannot write" in str(error) and str(stage) in str(error)
            failed = True
        else:
            failed = False
        monkeypatch.setattr(files, "os", os)
        step, tensors, kept = checkpoint.latest(stage, pytest.fail)
        assert (kept["cursor"], tensors["w"][0, 0].item()) == (step, step)
        # The rename publishes; only the sync after it can fail with the new one in place.
        assert step == 2 or failed
        if not failed:
            break
        checkpoint.save(stage, 3, state(3), {"cursor": 3})
        assert checkpoint.latest(stage, pytest.fail)[0] == 3
    assert k > 10


def test_a_full_disk_at_any_moment_ends_the_run_with_the_remedy(
    expected, words, tmp_path, monkeypatch, capsys
):
    ends = []
    at = 30
    while not ends or ends[-1] != 0:
        monkeypatch.setattr(files, "os", FullDisk(at))
        ends.append(main(words))
        monkeypatch.setattr(files, "os", os)
        said = capsys.readouterr().err
        assert ends[-1] == 0 or ("cannot write" in said and "free some space" in said)
        at += 61
    assert ends[:-1] == [1] * (len(ends) - 1) and len(ends) > 3
    assert bed.outcome(tmp_path / "run") == expected


def test_no_file_of_a_run_is_written_past_the_guarded_functions():
    """What writes elsewhere would not be atomic, and its failure would be a traceback."""
    calls = ("write_text(", "write_bytes(", "save_file(", '.open("w', '.open("a', 'open("wb')
    allowed = {
        "state/watchdog.py": "a heartbeat that nothing reads back",
        "state/runfolder.py": "the lock file, which stays empty",
    }
    for path in sorted((ROOT / "intfast").rglob("*.py")):
        name = path.relative_to(ROOT / "intfast").as_posix()
        if name not in allowed:
            text = path.read_text()
            assert not [call for call in calls if call in text], name


# --- checkpoints -------------------------------------------------------------------------------


def test_an_edited_or_foreign_manifest_is_seen(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), {})
    first, second = (tmp_path / f"step-{n:06d}" for n in (1, 2))
    path = second / "manifest.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    for edited in (
        b"{}",
        b"[]",
        b"\xff",
        json.dumps(content | {"files": {}}).encode(),
        json.dumps(content | {"step": 3}).encode(),
        json.dumps(content | {"format": 2}).encode(),
        whole[:-1],
        (first / "manifest.json").read_bytes(),
    ):
        path.write_bytes(edited)
        assert checkpoint.verify(second) and not checkpoint.verify(first)
    path.write_bytes(whole)
    assert not checkpoint.verify(second)
    shutil.copy(first / "state.json", second)
    shutil.copy(first / "tensors.safetensors", second)
    assert "digest" in checkpoint.verify(second)
    first.rename(tmp_path / "step-000007")
    assert "another checkpoint" in checkpoint.verify(tmp_path / "step-000007")


def test_deletes_that_fail_and_damaged_ones_never_cost_the_last_good_one(tmp_path, monkeypatch):
    import random

    rng = random.Random(0)
    remove = files.remove
    monkeypatch.setattr(files, "remove", lambda path: rng.random() < 0.5 and remove(path))
    kept_outside = tmp_path / "step-mine"
    kept_outside.mkdir()
    step = 0
    for _ in range(60):
        if rng.random() < 0.3 and (newest := checkpoint.newest(tmp_path, str)):
            (newest / "tensors.safetensors").write_bytes(b"damaged")
        found = checkpoint.latest(tmp_path, str)
        step = (found[0] if found else 0) + rng.randint(1, 3)
        checkpoint.save(tmp_path, step, state(step), {"cursor": step})
        assert checkpoint.latest(tmp_path, pytest.fail)[0] == step
    assert kept_outside.is_dir()


# --- other inputs ------------------------------------------------------------------------------


@pytest.fixture
def started(words, tmp_path, monkeypatch):
    """The words of a run that was stopped before its first attempts, with a model of its own."""
    shutil.copytree(bed.MODEL, tmp_path / "base")
    words.append(f"model.path={tmp_path / 'base'}")
    with monkeypatch.context() as patched:
        send_at(patched, collect, "attempts", 1, signal.SIGTERM)
        assert main(words) == 143
    return words


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("train.jsonl", b'"answer": "', b'"answer": "9', "train hash"),
        ("base/config.json", b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05', "config.json"),
        ("base/tokenizer_config.json", b"{", b'{"x": 1, ', "tokenizer_files tokenizer_config.json"),
        ("base/model.safetensors", None, None, "model_files model.safetensors"),
    ],
)
def test_a_run_is_not_continued_with_other_inputs(
    started, tmp_path, capsys, name, old, new, message
):
    path = tmp_path / name
    if old is None:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    else:
        edit(path, old, new)
    assert main(started) == 2
    said = capsys.readouterr().err
    assert message in said and "use another run=FOLDER" in said


def test_a_large_file_is_told_from_another_by_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "BLOCK_BYTES", 10)
    path = tmp_path / "x"
    path.write_bytes(bytes(5000))
    before = identity._digest(path)
    for place in (0, 4999):
        data = bytearray(5000)
        data[place] = 1
        path.write_bytes(data)
        assert identity._digest(path) != before
    path.write_bytes(bytes(5001))
    assert identity._digest(path) != before


def test_only_the_watchdog_may_change_in_a_run(tmp_path):
    def config(*more):
        return cli.load(None, ['data.train="x"', f"run={tmp_path / 'run'}", *more])

    RunFolder(config()).__exit__()
    RunFolder(config("watchdog_s=7")).__exit__()
    with pytest.raises(ValueError, match="seed: was 0, is 1"):
        RunFolder(config("seed=1"))


def test_a_continued_run_says_what_the_interruption_cost(words, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        send_at(patched, pipeline, "sft", 1, signal.SIGTERM)
        assert main(words) == 143
    before = time.time()
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "since_last_write_s" in row]
    assert (row["stage"], row["step"]) == ("int", 2)
    assert 0 < row["since_start_s"] <= row["since_last_write_s"] < time.time() - before + 60
    assert len(json.loads((tmp_path / "run/manifest.json").read_text())["starts"]) == 2
