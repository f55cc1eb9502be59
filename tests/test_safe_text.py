"""What may be printed of others' text: nothing that steers a terminal, hides, or is a secret."""

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from intfast import cli, intake
from intfast.safe_text import hidden_characters, printable, redact, shown
from intfast.state import metrics
from intfast.train import main

ROOT = Path(__file__).parents[1]
HOSTILE = {
    "clear screen": "a\x1b[2J\x1b[Hb",
    "window title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "overwrite": "graded wrong\rgraded right",
    "backspace": "no\x08\x08ok",
    "c1 control": "\x9b31mred",
    "bidi override": "\u202eevil\u202c",
    "bidi isolate": "\u2066x\u2069",
    "zero width": "1\u200b0",
    "byte order mark": "\ufeff1",
    "tag characters": "\U000e0041",
    "soft hyphen": "1\u00ad0",
    "line separator": "a\u2028b",
    "lone surrogate": "\ud800",
    "null": "a\0b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hidden_characters_are_written_out(text):
    safe = printable(text)
    assert all(char.isprintable() for char in safe)
    assert safe.encode("utf-8") and "\\" in safe
    assert hidden_characters(text) and not hidden_characters(safe)


def test_ordinary_text_is_left_alone():
    text = "naïve 数 \U0001f600 ≤ \\frac{1}{2} [bold]\nnext"
    assert printable(text) == text
    assert hidden_characters(text + "\t") == []


SECRETS = [
    ("https://user:pa55word@host/x.jsonl", "pa55word"),
    ("https://hf_abcdefghijklmnopqrst@host", "hf_abcdefghijklmnopqrst"),
    ("token hf_AbCdEfGhIjKlMnOpQr was refused", "hf_AbCdEfGhIjKlMnOpQr"),
    ("sk-proj-0123456789abcdefghij", "sk-proj-0123456789abcdefghij"),
    ("ghp_0123456789abcdefghij", "ghp_0123456789abcdefghij"),
    ("key AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP"),
    ("password=correct-horse", "correct-horse"),
    ('{"api_key": "0123456789"}', "0123456789"),
    ("the value sesame-street is shown", "sesame-street"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_masked(monkeypatch, text, secret):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "sesame-street")
    assert secret in text and secret not in shown(text)
    assert "***" in shown(text)


@pytest.mark.parametrize(
    "text",
    [
        "rl.sampling.max_new_tokens = 16384",
        "the tokenizer names no eos_token: <|endoftext|>",
        "https://huggingface.co/Qwen/Qwen3-0.6B@main",
        "org/name@train",
        "a 7 # 3 ; ans d 4",
    ],
)
def test_what_is_no_secret_stays(monkeypatch, text):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("A_KEY", "1")
    assert redact(text) == text


# --- used everywhere ---------------------------------------------------------------------------


def test_every_print_goes_through_the_one_helper():
    """Tables of our own figures, and constants, are the only other things printed."""
    allowed = {"__main__.py": ["usage"], "plan.py": ["memory_table(planned)"]}
    for path in sorted((ROOT / "intfast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called != "print" and not called.endswith("console.print"):
                continue
            printed = ast.unparse(node.args[0])
            # A Table's cells are our own figures and labels.
            is_ours = "shown(" in printed or "USAGE" in printed or printed.startswith("'")
            is_ours = is_ours or printed.endswith(".rich()")
            assert is_ours or printed in allowed.get(path.name, []), (path.name, printed)


def test_a_console_line_cannot_steer_the_terminal():
    out = io.StringIO()
    metrics.say(Console(file=out, force_terminal=True), "\x1b[2J[red]x[/red]\u202e" * 2)
    assert out.getvalue() == "\\x1b[2J[red]x[/red]\\u202e" * 2 + "\n"


def test_the_example_row_and_the_errors_about_data_are_escaped(tmp_path, capsys):
    hostile = "1 + 1\x1b[2J\u202e?"
    path = tmp_path / "p.jsonl"
    row = {"problem": hostile, "answer": "2\x1b]0;x\x07", "reference_solution": "S\r"}
    path.write_text(json.dumps(row) + "\n")
    config = cli.load(None, [f"data.train={path}"])
    out = io.StringIO()
    intake.load(config, Console(file=out, force_terminal=True, width=500))
    printed = out.getvalue()
    assert "1 + 1\\x1b[2J\\u202e?" in printed
    assert all(char.isprintable() or char == "\n" for char in printed)
    path.write_bytes(b'{"\x1b[2J": \n')
    assert main([str(ROOT / "configs/quickstart_short.toml"), f"data.train={path}"]) == 2
    error = capsys.readouterr().err
    assert "p.jsonl:1" in error and "\x1b" not in error


# --- secrets in a config -----------------------------------------------------------------------

PLANTED = [
    "data.train=https://me:sw0rdfish99@host/p.jsonl",
    "data.test=s3://AKIAABCDEFGHIJKLMNOP@bucket/x",
    "model.path=https://hf_abcdefghijklmnopqrst@host/m",
    "prompt.instruction=my token is sesame-street",
    "run=runs/ghp_0123456789abcdefghij",
    'data.columns={problem = "sesame-street"}',
    "rl.steps=hf_abcdefghijklmnopqrst",
    "hf_abcdefghijklmnopqrst",
    "seed=sesame-street",
]


@pytest.mark.parametrize("override", PLANTED)
def test_a_secret_in_a_setting_is_refused_and_not_repeated(monkeypatch, capsys, tmp_path, override):
    monkeypatch.setenv("WANDB_API_KEY", "sesame-street")
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs/quickstart_short.toml")
    assert main([config, override]) == 2
    printed = "".join(capsys.readouterr())
    for secret in ("sw0rdfish99", "AKIA", "hf_abc", "sesame", "ghp_"):
        assert secret not in printed
    assert list(tmp_path.iterdir()) == []
