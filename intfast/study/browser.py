"""The interventions of a run folder as plain data for the page: texts, steps, chips, tokens.

A page must open at once and fit into an e-mail, so its texts have budgets in bytes. What does not
fit is left out whole, by a fixed rule, and counted; the journals have everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from intfast import intervene
from intfast.evaluate import wilson
from intfast.prompts import split_steps
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.study.page_data import RunData
from intfast.study.read import TokenLogprobs, read_problems, read_rows, rows

ITEM_BYTES = 24_000_000
"""Texts of candidates in one page: problems, references, attempts, replies."""
CONTINUATION_BYTES = 4_000_000
"""Texts of continuations in one page."""
TOKENS = 100_000
"""Tokens with their colours in one page; a token takes about 40 bytes."""
SHOWN = ("id", "attempt", "sample", "gate", "reason", "location", "content", "reply", "guided")
SHOWN += ("num_tokens",)
"""Fields of an Intervention that the browser shows as they are."""
MARKS = {"correct": "c", "wrong": "w", "unscored": "u"}


def browse(run: RunData) -> dict[str, Any]:
    """The candidates with all that belongs to them, other SFT examples, and what was left out."""
    separator, folder = run.config.prompt.separator, run.folder
    candidates = run.interventions
    examples = rows(folder / "examples.jsonl", Example)
    scored = read_rows(folder / "example_logprobs.jsonl", TokenLogprobs)
    fits = _Room(TOKENS).takes
    fitting = [r for r in scored if fits(len(r.pieces)) and r.example < len(examples)]
    example_of = {row.example: examples[row.example] for row in fitting}
    others = [row for row in fitting if example_of[row.example].kind != "intervention"]
    with_others = {example_of[row.example].problem_id for row in others}
    wanted = {record.problem_id for record in candidates} | with_others
    found = read_problems(folder / "problems.jsonl")
    problems = {key: problem for key, problem in found.items() if key in wanted}
    pairs = {(record.problem_id, record.attempt) for record in candidates}
    sizes = {
        pair: len(record.text)
        for record in run.attempts
        if (pair := (record.problem_id, record.sample)) in pairs
    }
    # Only what the page has room for is read into memory.
    chosen = _within_budget(candidates, problems, sizes)
    kept = [record for record in candidates if record.id in chosen]
    shown = {record.problem_id for record in kept}
    attempts = {
        pair: record
        for record in run.attempts
        if (pair := (record.problem_id, record.sample)) in sizes and pair[0] in shown
    }
    chips, left_out = _chips(run.continuations, chosen)
    tokens = _tokens([(example_of[row.example], row) for row in fitting], kept, attempts)
    return {
        "scored": len(scored),
        "trained": [_trained(example_of[row.example], row) for row in others],
        "examples": [_streams(row, _begin(row)) for row in others],
        "left_out": {
            "examples": len(scored) - len(fitting),
            "candidates": len(candidates) - len(kept),
            "texts": left_out,
        },
        "problems": {
            key: [problem.problem, problem.answer, problem.reference or ""]
            for key, problem in problems.items()
            if key in shown | with_others
        },
        "attempts": {
            f"{key}/{sample}": [split_steps(record.text, separator), record.reason]
            for (key, sample), record in attempts.items()
        },
        "items": [
            {name: getattr(record, name) for name in SHOWN}
            | {"problem": record.problem_id, "chips": chips.get(record.id, {})}
            | {"tokens": tokens.get(record.id)}
            for record in kept
        ],
    }


class _Room:
    """What is left of a budget."""

    def __init__(self, size: int) -> None:
        self.left = size

    def takes(self, size: int) -> bool:
        """Whether something of this size still fits; if so, it is taken in."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits


def _within_budget(
    candidates: Sequence[Intervention],
    problems: Mapping[str, Problem],
    sizes: Mapping[tuple[str, int], int],
) -> set[str]:
    """The ids of the candidates whose texts fit: those that got furthest are taken first.

    sizes: characters of each attempt
    """
    furthest = {gate: -place for place, gate in enumerate(intervene.GATES)}
    room = _Room(ITEM_BYTES)
    seen: set[Any] = set()
    kept: set[str] = set()
    asked = [
        (furthest[r.gate], len(r.reply) + len(r.guided) + len(r.content) + 400, r.id, pair)
        for r in candidates
        if (pair := (r.problem_id, r.attempt))
    ]
    for _, size, key, pair in sorted(asked, key=lambda entry: entry[0]):
        if pair in sizes and pair not in seen:
            size += sizes[pair]
        if pair[0] in problems and pair[0] not in seen:
            problem = problems[pair[0]]
            size += len(problem.problem) + len(problem.reference or "")
        if room.takes(size):
            seen |= {pair, pair[0]}
            kept.add(key)
    return kept


def _chips(
    continuations: Sequence[Continuation], wanted: set[str]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Intervention id -> start -> (one mark per sample, {place: text}, interval of the share of
    right ones or None), and how many texts are left out.

    The first right and the first wrong one of each start come first, then the others in order.
    """
    # (sample, grade, line of the journal, characters)
    drawn: dict[str, dict[str, list[tuple[int, str, int, int]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line, record in enumerate(continuations):
        if record.intervention_id in wanted:
            entry = (record.sample, record.grade, line, len(record.text))
            drawn[record.intervention_id][record.start].append(entry)
    chips: dict[str, dict[str, Any]] = defaultdict(dict)
    first, rest = [], []
    for key, starts in drawn.items():
        for start, entries in starts.items():
            entries.sort()
            texts: dict[int, str] = {}
            marks = "".join(MARKS[grade] for _, grade, _, _ in entries)
            right, scored = marks.count("c"), len(marks) - marks.count("u")
            chips[key][start] = (marks, texts, wilson(right, scored) if scored else None)
            seen: set[str] = set()
            for place, (_, grade, line, size) in enumerate(entries):
                (rest if grade in seen else first).append((texts, place, line, size))
                seen.add(grade)
    room, queue = _Room(CONTINUATION_BYTES), [*first, *rest]
    fitting = [entry for entry in queue if room.takes(entry[3])]
    for texts, place, line, _ in fitting:
        texts[place] = continuations[line].text
    return chips, len(queue) - len(fitting)


def _tokens(
    scored: Sequence[tuple[Example, TokenLogprobs]],
    candidates: Sequence[Intervention],
    attempts: Mapping[tuple[str, int], Attempt],
) -> dict[str, Any]:
    """Intervention id -> [pieces, weights, log-probs before, after] of its scored SFT example.

    An Example does not name its intervention; the same ids behind the same prompt are it.
    """
    by_problem: dict[str, list[tuple[list[int], TokenLogprobs]]] = defaultdict(list)
    for example, row in scored:
        by_problem[example.problem_id].append((example.token_ids, row))
    found = {}
    for record in candidates:
        attempt = attempts.get((record.problem_id, record.attempt))
        if attempt is None or not record.intervention_ids:
            continue
        begin = len(attempt.prompt_ids)
        ids = [*attempt.prompt_ids, *record.prefix_ids, *record.intervention_ids]
        for token_ids, row in by_problem[record.problem_id]:
            if token_ids[: len(ids)] == ids:
                found[record.id] = _streams(row, begin)
                break
    return found


def _begin(row: TokenLogprobs) -> int:
    """Where the prompt ends, for targets that carry loss from their first token."""
    return next((place for place, weight in enumerate(row.weights) if weight), len(row.weights))


def _trained(example: Example, row: TokenLogprobs) -> list[Any]:
    """[problem, kind, loss tokens, mean log-prob before, after]."""
    pairs = [(a, b) for a, b in zip(row.base, row.trained, strict=True) if None not in (a, b)]
    means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)] or [None, None]
    return [example.problem_id, example.kind, len(pairs), *map(_round, means)]


def _streams(row: TokenLogprobs, begin: int) -> list[list[Any]]:
    streams = (row.pieces, row.weights, row.base, row.trained)
    return [[_round(v) for v in stream[begin:]] for stream in streams]


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
