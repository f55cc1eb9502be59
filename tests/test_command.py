"""Around the work of every command: streams that nobody reads, Ctrl-C while it starts, its help."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from intfast.train import main

ROOT = Path(__file__).parents[1]
SHORT = str(ROOT / "configs" / "quickstart_short.toml")
HELPS = [
    ["intfast.train", "--help"],
    ["intfast.compare", "--help"],
    ["intfast.report", "--help"],
    ["intfast.study", "--help"],
    ["intfast.study", "ablate", "--help"],
]
PRINTER = """
import sys
from pathlib import Path
from intfast.state.command import outcome
from intfast.state.metrics import make_console, say
with outcome("again", goes_on={goes_on}) as ended:
    for _ in range(3000):
        say(make_console(), "a line of a run")
    print("and one of print")
    Path({done!r}).touch()
sys.exit(ended.code)
"""


def command(*words, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=False, **options)


def nobody() -> int:
    """The end of a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return write


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", HELPS, ids=lambda words: " ".join(words[:-1]))
def test_a_help_that_nobody_reads_ends_in_silence(words):
    result = command("-m", *words, stdout=nobody())
    assert (result.returncode, result.stderr) == (0, b"")
    with open("/dev/full", "w") as full:
        result = command("-m", *words, stdout=full)
    said = b"error: stdout cannot be written (No space left on device)\n"
    assert (result.returncode, result.stderr) == (1, said)


@pytest.mark.parametrize("broken", ["pipe", "disk"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_goes_on_behind_one_sentence(tmp_path, broken, goes_on):
    code = PRINTER.format(goes_on=goes_on, done=str(tmp_path / "done"))
    stdout = nobody() if broken == "pipe" else os.open("/dev/full", os.O_WRONLY)
    result = command("-c", code, stdout=stdout)
    os.close(stdout)
    assert (tmp_path / "done").exists()
    lines = result.stderr.decode().splitlines()
    if goes_on:
        assert result.returncode == 0
        assert len(lines) == 1 and "the work goes on without it" in lines[0]
    else:
        assert (result.returncode, len(lines)) == ((0, 0) if broken == "pipe" else (1, 1))


def test_a_plan_that_nobody_reads_to_its_end_is_no_failure(tmp_path):
    words = [SHORT, f"run={tmp_path / 'run'}", "--dry-run"]
    result = command("-m", "intfast.train", *words, stdout=nobody())
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_wrong_setting_keeps_its_code_without_stderr():
    with open("/dev/full", "w") as full:
        assert command("-m", "intfast.train", SHORT, "x=1", stderr=full).returncode == 2
        assert command("-m", "intfast.train", stderr=full).returncode == 2


def test_what_the_terminal_has_no_character_for_is_written_out():
    code = "from intfast.state.command import say; say('\\u221a2 \\u00e9')"
    result = command("-c", code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (result.stdout, result.stderr) == (b"\\u221a2 \\xe9\n", b"")


# --- the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("slow", ["msgspec", "torch"])
@pytest.mark.parametrize(
    "words", [["train", SHORT, "--dry-run"], ["compare", SHORT], ["report", "x"]]
)
def test_a_stop_during_imports_is_one_line(tmp_path, words, slow, number):
    """msgspec is imported before the command begins, torch inside it or before."""
    (tmp_path / f"{slow}.py").write_text("print('up', flush=True)\nimport time; time.sleep(60)")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    if words[0] == "compare":
        words = [*words, "rl.problems=selected", "arms=rl"]
    process = subprocess.Popen(
        [sys.executable, "-m", f"intfast.{words[0]}", *words[1:]],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    expected = f"stopped by {number.name}; repeat the command\n"
    assert (process.returncode, said.decode()) == (128 + number, expected)


@pytest.mark.parametrize("module", ["train", "compare"])
@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_wrong_paths_are_all_named_by_their_settings_before_torch_is_imported(
    tmp_path, module, mode
):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "empty").mkdir()
    words = [
        "data.train=missing/held_out.jsonl",
        f"data.test={tmp_path / 'empty'}",
        "model.path=no/such/model",
        f"run={tmp_path / 'torch.py'}/run",
    ]
    words += ["rl.problems=selected", "arms=rl"] if module == "compare" else []
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": path}
    result = command("-m", f"intfast.{module}", SHORT, *words, *mode, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = result.stderr.decode()
    assert result.returncode == 2 and said.startswith("error: 4 paths cannot be used\n")
    assert "\n  data.train: missing/held_out.jsonl does not exist\n" in said
    assert f"\n  data.test: {tmp_path / 'empty'} holds no .jsonl" in said
    assert "\n  model.path: model 'no/such/model'" in said
    assert "\n  run: expected a folder" in said
    # 0.2 s, where importing torch takes 3.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


# --- help of a part ----------------------------------------------------------------------------


def test_help_of_a_section_or_of_a_setting(capsys):
    assert main(["--help", "rl"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[rl]\n  rl.steps = 400") and "[rl.policy]" in shown
    assert "sft." not in shown.replace("sft.py", "") and "usage" not in shown
    assert main(["sampling", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "sampling.temperature = 0.7" in shown and "attempts.sampling = {}" in shown
    assert main(["--help", "rl.group_size", "watchdog_s"]) == 0
    shown = capsys.readouterr().out
    assert "rl.group_size = 8" in shown and "watchdog_s = 1800.0" in shown
    assert shown.count(" = ") == 2
    # A whole command line with --help behind it is asked about as a whole.
    assert main([SHORT, "rl.steps=3", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(("part", "remedy"), [("RL", "rl"), ("smapling", "sampling")])
def test_help_of_what_is_no_section_suggests_one(capsys, part, remedy):
    assert main(["--help", part]) == 2
    assert capsys.readouterr().err == (
        f"error: no setting or section {part}; did you mean {remedy}?\n"
    )
    assert main(["--help", "quantum"]) == 2
    assert "quantum; known: run, seed" in capsys.readouterr().err
