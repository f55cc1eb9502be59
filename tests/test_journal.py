"""Journals stay on the disk: what their readers take of memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from intfast.records import Problem
from intfast.state.journal import Journal, Lazy, where

ROOT = Path(__file__).parents[1]
ROWS = [Problem(id=str(n), problem=f"p{n} é", answer="1") for n in range(6)]


def test_a_choice_of_records_is_read_when_it_is_asked_for(tmp_path):
    journal = Journal(tmp_path / "x.jsonl", Problem)
    journal.append(ROWS)
    even = where(journal, lambda record: int(record.id) % 2 == 0)
    assert list(even) == ROWS[::2] and len(even) == 3 and even[-1] == ROWS[4]
    changed = [Problem(id=r.id, problem="longer than it was", answer="2") for r in journal]
    journal.replace(changed)
    assert list(even) == changed[::2]
    assert list(Lazy([3, 1], journal.__getitem__)) == [changed[3], changed[1]]


def test_a_journal_may_be_replaced_by_what_is_read_from_it(tmp_path):
    journal = Journal(tmp_path / "x.jsonl", Problem)
    journal.append(ROWS)
    journal.replace(record for record in journal if record.id != "2")
    journal.append(ROWS[:1])
    assert list(journal) == list(Journal(journal.path, Problem)) == [*ROWS[:2], *ROWS[3:], ROWS[0]]


READERS = """
import gc, json, random, resource, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from intfast import cli, collect, intervene
from intfast.collect import Found
from intfast.methods import cost, sft_data
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.state.journal import Journal
from intfast.study import analysis, browser, page_data, sections, summary

folder, length = Path(sys.argv[1]), 4000
config = cli.load(None, ["data.train=x.jsonl", f"run={folder}", "intervene.samples=1",
    "intervene.continuations=2", "intervene.wave=2", "attempts.wrong_per_problem=1",
    "attempts.samples=1", "sft.target=suffix", "analysis.texts=4"])
(folder / "config.toml").write_text(cli.to_toml(config))
problems = [Problem(id=f"p{n}", problem=f"{n}?", answer="1", reference="1") for n in range(200)]
def ids():
    return [random.randrange(300, 150000) for _ in range(length)]
def many(name, kind, make, count):
    with (folder / f"{name}.jsonl").open("w") as file:
        for n in range(count):
            file.write(json.dumps(make(n)) + "\\n")
text = "word " * length
many("attempts", Attempt, lambda n: dict(problem_id=f"p{n}", sample=0, prompt_ids=[1],
    token_ids=ids(), text=text, finish_reason="stop", grade="wrong", reason="wrong",
    policy_version=0), 200)
many("interventions", Intervention, lambda n: dict(id=f"p{n}/0/0", problem_id=f"p{n}", attempt=0,
    sample=0, guided="", reply="r", gate="passed", location=1, content="c", prefix_ids=ids(),
    intervention_ids=[7], num_tokens=9), 200)
many("continuations", Continuation, lambda n: dict(intervention_id=f"p{n // 2}/0/0",
    problem_id=f"p{n // 2}", start="intervention", sample=n % 2, token_ids=ids(), text=text,
    finish_reason="stop", grade="correct" if n % 8 == 0 else "wrong", reason="wrong"), 400)
num_tokens = 800 * length

said = []
run = SimpleNamespace(config=config, problems=problems, tests=[], holds="base",
    sampler=SimpleNamespace(prompt=lambda p: [1], tokenizer=None,
        style=SimpleNamespace(lead="")),
    folder=SimpleNamespace(path=folder, journal=lambda n, k: Journal(folder / f"{n}.jsonl", k)),
    metrics=SimpleNamespace(say=said.append, rows=lambda stage: [{"step": 1}]))
analysis.encode = lambda tokenizer, text: [5]
browser.ITEM_BYTES = browser.CONTINUATION_BYTES = 50_000
next(iter(sft_data._first_of_each_problem([])), None)
gc.collect()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
found = Found(selected=problems)
found.attempts = collect.attempts(run)
found.selected = collect.select(run, found.attempts)
found.wrong = collect.wrong_attempts(run, found.selected, found.attempts)
found.interventions, found.continuations = collect.interventions(run, found.wrong)
stage = peak()
found.examples = sft_data.examples(run, found)
assert len(found.examples) == 50 and len(found.examples[49].token_ids) == 1 + 2 * length + 1
collected = cost.generated_tokens(run)
assert collected["continue"] == 400 * length
assert summary.intervention_figures(run, found)["unlocked_problems"] == 50
assert len(analysis.sources(run, found)["attempt, wrong"]) == 4
data = page_data.RunData(folder, "x")
data.texts = browser.browse(data)
assert sections.interventions([data])
print(json.dumps([(stage - before) / num_tokens, (peak() - before) / num_tokens]))
"""


def test_no_reader_of_the_journals_takes_more_than_four_bytes_a_token(tmp_path):
    """As lists of Python numbers they take 58 bytes a token."""
    words = [sys.executable, "-c", READERS, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    collecting, all_readers = json.loads(done.stdout)
    assert collecting <= all_readers < 4
