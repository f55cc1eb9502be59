"""A run folder made by hand, without a model, for the tests of the report."""

from __future__ import annotations

import base64
import json
import zlib
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli, intervene
from intfast.evaluate import Evaluation, count_samples
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.study.read import TokenLogprobs

HOSTILE = (
    "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=2'>"
    "<!--<script> ]]> <iframe src=https://example.com></iframe> &lt;b&gt; $style ${data} \u2028 "
    "<svg onload=window.pwned=3> \u202eright to left \x00\x1b[2J"
)
FEW = ["evaluate.samples=4", "evaluate.ks=[1, 4]"]
PROMPT, PREFIX, FIX = [1, 2, 3], [10, 11], [20, 21]
GATES = ("kept", "unsolved", "leak", "unparsed")


def make_run(folder: Path, *overrides: str, num: int = 4, text: str = "") -> Path:
    """A finished run of `num` problems with one candidate each; `text` goes into every text."""
    folder.mkdir(parents=True)
    config = cli.load(
        None, ["data.train=p.jsonl", "data.test=t.jsonl", f"run={folder}", *overrides]
    )
    (folder / "config.toml").write_text(cli.to_toml(config))
    ids = [f"p-{i}{text}" for i in range(num)]
    _rows(folder, "problems", [_problem(i, key, text) for i, key in enumerate(ids)])
    _rows(folder, "attempts", [_attempt(key, text) for key in ids])
    candidates = [_candidate(key, GATES[i % 4], text) for i, key in enumerate(ids)]
    _rows(folder, "interventions", candidates)
    reached = [r for r in candidates if r.gate in intervene.REACHED_CONTINUATION]
    _rows(folder, "continuations", [c for r in reached for c in _continuations(r, text)])
    _rows(folder, "examples", [_example(ids[0])])
    _rows(folder, "example_logprobs", [_logprobs(text)])
    _rows(folder, "metrics", _metrics())
    evaluations = {name: evaluation(name, right, text) for name, right in RIGHT.items()}
    _json(folder / "evaluations.json", evaluations)
    manifest = {"commit": text or "abc", "device": "cpu", "seed": 0, "num_parameters": 7}
    _json(folder / "manifest.json", manifest | {"test": {"problems": 3, "hash": "h"}})
    alone = {"accuracy": NATS, "problem_coverage": NATS, "attempts": 4, "per_problem": 1.0}
    found = {"tokens_per_unlocked_problem": 12.0}
    found["problem_alone"] = alone | {"zero_by_selection": False}
    summary = {"intervention": found, "generated_tokens": {"attempts": 16, "int_rl": 4000}}
    _json(folder / "summary.json", summary)
    measured = {"nll": NATS, "likelihood": 0.6, "entropy": NATS}
    row = {"texts": 3, "tokens": 90, "of": {"base": measured, "int": measured}}
    _json(folder / "analysis.json", {"texts": {f"reference{text}": row}})
    return folder


NATS = {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 3}
RIGHT = {"base": (0, 0, 1), "int": (1, 2, 2), "int_rl@1": (1, 1, 1), "int_rl": (4, 3, 2)}
"""Right answers of four, on each of three problems."""


def _rows(folder: Path, name: str, records: list[Any]) -> None:
    data = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
    (folder / f"{name}.jsonl").write_bytes(data)


def _json(path: Path, value: Any) -> None:
    path.write_bytes(msgspec.json.encode(value))


def _problem(number: int, key: str, text: str) -> Problem:
    return Problem(
        id=key,
        problem=f"What is {number} + {number}? {text}",
        answer=f"{2 * number}{text}",
        reference=f"Add the two. {text}",
    )


def _attempt(key: str, text: str) -> Attempt:
    return Attempt(
        problem_id=key,
        sample=0,
        prompt_ids=PROMPT,
        token_ids=[*PREFIX, 12, 13],
        text=f"Begin {text}\n\nwrong turn {text}\n\nso it is 7 {text}",
        finish_reason="stop",
        grade="wrong",
        reason="wrong",
        policy_version=0,
    )


def _candidate(key: str, gate: str, text: str) -> Intervention:
    located = gate != "unparsed"
    return Intervention(
        id=f"{key}/0/0",
        problem_id=key,
        attempt=0,
        sample=0,
        guided=f"guided {text}",
        reply=f"the reply about {key} {text}",
        gate=gate,
        reason=text,
        location=2 if located else 0,
        content=f"right turn {text}\n\n" if located else "",
        prefix_ids=PREFIX if located else [],
        intervention_ids=FIX if located else [],
        num_tokens=30,
    )


def _continuations(record: Intervention, text: str) -> list[Continuation]:
    grades = {"intervention": ["correct", "wrong", "unscored", "wrong"], "error": ["wrong"] * 4}
    if record.gate == "unsolved":
        grades["intervention"] = ["wrong"] * 4
    return [
        Continuation(
            intervention_id=record.id,
            problem_id=record.problem_id,
            start=start,
            sample=sample,
            token_ids=[30],
            text=f"{start} {sample} goes on {text}",
            finish_reason="stop",
            grade=grade,
            reason={"unscored": "timeout"}.get(grade, grade),
        )
        for start, drawn in grades.items()
        for sample, grade in enumerate(drawn)
    ]


def _example(key: str) -> Example:
    ids = [*PROMPT, *PREFIX, *FIX]
    weights = [0.0] * 3 + [1.0] * 4
    return Example(token_ids=ids, weights=weights, problem_id=key, kind="intervention")


def _logprobs(text: str) -> TokenLogprobs:
    return TokenLogprobs(
        example=0,
        pieces=["<p>", " q", " :", " pre", "fix", f" new{text}", " step"],
        weights=[0.0] * 3 + [1.0] * 4,
        base=[None] * 3 + [-0.5, -0.25, -4.0, -2.0],
        trained=[None] * 3 + [-0.75, -0.25, -0.5, -0.25],
    )


def _metrics() -> list[dict[str, Any]]:
    sft = [
        {"stage": "int", "step": n, "nll_mean": 1 / n, "grad_norm": 1.0, "seconds_train": 1.5}
        for n in (1, 2)
    ]
    rl = [
        {"stage": "int_rl", "step": n, "reward": n / 30, "zero_advantage": 0.5, "length": 80 + n}
        | ({"entropy_mean": 0.5} if n % 2 else {})
        | {"seconds_generate": 2.0, "seconds_train": 1.0}
        for n in range(1, 25)
    ]
    return [*sft, *rl, {"stage": "evaluate", "step": 0, "of": "int_rl", "accuracy": 0.75}]


def evaluation(name: str, right: tuple[int, ...], text: str) -> Evaluation:
    problems = [
        count_samples(
            f"t-{i}{text}",
            ["correct"] * n + ["wrong"] * (4 - n),
            ["correct"] * n + ["wrong"] * (4 - n),
            ["stop"] * 4,
            [10] * 4,
        )
        for i, n in enumerate(right)
    ]
    return Evaluation(name=name, seed=0, problems=problems)


class Seen(HTMLParser):
    """The elements of a page, the text of each, and its tables by section."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.tables = defaultdict(list)
        """Section -> tables -> rows, the heading first -> texts of cells."""
        self.section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in ("meta", "link", "br"):
            self.open.append(len(self.elements) - 1)
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "table":
            self.tables[self.section].append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])

    def handle_endtag(self, tag):
        place = self.open.pop()
        assert self.elements[place][0] == tag
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append(" ".join(self.texts[place].split()))

    def handle_data(self, data):
        for place in self.open:
            self.texts[place] += data

    def of(self, wanted):
        rows = zip(self.elements, self.texts, strict=True)
        return [(attrs, text) for (tag, attrs), text in rows if tag == wanted]

    def block(self, name):
        ((kind, text),) = [
            (attrs["type"], text) for attrs, text in self.of("script") if attrs.get("id") == name
        ]
        return json.loads(zlib.decompress(base64.b64decode(text)) if "plain" in kind else text)

    def text(self, section):
        (text,) = [text for attrs, text in self.of("section") if attrs["id"] == section]
        return text
