"""Mutated dataset rows: each is accepted, dropped under a counted reason, or named with file:line.

Controls: a loader that skips what it cannot read (silent drops) and one that trusts its rows (bare
exceptions); the bookkeeping must catch both.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intfast.data import load_problems

TRIALS = 2_000
GROUP = 20
"""Rows of a file in which several faults must all be named at once."""

GOOD = {"problem": "What is 1 + 1?", "answer": "2", "reference_solution": "It is 2.", "id": "a"}
VALUES = (
    None,
    True,
    0,
    -1.5,
    1e308,
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\u202e",
    "\U0001f600",
    "x" * 100_000,
    "9" * 301,
    [],
    {},
    ["4"],
    {"x": {"y": 1}},
    [[["deep"]]],
    [{"role": "user", "content": "q?"}],
    [{"role": "system", "content": "q?"}],
    [{"role": "user", "content": None}],
    10**30,
)
RAW = (
    b"",
    b"{",
    b"null",
    b"[1]",
    b'"text"',
    b"\xff\xfe",
    b"NaN",
    b"[" * 5000,
    b'{"problem": "p", "answer": NaN}',
    b'{"problem": "p", "answer": Infinity}',
    b'{"problem": "p", "answer": 1e999}',
    b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}",
    b'{"problem": "\\ud800", "answer": "1"}',
    b'{"problem": "\xed\xa0\x80", "answer": "1"}',
    b'{"problem": "p", "problem": "q", "answer": "1"}',
    b'{"problem": "p", "answer": {"a": 1, "a": 2}}',
    b'{"problem": "p", "answer": "1"} {"problem": "q", "answer": "1"}',
    b"{'problem': 'p', 'answer': '1'}",
    b'{"problem": "p", "answer": "1",}',
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
)


def mutated(rng: random.Random, number: int) -> bytes:
    """One line: a good row with a value, a key or its bytes changed."""
    row: dict[str, Any] = GOOD | {"problem": f"What is {number} + 1?", "id": str(number)}
    kind = rng.random()
    if kind < 0.5:
        row[rng.choice(list(row))] = rng.choice(VALUES)
    elif kind < 0.6:
        row.pop(rng.choice(list(row)))
    elif kind < 0.7:
        return rng.choice(RAW)
    data = json.dumps(row).encode()
    if kind < 0.7 or kind > 0.97:
        return data
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        flipped[rng.randrange(len(flipped))] = rng.choice(b'{}[]",:\\ x0\x00\x80\xff')
    cut = len(flipped) if rng.random() < 0.7 else rng.randrange(len(flipped))
    return bytes(flipped[:cut]).replace(b"\n", b" ")


def load(path: Path) -> tuple[int, int, int]:
    """(read, kept, dropped) of a file. Raises what the loader raises."""
    _, report = load_problems(str(path))
    return report.num_read, report.num_kept, sum(report.dropped.values())


def outcome(path: Path, line: bytes, loader: Callable[[Path], tuple[int, int, int]]) -> str:
    """What became of a row in the second line of a file: one of the words counted by `run`."""
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    try:
        read, kept, dropped = loader(path)
    except ValueError as error:
        return "named" if f"{path.name}:2:" in str(error) else f"unnamed: {error}"[:200]
    except Exception as error:
        return f"bare {type(error).__name__}"
    rows = 1 + bool(line.strip())
    if read != rows or kept + dropped != rows:
        return "silent"
    return "accepted" if kept == rows else "dropped, counted"


def run(trials: int, seed: int) -> dict[str, Any]:
    """What became of the rows, one by one and 20 in a file; the same for two naive loaders."""
    rng = random.Random(seed)
    lines = [mutated(rng, number) for number in range(trials)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        fates = [outcome(path, line, load) for line in lines]
        skipping = Counter(outcome(path, line, _skipping) for line in lines)
        trusting = Counter(outcome(path, line, _trusting) for line in lines)
        together = _together(path, lines, fates)
    counts = Counter(fates)
    controls = {
        "skips what it cannot read": skipping["silent"],
        "trusts its rows": sum(n for fate, n in trusting.items() if fate.startswith("bare")),
    }
    return {
        "rows": trials,
        "outcomes": dict(counts.most_common()),
        "files_with_all_faults_named_at_once": together,
        "controls": controls,
        "passed": counts.keys() <= {"accepted", "named", "dropped, counted"}
        and together["complete"] == together["files"],
        "control_failed": all(controls.values()),
    }


def _together(path: Path, lines: list[bytes], fates: list[str]) -> dict[str, int]:
    """Files of GROUP rows, and how many of them named exactly their faulty lines."""
    files = complete = 0
    for start in range(0, len(lines), GROUP):
        rows = lines[start : start + GROUP]
        faulty = [k for k, fate in enumerate(fates[start : start + GROUP], 2) if fate == "named"]
        path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *rows, b""]))
        try:
            load(path)
            message = ""
        except ValueError as error:
            message = str(error)
        files += 1
        named = [k for k in range(1, GROUP + 2) if f"  {path.name}:{k}:" in message]
        complete += named == faulty
    return {"files": files, "complete": complete}


def _skipping(path: Path) -> tuple[int, int, int]:
    kept = 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            kept += bool(row["problem"] and row["answer"])
        except Exception:
            continue
    return kept, kept, 0


def _trusting(path: Path) -> tuple[int, int, int]:
    rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    kept = sum(bool(row["problem"].strip() and row["answer"].strip()) for row in rows)
    return len(rows), kept, len(rows) - kept
