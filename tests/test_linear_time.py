"""Texts of models and of data cost time in proportion to their length, whatever they hold.

Every reader of such a text gets 200,000 characters of hostile shapes: what is optional repeated,
what opens and never ends, what nearly fits. A pattern that goes back and tries again needs seconds
to hours for them.
"""

import contextlib
import gc
import json
import math
import signal
import time
from typing import ClassVar

import pytest

from benchmarks.quickstart_task import task
from intfast import data, safe_text, verdict
from intfast.config import PromptConfig
from intfast.grading import answers
from intfast.leak import leaks
from intfast.methods import guided
from intfast.prompts import ChatStyle, CompactStyle, split_steps

LENGTH = 200_000
LIMIT_S = 0.2
MARK = "abcdef12"
OPEN, CLOSE = f"<location-{MARK}>", f"</location-{MARK}>"
BEGIN, END = f"<intervention-{MARK}>", f"</intervention-{MARK}>"


def fill(unit: str, head: str = "", tail: str = "") -> str:
    """`head`, then `unit` as often as fits, then `tail`."""
    return head + unit * ((LENGTH - len(head) - len(tail)) // len(unit)) + tail


SHAPES = {
    "line feeds": fill("\n"),
    "spaces": fill(" "),
    "spaces in words": fill(" ", "a", "b"),
    "blank lines of spaces": fill(" \n\n"),
    "zero-width spaces": fill("\u200b", "<", "a"),
    "opening brackets": fill("<"),
    "half a tag": fill("< a t t ", tail="x"),
    "line feeds behind a tag": fill("\n", OPEN),
    "spaces between tags": fill(" ", f"{OPEN}1{CLOSE}"),
    "locations that open": fill(OPEN),
    "blocks": fill(f"{OPEN}1{CLOSE}{BEGIN}x{END}"),
    "blocks that never end": fill(f"{OPEN}1{CLOSE}{BEGIN}"),
    "lines in a block": fill("a  \n \n", f"{OPEN}1{CLOSE}{BEGIN}", END),
    "spaces in a block": fill(" ", f"{OPEN}1{CLOSE}{BEGIN}a", f"b{END}"),
    "boxes that open": fill("\\boxed{"),
    "boxes": fill("\\boxed{1}"),
    "backslashes": fill("\\"),
    "digits": fill("7"),
    "groups of digits": fill("1,234"),
    "answers": fill("the answer is ", tail="."),
    "answer lines": fill("answer: "),
    "fractions": fill("\\frac{1}{"),
    "carets": fill("^{"),
    "dollars": fill("$"),
    "addresses": fill("://a"),
    "assignments": fill("token="),
    "names in a row": fill("password"),
    "keys": fill("sk-"),
    "stars": fill("*", "answer"),
    "words": fill("a"),
    "short words": fill("a "),
    "words of the dialect": fill("a 7 ; "),
    "equal rows": fill("d 4 4 ok "),
    "emoji": fill("\U0001f600"),
    "control tokens": fill("<|end|>"),
    "half control tokens": fill("<|reserved_special_token_"),
    "many control tokens": fill("<|reserved_special_token_77|>"),
    "hash marks": fill("#"),
    "parentheses": fill("("),
}


class Many:
    """Names as many control tokens as Llama's or Mistral's tokenizers."""

    all_special_tokens = tuple(f"<|reserved_special_token_{i}|>" for i in range(1000))
    added_tokens_decoder: ClassVar = {}


@pytest.fixture(scope="module")
def readers(bpe):
    """Name -> what reads a text."""
    chat = ChatStyle(PromptConfig(), bpe)
    compact = CompactStyle(PromptConfig(style="compact", separator=" ;"), task.build_tokenizer())
    row = split_steps(fill("d a : 7 = d 4 ;")[: LENGTH // 4], " ;")
    tokens = verdict.control_tokens(Many)
    marked = ["a\n\n", "b"]
    return {
        "verdict.read": lambda text: verdict.read(text, MARK, 5, tokens),
        "verdict.neutralise": verdict.neutralise,
        "verdict.has_tags": verdict.has_tags,
        "verdict.mark_of": verdict.mark_of,
        "verdict.break_tokens": lambda text: verdict.break_tokens(text, tokens),
        "prompts.split_steps": lambda text: split_steps(text, "\n\n"),
        "prompts.split_steps, lines": lambda text: split_steps(text, "\n"),
        "ChatStyle.read": lambda text: chat.read(text.replace(MARK, chat.mark(marked)), marked),
        "ChatStyle.quote": chat.quote,
        "CompactStyle.read": lambda text: compact.read(text, row),
        "CompactStyle.split": compact.split,
        "guided.beginning": lambda text: guided.beginning(text, 0.75),
        "safe_text.shown": safe_text.shown,
        "safe_text.hidden_characters": safe_text.hidden_characters,
        "data.text_key": data.text_key.__wrapped__,
    }


@pytest.fixture(scope="module")
def graders():
    """Name -> what the grader and the leak gate do with a text, outside of the workers."""
    return {
        "leak.leaks": lambda text: leaks(text, "12345"),
        "leak.leaks, fraction": lambda text: leaks(text, "\\frac{3}{4}"),
        "answers.last_boxed": answers.last_boxed,
        "answers.all_boxed": answers.all_boxed,
        "answers.extract": lambda text: answers.extract(text, "stated"),
        "answers.compare_quickly": lambda text: answers.compare_quickly("12", text),
        "answers.compare_quickly, gold": lambda text: answers.compare_quickly(text, "12"),
    }


class TooSlow(Exception):
    """Raised in a reader, by the clock of its CPU time."""


def _measured(read, text):
    """CPU seconds; infinity where the clock rang."""
    signal.setitimer(signal.ITIMER_PROF, 10 * LIMIT_S)
    start = time.process_time()
    try:
        read(text)
    except TooSlow:
        return math.inf
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return time.process_time() - start


def slow_ones(readers, text):
    """Name -> CPU seconds of the readers that are above the limit; none runs on for minutes."""

    def ring(*_):
        raise TooSlow

    before = signal.signal(signal.SIGPROF, ring)
    slow = {}
    # Collecting the garbage of torch and transformers takes as long as the limit.
    gc.collect()
    gc.disable()
    try:
        for name, read in readers.items():
            # Twice where it was slow: another process may have taken the caches.
            for _ in range(2):
                seconds = _measured(read, text)
                if seconds <= LIMIT_S or seconds == math.inf:
                    break
            if seconds > LIMIT_S:
                slow[name] = round(seconds, 2)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        gc.enable()
    return slow


@pytest.mark.parametrize("shape", SHAPES)
def test_every_reader_takes_linear_time(readers, shape):
    assert 0.99 * LENGTH <= len(SHAPES[shape]) <= LENGTH
    assert slow_ones(readers, SHAPES[shape]) == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_grader_and_the_leak_gate_take_linear_time(graders, shape):
    assert slow_ones(graders, SHAPES[shape]) == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_problem_file_takes_linear_time(tmp_path, shape):
    text = SHAPES[shape]
    rows = [
        {"problem": text, "answer": "1", "solution": text},
        {"problem": "p", "answer": text, "solution": "x"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(_):
        # Not every shape makes a problem.
        with contextlib.suppress(ValueError):
            data.load_problems(str(file))

    # Two rows of two such texts, read, checked and hashed.
    assert slow_ones({"once": load}, text).get("once", 0) < 4 * LIMIT_S
