"""The table of a comparison, read from the run folders of its arms and seeds.

Held-out figures are means over seeds and test problems, with the interval of drawing both again;
differences are paired by seed and problem. Training reward stands apart: it says nothing of unseen
problems. Tokens are all that a run generated to choose problems, make data, and roll out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli
from intfast.evaluate import Estimate, Evaluation, ProblemCounts, bootstrap_seeds, pass_at_k
from intfast.safe_text import shown
from intfast.state.files import write_atomic
from intfast.state.runfolder import write_json
from intfast.study import arms
from intfast.study.charts import dot, whisker
from intfast.study.read import read_evaluations, read_json, read_rows
from intfast.study.tables import Cell, Column, Table, element, heads, interval, reading, short

COLLECTION = ("attempts", "verify", "continue", "guided")
"""The keys of `generated_tokens` in summary.json that are data collection."""
OURS = arms.ARMS[arms.OURS].label
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
        base = read_evaluations(folder / "collection")["base"]
        return {"evaluation": base, "tokens": 0, "longer": None}
    folder /= arms.run_of(name, names)
    if (folder / "skipped.json").exists():
        return None
    weights = arms.ARMS[name].weights
    evaluations, summary = read_evaluations(folder), read_json(folder / "summary.json")
    tokens = {part: summary["generated_tokens"].get(part, 0) for part in COLLECTION}
    examples = len(read_rows(folder / "examples.jsonl", msgspec.Raw))
    cells: Cells = {"collection": tokens, "examples": examples}
    ended = evaluations[weights.key]
    if not weights.rl:
        return cells | {"evaluation": ended, "tokens": sum(tokens.values()), "longer": None}
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == weights.key]
    steps = cli.load(folder / "config.toml").rl.steps
    at_steps = evaluations.get(weights._replace(step=steps).key, ended)
    spent = [sum(tokens.values()) + sum(map(_row_tokens, part)) for part in (rows[:steps], rows)]
    went_on = len(rows) > steps
    longer = {"evaluation": ended, "steps": len(rows), "tokens": spent[1]}
    return cells | {
        "evaluation": at_steps,
        "tokens": spent[0],
        "steps": steps,
        "training": _training(rows[:steps]),
        "longer": longer if went_on else None,
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
    ks = cli.load(root / f"seed-{seeds[0]}" / "collection" / "config.toml").evaluate.ks
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
    is_equal = equal_tokens and arms.has_rl(name) and bool(at_tokens)
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


# --- the tables --------------------------------------------------------------------------------


def write(root: Path, found: dict[str, Any], console: Any) -> None:
    """Write compare.json and compare.md, and print the latter."""
    write_json(root / "compare.json", found)
    text = markdown(found)
    write_atomic(root / "compare.md", text.encode())
    console.print(shown(text), markup=False, highlight=False, soft_wrap=True)


def markdown(found: Mapping[str, Any]) -> str:
    """Both tables, at equal steps and at equal tokens, and the rows where ours is not ahead."""
    rows = found["arms"]
    seeds = ", ".join(map(str, found["seeds"]))
    num = next((row["accuracy"].num_problems for row in rows.values() if row["accuracy"]), None)
    if num is None:
        return "No arm had a single example to learn from: there is nothing to compare.\n"
    over = "seeds and problems" if len(found["seeds"]) > 1 else "problems"
    steps = steps_table(found)
    lines = [
        f"{num} held-out problems, seeds {seeds}; 95 % intervals, bootstrap over "
        f"{over}; differences paired by seed and problem.",
        *("", steps.title, "", *steps.markdown()),
    ]
    if found["equal_tokens"]:
        tokens = tokens_table(found)
        lines += ["", tokens.title, "", *tokens.markdown()]
    if found["compared_with"]:
        names = ", ".join(rows[name]["label"] for name in found["not_ahead"]) or "none"
        lines += ["", f"{OURS} is not clearly ahead (the interval reaches 0) of: {names}."]
    if found["own_settings"]:
        own = [f"{name}: {' '.join(words)}" for name, words in found["own_settings"].items()]
        lines += ["", f"Settings of single arms: {'; '.join(own)}."]
    return "\n".join(lines) + "\n"


def steps_table(found: Mapping[str, Any]) -> Table:
    """Every arm after `rl.steps`; without a reward on the page, which has it elsewhere."""
    ks = [k for k in found["ks"] if k > 1]
    top = _top(found, "accuracy")
    columns = _columns(top, ks, found["compared_with"])
    columns += [*heads(">by seed %", ">examples"), *heads(">training reward", only="text")]
    rows = []
    for name, row in found["arms"].items():
        by_seed = list(row["accuracy_by_seed"].items())
        cells = [_label(name, row), *_accuracy(name, row["accuracy"], top, by_seed)]
        cells += [interval(row["pass_at_k"].get(k)) for k in ks]
        cells += [*_ahead(row["ahead"]), in_percent(by_seed)]
        reward = f"{row['training']['reward']:.2f}" if row["training"] else ""
        rows.append([*cells, f"{row['examples']:.0f}" if row["examples"] else "", reward])
    return Table(
        "At equal RL steps. Training reward: last quarter of RL, on the training problems.",
        columns,
        rows,
        style="arms",
    )


def tokens_table(
    found: Mapping[str, Any], by_seed: Mapping[str, Sequence[tuple[int, float]]] | None = None
) -> Table:
    """The arms with RL after as many generated tokens as ours.

    by_seed  accuracies of each arm's seeds, for the page
    """
    top = _top(found, "accuracy_tokens")
    arm, *figures = _columns(top, [], found["compared_with"])
    columns = [arm, *heads(">attempts", ">other collection", only="text"), *heads(">RL steps")]
    columns += [*heads(">tokens in all", only="text"), *figures, *heads(">by seed %", only="page")]
    rows = []
    for name, row in found["arms"].items():
        if row["accuracy_tokens"]:
            parts = row["collection"]
            other = sum(parts.values()) - parts["attempts"]
            seeds = (by_seed or {}).get(name, [])
            cells = [_label(name, row), _thousands(parts["attempts"]), _thousands(other)]
            cells += [f"{row['steps_tokens']:.0f}", _thousands(row["tokens_tokens"])]
            cells += _accuracy(name, row["accuracy_tokens"], top, seeds)
            rows.append([*cells, *_ahead(row["ahead_tokens"]), in_percent(seeds)])
    return Table(
        "At equal generated tokens: RL of the others goes on until they have generated as many as "
        f"{OURS}, all data collection included. Thousands of tokens, means of seeds.",
        columns,
        rows,
        style="arms",
    )


def _columns(top: float, ks: Sequence[int], compared_with: str | None) -> list[Column]:
    """Of an arm: its label, accuracy, pass@k, and how far ours is ahead of it."""
    return [
        *heads("*arm", ">accuracy %"),
        Column(f"0 to {short(100 * top)} %, dots: seeds", only="page"),
        *heads(*(f">pass@{k} %" for k in ks)),
        Column(f"{OURS} ahead by, points", "num", "" if compared_with else "text"),
        Column(f"{OURS} is", only="page" if compared_with else "nowhere"),
    ]


def _top(found: Mapping[str, Any], key: str) -> float:
    return max((row[key].high for row in found["arms"].values() if row[key]), default=0) or 1


def _label(name: str, row: Mapping[str, Any]) -> str:
    missing = ", ".join(map(str, row["without_examples"]))
    without = f"no example with seed {missing}" if missing else ""
    text = f"{row['label']} ({without})" if without else row["label"]
    about = element("div", without, class_="note") if without else None
    return Cell(text, element("span", dot(arms.color(name)), row["label"], about))


def _accuracy(
    name: str, estimate: Estimate | None, top: float, by_seed: Sequence[tuple[int, float]]
) -> list[str]:
    return [interval(estimate), whisker(estimate, top, arms.color(name), by_seed)]


def _ahead(estimate: Estimate | None) -> list[str]:
    return [interval(estimate), reading(estimate, "ahead", "behind")]


def in_percent(by_seed: Sequence[tuple[int, float]]) -> str:
    """The accuracies of seeds, side by side."""
    return " ".join(f"{100 * value:.1f}" for _, value in by_seed)


def _thousands(count: float) -> str:
    return f"{count / 1000:,.0f}"
