"""Metrics rows, seconds per phase, and progress without a terminal."""

import io
import time

import pytest
from rich.console import Console

from intfast.state import metrics
from intfast.state.journal import Journal
from intfast.state.metrics import Metrics, Row


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def made(tmp_path, out):
    return Metrics(Journal(tmp_path / "metrics.jsonl", Row), Console(file=out, width=100))


def test_seconds_belong_to_the_row_that_follows_them(made):
    with made.phase("generate"):
        time.sleep(0.02)
    made.row("rl", 1, {"reward": 0.5})
    with made.phase("train"):
        time.sleep(0.02)
    with made.phase("train"):
        time.sleep(0.02)
    made.row("rl", 2, {"reward": 0.75})
    first, second = made.rows("rl")
    assert first["seconds_generate"] >= 0.02 and "seconds_train" not in first
    assert second["seconds_train"] >= 0.04 and "seconds_generate" not in second
    assert made.seconds()["rl"]["train"] == second["seconds_train"]


def test_seconds_are_counted_when_the_phase_fails(made):
    with pytest.raises(KeyError), made.phase("grade"):
        raise KeyError
    made.row("rl", 1, {})
    assert "seconds_grade" in made.rows("rl")[0]


def test_rows_survive_and_unsaved_steps_are_forgotten(made):
    for step in (1, 2, 3):
        made.row("rl", step, {"reward": step})
    made.row("int", 3, {})
    made.forget_after("rl", 1)
    again = Metrics(Journal(made.journal.path, Row), made.console)
    assert [(row["stage"], row["step"]) for row in again.journal] == [("rl", 1), ("int", 3)]


def test_text_of_a_model_is_not_markup(made, out):
    made.say("[red]x[/red] [/nope]")
    assert out.getvalue() == "[red]x[/red] [/nope]\n"


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(made, out, monkeypatch):
    with made.progress("attempts", 4) as advance:
        advance(1, 10)
        assert out.getvalue() == ""
        monkeypatch.setattr(metrics, "PLAIN_EVERY_S", 0.0)
        advance(2, 30)
    assert out.getvalue().startswith("attempts: 3/4, ")


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    made = Metrics(Journal(tmp_path / "m.jsonl", Row), console)
    with made.progress("attempts", 4) as advance:
        advance(4, 40)
    assert "attempts" in out.getvalue() and "4/4" in out.getvalue()
