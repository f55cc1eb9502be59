"""The table of a comparison, read from the run folders of its arms and seeds.

Held-out figures are means over seeds and test problems, with the interval of drawing both again;
differences are paired by seed and problem. Training reward stands apart: it says nothing of unseen
problems. Tokens are all that a run generated to choose problems, make data, and roll out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from intfast.evaluate import Estimate, Evaluation, ProblemCounts, bootstrap_seeds, pass_at_k
from intfast.safe_text import shown
from intfast.state.files import write_atomic
from intfast.state.runfolder import write_json
from intfast.study import arms

COLLECTION = ("attempts", "verify", "continue", "guided")
"""The keys of `generated_tokens` in summary.json that are data collection."""
AHEAD = "InT + RL ahead by, points"
Cells = dict[str, Any]
"""What one arm showed with one seed; see `measure`."""
Values = Callable[[ProblemCounts], float]


def measure(root: Path, name: str, names: Sequence[str], seed: int) -> Cells | None:
    """What a row of the table is made of, for one seed; None where its run had no example.

    evaluation, tokens, steps   at `rl.steps`
    longer                      the same three where RL went on for equal tokens, or None
    """
    folder = root / f"seed-{seed}"
    if name == "base":
        stored = _json(folder / "collection" / "evaluations.json")["base"]
        return {"evaluation": msgspec.convert(stored, Evaluation), "tokens": 0, "longer": None}
    folder /= arms.run_of(name, names)
    if (folder / "skipped.json").exists():
        return None
    key = arms.ARMS[name].evaluation
    evaluations, summary = _json(folder / "evaluations.json"), _json(folder / "summary.json")
    tokens = {part: summary["generated_tokens"].get(part, 0) for part in COLLECTION}
    cells: Cells = {"collection": tokens, "examples": _lines(folder / "examples.jsonl")}
    if not key.endswith("_rl"):
        ended = msgspec.convert(evaluations[key], Evaluation)
        return cells | {"evaluation": ended, "tokens": sum(tokens.values()), "longer": None}
    rows = [row for row in _rows(folder) if row["stage"] == key]
    middle = [text for text in evaluations if text.startswith(f"{key}@")]
    steps = _toml(folder)["rl"]["steps"]
    at_steps = f"{key}@{steps}" if f"{key}@{steps}" in middle else key
    spent = [sum(tokens.values()) + sum(map(_row_tokens, part)) for part in (rows[:steps], rows)]
    went_on = len(rows) > steps
    ended = {"steps": len(rows), "tokens": spent[1]}
    return cells | {
        "evaluation": msgspec.convert(evaluations[at_steps], Evaluation),
        "tokens": spent[0],
        "steps": steps,
        "training": _training(rows[:steps]),
        "longer": ended | {"evaluation": msgspec.convert(evaluations[key], Evaluation)}
        if went_on
        else None,
    }


def _row_tokens(row: Mapping[str, Any]) -> int:
    return row["sampled_tokens"] + row.get("verify_tokens", 0)


def _training(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the last quarter of the steps; the reward is that of rollouts without a hint."""
    last = rows[-max(1, len(rows) // 4) :]
    rewards = [row.get("reward_bare", row["reward"]) for row in last]
    rewards = [reward for reward in rewards if reward is not None]
    return {
        "reward": sum(rewards) / max(1, len(rewards)),
        "zero_advantage": sum(row["zero_advantage"] for row in last) / len(last),
    }


# --- pooling -----------------------------------------------------------------------------------


def build(
    root: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    own: Mapping[str, list[str]],
    equal_tokens: bool,
) -> dict[str, Any]:
    """compare.json: every arm with its estimates, and where ours is not ahead.

    own           settings of single arms, by arms.family
    equal_tokens  whether RL of the others went on until they had generated as many tokens as ours
    """
    cells = {name: {seed: measure(root, name, names, seed) for seed in seeds} for name in names}
    ours = cells.get(arms.OURS)
    ks = _toml(root / f"seed-{seeds[0]}" / "collection")["evaluate"]["ks"]
    rows = {name: _row(name, found, ours, ks, equal_tokens) for name, found in cells.items()}
    return {
        "seeds": list(seeds),
        "ks": ks,
        "compared_with": arms.OURS if ours else None,
        "own_settings": dict(own),
        "equal_tokens": equal_tokens,
        "arms": rows,
        "not_ahead": [
            name
            for name, row in rows.items()
            if name != arms.OURS
            and any(d and d.low <= 0 for d in (row["ahead"], row["ahead_tokens"]))
        ],
    }


def _row(
    name: str,
    found: dict[int, Cells | None],
    ours: dict[int, Cells | None] | None,
    ks: list[int],
    equal_tokens: bool,
) -> dict[str, Any]:
    done = {seed: cells for seed, cells in found.items() if cells}
    at_steps = {seed: cells["evaluation"] for seed, cells in done.items()}
    other = {seed: cells["evaluation"] for seed, cells in (ours or {}).items() if cells}
    # Where RL did not go on, it had its tokens already. Without ours there was nothing to equal.
    longer = {seed: cells["longer"] or cells for seed, cells in done.items() if seed in other}
    at_tokens = {seed: cells["evaluation"] for seed, cells in longer.items()}
    is_equal = equal_tokens and name.endswith("rl") and bool(at_tokens)
    trained = [cells["training"] for cells in done.values() if "training" in cells]
    return {
        "label": arms.ARMS[name].label,
        "without_examples": [seed for seed, cells in found.items() if not cells],
        "accuracy": pooled(at_steps, accuracy) if done else None,
        "accuracy_by_seed": dict(by_seed(at_steps)),
        "pass_at_k": {k: pooled(at_steps, at_k(k), k) for k in ks if k > 1} if done else {},
        "ahead": difference(other, at_steps) if name != arms.OURS else None,
        "training": {key: _mean(row[key] for row in trained) for key in trained[0]}
        if trained
        else None,
        "examples": _mean(cells.get("examples", 0) for cells in done.values()),
        "steps": _mean(cells.get("steps", 0) for cells in done.values()),
        "tokens": _mean(cells["tokens"] for cells in done.values()),
        "steps_tokens": _mean(cells.get("steps", 0) for cells in longer.values()),
        "tokens_tokens": _mean(cells["tokens"] for cells in longer.values()),
        "accuracy_tokens": pooled(at_tokens, accuracy) if is_equal else None,
        "ahead_tokens": difference(other, at_tokens) if is_equal and name != arms.OURS else None,
        "collection": {
            part: _mean(cells["collection"][part] for cells in done.values())
            for part in COLLECTION
            if name != "base"
        }
        if done
        else {},
    }


def accuracy(problem: ProblemCounts) -> float:
    """Share of right samples among the scored ones."""
    return problem.correct / problem.scored


def at_k(k: int) -> Values:
    """pass@k of a problem."""
    return lambda problem: pass_at_k(problem.scored, problem.correct, k)


def pooled(evaluations: Mapping[int, Evaluation], value: Values, least: int = 1) -> Estimate:
    """Mean over seeds and the problems of which every seed has `least` scored samples."""
    tables = [_by_problem(evaluation, value, least) for evaluation in evaluations.values()]
    shared = _shared(tables)
    return bootstrap_seeds([[table[i] for i in shared] for table in tables], seed=0)


def pass_curve(evaluations: Mapping[int, Evaluation]) -> list[tuple[int, Estimate]]:
    """(k, pass@k) at the powers of two up to what every problem with scored samples has of them."""
    scored = [p.scored for e in evaluations.values() for p in e.problems if p.scored]
    most = min(scored, default=0)
    return [(k, pooled(evaluations, at_k(k), k)) for k in (2**i for i in range(most.bit_length()))]


def shared_problems(evaluations: Mapping[int, Evaluation]) -> set[str]:
    """The problems with a scored sample in every one of the evaluations."""
    return set.intersection(*(set(e.accuracies()) for e in evaluations.values()))


def by_seed(evaluations: Mapping[int, Evaluation]) -> list[tuple[int, float]]:
    """(seed, mean accuracy over its problems)."""
    return [(seed, _mean(e.accuracies().values())) for seed, e in evaluations.items()]


def difference(ours: Mapping[int, Evaluation], theirs: Mapping[int, Evaluation]) -> Estimate | None:
    """Accuracy of ours minus theirs, paired by seed and problem; None without a shared seed."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    pairs = [
        (_by_problem(ours[seed], accuracy), _by_problem(theirs[seed], accuracy)) for seed in seeds
    ]
    shared = _shared([table for pair in pairs for table in pair])
    return bootstrap_seeds([[a[i] - b[i] for i in shared] for a, b in pairs], seed=0)


def _by_problem(evaluation: Evaluation, value: Values, least: int = 1) -> dict[str, float]:
    return {p.problem_id: value(p) for p in evaluation.problems if p.scored >= least}


def _shared(tables: Sequence[Mapping[str, float]]) -> list[str]:
    shared = [i for i in tables[0] if all(i in table for table in tables)]
    if not shared:
        raise ValueError("no test problem has enough scored samples in all of the evaluations")
    return shared


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


# --- the table ---------------------------------------------------------------------------------


def write(root: Path, found: dict[str, Any], console: Any) -> None:
    """Write compare.json and compare.md, and print the latter."""
    write_json(root / "compare.json", found)
    text = markdown(found)
    write_atomic(root / "compare.md", text.encode())
    console.print(shown(text), markup=False, highlight=False, soft_wrap=True)


def markdown(found: Mapping[str, Any]) -> str:
    """Both tables, at equal steps and at equal tokens, and the rows where ours is not ahead."""
    rows, ks = found["arms"], [k for k in found["ks"] if k > 1]
    seeds = ", ".join(map(str, found["seeds"]))
    num = next((row["accuracy"].num_problems for row in rows.values() if row["accuracy"]), None)
    if num is None:
        return "No arm had a single example to learn from: there is nothing to compare.\n"
    last = ["by seed %", "examples", "training reward"]
    over = "seeds and problems" if len(found["seeds"]) > 1 else "problems"
    lines = [
        f"{num} held-out problems, seeds {seeds}; 95 % intervals, bootstrap over "
        f"{over}; differences paired by seed and problem.",
        "",
        "At equal RL steps. Training reward: last quarter of RL, on the training problems.",
        "",
        *_head(["arm", "accuracy %", *(f"pass@{k} %" for k in ks), AHEAD, *last]),
    ]
    for row in rows.values():
        by_seed = " ".join(f"{100 * value:.1f}" for value in row["accuracy_by_seed"].values())
        reward = f"{row['training']['reward']:.2f}" if row["training"] else ""
        cells = [row["accuracy"], *(row["pass_at_k"].get(k) for k in ks), row["ahead"]]
        examples = f"{row['examples']:.0f}" if row["examples"] else ""
        lines.append(_line([_label(row), *map(_cell, cells), by_seed, examples, reward]))
    if found["equal_tokens"]:
        lines += ["", *_tokens_table(rows)]
    if found["compared_with"]:
        names = ", ".join(rows[name]["label"] for name in found["not_ahead"]) or "none"
        lines += ["", f"InT + RL is not clearly ahead (the interval reaches 0) of: {names}."]
    if found["own_settings"]:
        own = [f"{name}: {' '.join(words)}" for name, words in found["own_settings"].items()]
        lines += ["", f"Settings of single arms: {'; '.join(own)}."]
    return "\n".join(lines) + "\n"


def _tokens_table(rows: Mapping[str, Any]) -> list[str]:
    head = ["arm", "attempts", "other collection", "RL steps", "tokens in all"]
    lines = [
        "At equal generated tokens: RL of the others goes on until they have generated as many as "
        "InT + RL, all data collection included. Thousands of tokens, means of seeds.",
        "",
        *_head([*head, "accuracy %", AHEAD]),
    ]
    for row in rows.values():
        if row["accuracy_tokens"]:
            parts = row["collection"]
            other = sum(parts.values()) - parts["attempts"]
            counts = [_thousands(parts["attempts"]), _thousands(other)]
            counts += [f"{row['steps_tokens']:.0f}", _thousands(row["tokens_tokens"])]
            figures = map(_cell, (row["accuracy_tokens"], row["ahead_tokens"]))
            lines.append(_line([_label(row), *counts, *figures]))
    return lines


def _label(row: Mapping[str, Any]) -> str:
    missing = ", ".join(map(str, row["without_examples"]))
    return row["label"] + (f" (no example with seed {missing})" if missing else "")


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "| --- " * len(names) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _thousands(count: float) -> str:
    return f"{count / 1000:,.0f}"


def _json(path: Path) -> Any:
    return msgspec.json.decode(path.read_bytes())


def _toml(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))


def _rows(folder: Path) -> list[dict[str, Any]]:
    return list(map(msgspec.json.decode, (folder / "metrics.jsonl").read_bytes().splitlines()))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
