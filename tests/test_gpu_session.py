"""A bounded session: none of its steps stops the next, and its checks can fail."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import checks, group, stage, steps
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.session import Session, Step, python


@pytest.fixture
def session(tmp_path):
    return Session("title", 60, tmp_path / "out", tmp_path / "work")


def summary(session):
    return (session.out / "summary.txt").read_text()


def step(name, code, limit=20):
    return Step(name, limit, python("-c", code))


def is_alive(pid):
    # A zombie has ended; whose child it was may not have asked.
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# --- steps -------------------------------------------------------------------------------------


def test_a_step_over_its_limit_is_killed_with_its_children_and_the_next_runs(session, tmp_path):
    file = tmp_path / "pid"
    stubborn = (
        "import signal, subprocess, sys, time, pathlib\n"
        "[signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGABRT)]\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))\n"
        "print('CHECK one ok', flush=True)\n"
        "time.sleep(99)\n"
    )
    assert not session.run(step("stubborn", stubborn, limit=4))
    assert "== stubborn: TIME LIMIT\n   CHECK one ok" in summary(session)
    for _ in range(50):
        if not is_alive(file.read_text()):
            break
        time.sleep(0.1)
    assert not is_alive(file.read_text())
    assert session.run(step("next", "print('FIGURE a 1')"))
    assert "== next: ok\n   FIGURE a 1" in summary(session)
    assert session.num_failed == 1


def test_a_step_that_fails_shows_its_end(session):
    assert not session.run(step("bad", "print('before'); raise SystemExit(3)"), step("good", ""))
    assert "== bad: exit 3\n   | before" in summary(session)
    assert "== good: ok" in summary(session)
    assert "before" in (session.out / "log.txt").read_text()


def test_steps_side_by_side(session, tmp_path):
    # Each waits for the other's file.
    code = (
        "import pathlib, time\n"
        "folder = pathlib.Path({!r}); (folder / {!r}).touch()\n"
        "while not (folder / {!r}).exists(): time.sleep(0.05)\n"
    )
    pairs = (("a", "b"), ("b", "a"))
    assert session.run(*(step(one, code.format(str(tmp_path), one, two)) for one, two in pairs))


def test_what_has_no_time_is_not_begun(tmp_path):
    session = Session("title", 10, tmp_path / "out", tmp_path / "work")
    assert not session.run(step("late", "raise SystemExit(1)"))
    assert "no time for late" in summary(session)
    assert session.results == []


def test_wheels_are_unpacked_and_a_bad_one_is_named(session, tmp_path):
    with zipfile.ZipFile(tmp_path / "good.whl", "w") as archive:
        archive.writestr("packed_here.py", "print('FIGURE imported 1')")
    (tmp_path / "bad.whl").write_bytes(b"no archive")
    session.unpack([tmp_path / "bad.whl", tmp_path / "good.whl"])
    assert "NOT UNPACKED: bad.whl" in summary(session)
    assert session.run(Step("import", 20, python("-m", "packed_here")))
    assert "FIGURE imported 1" in summary(session)


def test_a_folder_for_one_step_is_not_seen_by_others(session):
    session.vllm.mkdir()
    (session.vllm / "packed_apart.py").touch()
    command = python("-c", "import packed_apart")
    assert not session.run(Step("other", 20, command))
    assert session.run(Step("vllm", 20, command, (session.vllm,)))


# --- the ladder --------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "start"), [
    (("odds", "rows"), "odds"), (("odds-no-tma", "rows"), "odds-no-tma"), (("rows",), "rows"),
    ((), None),
])  # fmt: skip
def test_the_ladder_ends_at_the_first_rung_that_is_right(session, monkeypatch, right, start):
    code = f"import os; raise SystemExit(os.environ[{steps.SWITCH!r}] not in {right!r})"
    make = steps.Steps(session, "cuda")
    monkeypatch.setattr(make, "check", lambda group, limit, name: step(name, code))
    steps.climb(session, make)
    assert session.environment.get(steps.SWITCH) == start
    assert (f"STARTS AT: {start}" if start else "wrong on every rung") in summary(session)
    begun = len(session.results)
    if start:
        # The second part stands where the first did.
        session.environment.clear()
        steps.climb(session, make)
        assert session.environment[steps.SWITCH] == start
        assert len(session.results) == begun + 1


def test_the_rungs_are_those_of_the_loss_head():
    ladder = pytest.importorskip("intfast.kernels.head.ladder")
    assert (steps.SWITCH, steps.RUNGS) == (ladder.SWITCH, ladder.RUNGS)


def test_names_choose_steps_and_mistakes_are_refused(session, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_look_around", lambda session: 0.0)
    with pytest.raises(SystemExit, match=r"expected some of gpu_tests, .*, got decodes"):
        steps.run(session, "first", "cpu", ["decodes"])
    with pytest.raises(SystemExit, match="got devise"):
        main(["first", "devise=cpu", f"out={tmp_path}", f"work={tmp_path}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_begun(session):
    with pytest.raises(SystemExit, match=r"no CUDA device; device=cpu"):
        steps.run(session, "first", "cuda", [])
    assert session.results == []


def test_every_step_on_a_gpu_is_a_command(session, monkeypatch):
    monkeypatch.setattr(steps, "PACK", Path(__file__).parent)
    made = steps.Steps(session, "cuda")
    groups = [*made.first(), *made.second()]
    names = [one.name for several in groups for one in several]
    assert len(set(names)) == len(names) > 20
    # What is timed runs alone.
    alone = [several[0].name for several in made.first() if len(several) == 1]
    assert {"ceilings", "step_4b", "kernels", "memory", "decode"} <= set(alone)
    for one in (
        one for several in groups for one in several if "benchmarks.gpu.group" in one.command
    ):
        name = one.command[one.command.index("benchmarks.gpu.group") + 1]
        assert name in group.groups()


# --- checks ------------------------------------------------------------------------------------


def run_group(name, out, monkeypatch):
    """(exit status, its row)."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status = group.main([name, "device=cpu", f"out={out}"])
    (line,) = (out / "cpu.jsonl").read_text().splitlines()
    return status, json.loads(line)


def test_a_group_that_is_right(tmp_path, monkeypatch, capsys):
    status, row = run_group("decode", tmp_path, monkeypatch)
    assert status == 0 and row["benchmark"] == "gpu" and row["figures"]["failed"] == []
    assert "CHECK decode_8 ok" in capsys.readouterr().out


def test_a_wrong_loss_head_is_seen(tmp_path, monkeypatch, capsys):
    exact = checks._exact_head
    monkeypatch.setattr(checks, "_exact_head", lambda *a: [x + 2e-3 for x in exact(*a)])
    status, row = run_group("odds", tmp_path, monkeypatch)
    assert status == 1 and len(row["figures"]["failed"]) == 1
    assert "CHECK loss head 17 x 64 x 97 FAIL AssertionError" in capsys.readouterr().out


def test_an_engine_that_samples_from_something_else_is_seen(tmp_path, monkeypatch):
    score = checks.NativeEngine.score
    monkeypatch.setattr(checks.NativeEngine, "score", lambda *a: score(*a, temperature=1.1))
    status, row = run_group("engine", tmp_path, monkeypatch)
    assert status == 1 and len(row["figures"]["failed"]) == 4


def test_a_gradient_that_is_wrong_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MODELS", {"grouped": checks.MODELS["grouped"]})
    passes = checks._passes

    def planted(*args, rounded=None, **kwargs):
        found = passes(*args, rounded=rounded, **kwargs)
        return found if rounded else {name: 1.3 * x for name, x in found.items()}

    monkeypatch.setattr(checks, "_passes", planted)
    status, row = run_group("decoder", tmp_path, monkeypatch)
    assert status == 1 and len(row["figures"]["failed"]) == 3


# --- the folder that travels -------------------------------------------------------------------


@pytest.fixture
def no_index(monkeypatch):
    """Staging without a package index: a file stands for the wheels."""
    output = stage._output

    def made(*command):
        if "download" not in command:
            return output(*command)
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        (folder / "some.whl").touch()
        assert any(word.startswith("msgspec") for word in command)

    monkeypatch.setattr(stage, "_output", made)


def test_the_folder_has_what_a_session_needs(no_index, tmp_path, monkeypatch, capsys):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "install.sh").write_text("true\n")
    kit = tmp_path / "kit"
    assert stage.stage(kit, pack=str(pack)) == 0
    for name in (
        "benchmarks/gpu/__main__.py",
        "vllm/install.sh",
        "wheels/some.whl",
        "tests/tiny.py",
    ):
        assert (kit / name).is_file(), name
    assert not (kit / ".git").exists() and not (kit / "benchmarks/results").exists()
    commit = harness._git("rev-parse", "HEAD")
    monkeypatch.setattr(harness, "STAGED", kit / "benchmarks/commit.txt")
    assert harness._git("rev-parse", "HEAD") == commit and harness._git("status") == ""
    with pytest.raises(SystemExit, match="new or empty"):
        stage.stage(kit)


def test_an_archive_as_a_pack_and_one_that_is_none(tmp_path):
    inside = tmp_path / "a" / "pack"
    inside.mkdir(parents=True)
    (inside / "install.sh").touch()
    archive = shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "a")
    stage._copy_pack(Path(archive), tmp_path / "vllm")
    assert (tmp_path / "vllm/install.sh").exists()
    (inside / "install.sh").unlink()
    with pytest.raises(SystemExit, match=r"expected a folder with install\.sh"):
        stage._copy_pack(inside, tmp_path / "other")


def test_what_is_too_large_to_travel_is_said(no_index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "LIMIT", 1000)
    assert stage.stage(tmp_path / "kit") == 1
    assert "TOO LARGE" in capsys.readouterr().err
