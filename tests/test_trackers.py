"""Rows reach the trackers as they stand in the journal; a tracker that fails stops nothing."""

import io
import sys
import threading
import types
from types import SimpleNamespace

import pytest
from rich.console import Console

from intfast import cli
from intfast.state import trackers
from intfast.state.journal import Journal
from intfast.state.metrics import Metrics, Row
from intfast.state.runfolder import RunFolder
from intfast.train import main

ROWS = [
    ("int", 1, {"nll_mean": 0.5, "cause": "text"}),
    ("int_rl", 1, {"reward": 0.25, "entropy_mean": float("nan"), "skipped": 0}),
    ("evaluate", 20, {"of": "int_rl@20", "accuracy": 0.75}),
]
SENT = [
    ("int", 1, {"nll_mean": 0.5}),
    ("int_rl", 1, {"reward": 0.25, "skipped": 0.0}),
    ("evaluate/int_rl", 20, {"accuracy": 0.75}),
]


class Fake:
    """A sink that keeps what it is given."""

    def __init__(self, *about):
        self.about = about
        self.rows, self.is_closed = [], False

    def log(self, *row):
        self.rows.append(row)

    def close(self):
        self.is_closed = True


@pytest.fixture
def run(tmp_path):
    """run(*names) sends ROWS to the trackers and returns (what was said, the rows on disk)."""

    def send(*names, folder=tmp_path / "run"):
        listed = ", ".join(f'"{name}"' for name in names)
        config = cli.load(
            None, ["data.train=p.jsonl", f"run={folder}", f"metrics.trackers=[{listed}]"]
        )
        out = io.StringIO()
        with RunFolder(config) as opened:
            journal = opened.journal("metrics", Row)
            metrics = Metrics(journal, Console(file=out, width=200))
            with trackers.attached(config, opened, metrics):
                for stage, step, values in ROWS:
                    metrics.row(stage, step, values)
            metrics.row("after", 1, {})
            assert metrics.listeners == []
        return out.getvalue(), list(Journal(folder / "metrics.jsonl", Row))

    return send


def test_numbers_of_a_row():
    for (stage, step, values), expected in zip(ROWS, SENT, strict=True):
        assert trackers.numbers({"stage": stage, "step": step} | values) == expected


def test_rows_go_to_every_tracker_and_are_all_sent_at_the_end(run, monkeypatch):
    made = []

    def opened(*about):
        made.append(Fake(*about))
        return made[-1]

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(trackers.OPENERS, name, opened)
    said, rows = run("wandb", "trackio")
    assert len(made) == 2 and said == "" and len(rows) == 4
    for sink in made:
        assert sink.rows == SENT and sink.is_closed
        assert sink.about[0].name == "run"
    run("wandb")
    assert made[2].about[2] == made[0].about[2]  # a continued run


@pytest.mark.parametrize("content", [b"", b"0123456789a", b"0123456789a\xff", b"0123456789AB"])
def test_a_damaged_identity_is_not_sent_to_anybody(run, monkeypatch, tmp_path, content):
    monkeypatch.setitem(trackers.OPENERS, "wandb", Fake)
    run("wandb")
    (tmp_path / "run" / "tracker_id").write_bytes(content)
    with pytest.raises(ValueError, match=r"tracker_id is damaged; delete it"):
        run("wandb")


@pytest.mark.parametrize("where", ["open", "log", "close"])
@pytest.mark.parametrize("error", [ConnectionError("no route"), SystemExit(3), KeyError("x")])
def test_a_tracker_that_fails_is_named_once_and_dropped(run, monkeypatch, where, error):
    def fail(*_):
        raise error

    class Broken(Fake):
        __init__ = fail if where == "open" else Fake.__init__
        log = fail if where == "log" else Fake.log
        close = fail if where == "close" else Fake.close

    good = Fake()
    monkeypatch.setitem(trackers.OPENERS, "wandb", Broken)
    monkeypatch.setitem(trackers.OPENERS, "trackio", lambda *about: good)
    said, rows = run("wandb", "trackio")
    assert said.count("WARNING: tracker wandb failed and is dropped") == 1
    assert type(error).__name__ in said and said.count("WARNING") == 1
    assert len(rows) == 4 and good.rows == SENT and good.is_closed


def test_a_tracker_that_hangs_does_not_hold_the_run(run, monkeypatch):
    release = threading.Event()

    class Hanging(Fake):
        def log(self, *row):
            release.wait(60)

    monkeypatch.setattr(trackers, "CLOSE_S", 0.05)
    monkeypatch.setitem(trackers.OPENERS, "wandb", Hanging)
    said, rows = run("wandb")
    release.set()
    assert said.count("WARNING: tracker wandb") == 1 and len(rows) == 4


def test_handing_over_a_row_does_not_wait_for_the_tracker(monkeypatch):
    release = threading.Event()
    sink = SimpleNamespace(log=lambda *_: release.wait(60), close=lambda: None)
    feed = trackers.Feed("slow", lambda: sink, print)
    for step in range(100):
        feed.put({"stage": "rl", "step": step})
    assert not release.is_set()
    release.set()
    feed.close()
    assert feed.is_alive


# --- packages ----------------------------------------------------------------------------------


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb trackio"):
        trackers.require(["wandb", "trackio"])
    trackers.require([])


def test_a_folder_of_logs_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "nopackage").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="nopackage"):
        trackers.require(["nopackage"])


@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_the_command_checks_the_packages_before_any_work(monkeypatch, tmp_path, capsys, mode):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    words = ["configs/quickstart_short.toml", f"run={tmp_path / 'run'}"]
    assert main([*words, 'metrics.trackers=["wandb"]', *mode]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('metrics.trackers=["mlflow"]', "metrics.trackers: expected list"),
        ('metrics.trackers=["wandb", "wandb"]', "expected each once"),
        ("metrics.example_logprobs=-1", ">= 0"),
    ],
)
def test_settings_are_checked(override, message):
    with pytest.raises(ValueError, match=message):
        cli.load(None, ["data.train=p.jsonl", override])


# --- the trackers ------------------------------------------------------------------------------


def test_tensorboard_reads_back_what_was_sent(run, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said, _ = run("tensorboard")
    assert said == ""
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "int/nll_mean",
        "int_rl/reward",
        "int_rl/skipped",
        "evaluate/int_rl/accuracy",
    }
    (point,) = events.Scalars("evaluate/int_rl/accuracy")
    assert (point.step, point.value) == (20, 0.75)


class Recorder:
    """Stands in for a package: `init` gives a run that keeps its calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*positional, **named):
            self.calls.append((name, positional, named))
            return self

        return call


def stub(monkeypatch, name):
    recorder = Recorder()
    module = types.ModuleType(name)
    module.init = recorder.init
    monkeypatch.setitem(sys.modules, name, module)
    return recorder


def test_wandb_gets_a_step_for_every_stage(run, monkeypatch):
    recorder = stub(monkeypatch, "wandb")
    run("wandb")
    (first, _, options), *calls = recorder.calls
    assert first == "init"
    assert options["project"] == "intfast" and options["name"] == "run"
    assert options["resume"] == "allow" and len(options["id"]) == 12
    assert options["config"]["rl"]["group_size"] == 8
    assert calls[:3] == [
        ("define_metric", ("int/step",), {"hidden": True}),
        ("define_metric", ("int/*",), {"step_metric": "int/step"}),
        ("log", ({"int/step": 1, "int/nll_mean": 0.5},), {}),
    ]
    assert calls[-1] == ("finish", (), {})


def test_trackio_gets_the_rows_and_one_name_per_folder(run, monkeypatch):
    recorder = stub(monkeypatch, "trackio")
    run("trackio")
    run("trackio")
    starts = [named for name, _, named in recorder.calls if name == "init"]
    assert starts[0]["name"] == starts[1]["name"] and starts[0]["resume"] == "allow"
    logged = [given[0] for name, given, _ in recorder.calls if name == "log"]
    assert logged[:2] == [
        {"int/step": 1, "int/nll_mean": 0.5},
        {"int_rl/step": 1, "int_rl/reward": 0.25, "int_rl/skipped": 0.0},
    ]
    assert recorder.calls[-1][0] == "finish"


def test_wandb_itself_takes_the_rows(run, monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said, _ = run("wandb")
    assert said == ""
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_itself_takes_the_rows(run, monkeypatch, tmp_path):
    # trackio reads it when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install trackio")
    said, _ = run("trackio")
    assert said == ""
    assert list((tmp_path / "trackio").glob("intfast*"))
