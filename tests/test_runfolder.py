"""The run folder: torn lines, one writer, one config; checkpoints: complete or passed over."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from intfast import cli
from intfast.records import Problem
from intfast.state import checkpoint, runfolder
from intfast.state.files import make_folder, write_atomic
from intfast.state.journal import Journal
from intfast.state.runfolder import PROMPT_TIME, RunFolder, prompt_time
from intfast.study.read import read_json

ROWS = [Problem(id=str(n), problem=f"p{n} é", answer="1") for n in range(3)]


def test_a_journal_reads_back_what_was_appended(tmp_path):
    path = tmp_path / "x.jsonl"
    Journal(path, Problem).append(ROWS[:2])
    journal = Journal(path, Problem)
    journal.append(ROWS[2:])
    assert list(journal) == list(Journal(path, Problem)) == ROWS
    assert [journal[place] for place in (2, 0, -1)] == [ROWS[2], ROWS[0], ROWS[2]]


def test_every_torn_tail_leaves_the_whole_lines(tmp_path):
    whole = tmp_path / "whole.jsonl"
    Journal(whole, Problem).append(ROWS)
    data = whole.read_bytes()
    for size in range(len(data)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:size])
        journal = Journal(path, Problem)
        assert list(journal) == ROWS[: data[:size].count(b"\n")]
        journal.append(ROWS[len(journal) :])
        assert path.read_bytes() == data


def test_two_runs_may_make_the_same_folders_at_once(tmp_path, monkeypatch):
    """The other one makes each folder between this one's look and its call."""
    own, seen = os.mkdir, []

    def late(path, *arguments, **options):
        seen.append(path)
        own(path)
        return own(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", late)
    make_folder(tmp_path / "runs" / "one")
    assert [Path(path).name for path in seen] == ["runs", "one"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"cannot write .*file"):
        make_folder(tmp_path / "file" / "run")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id":"1","problem":"p","answer":"a"}\n{"id":"2"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2 is no Problem record"):
        Journal(path, Problem)


def test_replace_is_all_or_nothing(tmp_path):
    journal = Journal(tmp_path / "x.jsonl", Problem)
    journal.append(ROWS)
    journal.replace(ROWS[:1])
    assert list(journal) == list(Journal(journal.path, Problem)) == ROWS[:1]
    assert list(tmp_path.iterdir()) == [journal.path]


def load(tmp_path, *overrides):
    return cli.load(None, ['data.train="x"', f"run={tmp_path / 'run'}", *overrides])


def test_a_second_writer_is_refused(tmp_path):
    with (
        RunFolder(load(tmp_path)),
        pytest.raises(RuntimeError, match="another process is writing"),
    ):
        RunFolder(load(tmp_path))
    RunFolder(load(tmp_path)).__exit__()


def test_a_second_writer_is_refused_while_files_of_the_first_vanish(tmp_path, monkeypatch):
    def vanished(path):
        raise FileNotFoundError(path)

    with RunFolder(load(tmp_path)):
        monkeypatch.setattr(runfolder, "_last_write", vanished)
        with pytest.raises(RuntimeError, match="another process is writing"):
            RunFolder(load(tmp_path))


def test_the_last_write_is_that_of_a_file_and_not_of_a_start(tmp_path):
    RunFolder(load(tmp_path)).__exit__()
    for file in (tmp_path / "run").iterdir():
        os.utime(file, (1000, 1000))
    for _ in range(2):
        with RunFolder(load(tmp_path)) as folder:
            assert folder.last_write == 1000


def test_the_time_of_the_prompts_in_a_damaged_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"starts": [')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.*or delete it"):
        prompt_time(tmp_path)


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    with RunFolder(load(tmp_path)) as folder:
        assert not folder.resumed
    with RunFolder(load(tmp_path)) as folder:
        assert folder.resumed
    with pytest.raises(ValueError, match=r"rl\.steps: was 400, is 3") as caught:
        RunFolder(load(tmp_path, "rl.steps=3", "seed=1"))
    assert "seed: was 0, is 1" in str(caught.value)
    RunFolder(load(tmp_path)).__exit__()


def test_a_folder_that_was_moved_is_continued(tmp_path):
    (tmp_path / "a").mkdir()
    RunFolder(load(tmp_path / "a")).__exit__()
    (tmp_path / "a").rename(tmp_path / "b")
    with RunFolder(load(tmp_path / "b")) as folder:
        assert folder.resumed
    assert cli.load(tmp_path / "b/run/config.toml").run == str(tmp_path / "b/run")


@pytest.mark.parametrize("name", ["evaluations.json", "manifest.json"])
def test_a_torn_json_file_is_named_with_what_to_do(tmp_path, name):
    with RunFolder(load(tmp_path)) as folder:
        folder.write_json(name, {"base": [1, 2]})
        path = tmp_path / "run" / name
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ValueError, match=f"{name} is damaged.*or delete it"):
            folder.read_json(name)
        with pytest.raises(ValueError, match=f"{name} is damaged.*or delete it"):
            read_json(path)


def test_records_from_elsewhere_are_no_run_that_continues(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attempts.jsonl").write_text("")
    with RunFolder(load(tmp_path)) as folder:
        assert (folder.resumed, folder.last_write) == (False, None)
    with RunFolder(load(tmp_path)) as folder:
        assert folder.resumed and folder.last_write > 0


def test_the_time_of_the_prompts_is_that_of_the_first_start(tmp_path):
    now = prompt_time(tmp_path / "nothing")
    assert abs((datetime.now(UTC) - now).total_seconds()) < 60
    # Older versions wrote down the starts alone.
    stored = {"starts": [{"time": "2025-01-02T03:04:05+00:00"}, {"time": "2026-01-01T00:00:00"}]}
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(stored))
    assert prompt_time(tmp_path) == datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
    manifest.write_text(json.dumps(stored | {"prompt_time": "2025-01-02T03:04:04+00:00"}))
    assert prompt_time(tmp_path).second == 4
    # What came with records from another run.
    (tmp_path / PROMPT_TIME).write_text("2024-05-06T00:00:00+00:00\n")
    assert prompt_time(tmp_path).year == 2024
    (tmp_path / PROMPT_TIME).write_text("soon")
    with pytest.raises(ValueError, match=rf"{PROMPT_TIME}: expected a time such as .*got 'soon'"):
        prompt_time(tmp_path)


# --- checkpoints -------------------------------------------------------------------------------


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 5), value), "step": torch.tensor(value)}


def newest(stage, said):
    return checkpoint.latest(stage, said.append)


def test_the_newest_checkpoint_wins_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, tensors(step), {"cursor": step})
    step, found, state = newest(tmp_path, [])
    assert (step, state) == (10, {"cursor": 10})
    assert torch.equal(found["w"], tensors(10)["w"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, name, harm):
    checkpoint.save(tmp_path, 1, tensors(1), {})
    file = checkpoint.save(tmp_path, 2, tensors(2), {}) / name
    data = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data if harm == "flip" else data[:-3])
    said: list[str] = []
    assert newest(tmp_path, said)[0] == 1
    assert "step-000002 is damaged" in said[0]


def test_a_save_that_was_cut_off_is_not_seen(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1), {})
    part = tmp_path / ".step-000002.part"
    part.mkdir()
    (part / "tensors.safetensors").write_bytes(b"half")
    assert newest(tmp_path, [])[0] == 1


def test_a_non_finite_state_is_never_saved(tmp_path):
    bad = tensors(1) | {"m": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match="nan or inf in m"):
        checkpoint.save(tmp_path, 1, bad, {})
    assert newest(tmp_path, []) is None
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, b'{"a": 1}')
    write_atomic(path, b'{"a": 2}')
    assert json.loads(path.read_bytes()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_every_torn_json_file_of_a_run_is_named(tmp_path):
    with RunFolder(cli.load(None, ["data.train=x", f"run={tmp_path / 'run'}"])) as folder:
        folder.write_json("manifest.json", {"engine": "native", "starts": [{"time": "now"}]})
        data = (folder.path / "manifest.json").read_bytes()
        for size in range(data.rindex(b"}")):
            (folder.path / "manifest.json").write_bytes(data[:size])
            with pytest.raises(
                ValueError, match=r"manifest\.json is damaged.*delete it and repeat"
            ):
                folder.read_json("manifest.json")
        (folder.path / "manifest.json").write_bytes(data)
        assert folder.read_json("manifest.json")["engine"] == "native"
        assert folder.read_json("absent.json") is None
