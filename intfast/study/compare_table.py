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
from intfast.evaluate import Estimate, Evaluation, ProblemCounts, pass_at_k
from intfast.methods import cost
from intfast.state.files import read_json
from intfast.state.journal import Rows
from intfast.study import arms
from intfast.study.charts import dot, whisker
from intfast.study.paired import bootstrap_seeds
from intfast.study.read import read_evaluations, read_rows
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
    examples = len(Rows(folder / "examples.jsonl", msgspec.Raw))
    cells: Cells = {"collection": tokens, "examples": examples}
    ended = evaluations[weights.key]
    collected = sum(tokens.values())
    if not weights.rl:
        return cells | {"evaluation": ended, "tokens": collected, "longer": None}
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == weights.key]
    steps = cli.load(folder / "config.toml").rl.steps
    spent = [cost.of_step(row) for row in rows]
    longer = {"evaluation": ended, "steps": len(rows), "tokens": collected + sum(spent)}
    return cells | {
        "evaluation": evaluations.get(weights._replace(step=steps).key, ended),
        "tokens": collected + sum(spent[:steps]),
        "steps": steps,
        "training": _training(rows[:steps]),
        "longer": longer if len(rows) > steps else None,
    }


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
    done, longer = compared(found, ours)
    at_steps = {seed: cells["evaluation"] for seed, cells in done.items()}
    other = {seed: cells["evaluation"] for seed, cells in (ours or {}).items() if cells}
    at_tokens = {seed: cells["evaluation"] for seed, cells in longer.items()}
    is_equal = equal_tokens and arms.has_rl(name) and bool(at_tokens)
    trained = [cells["training"] for cells in done.values() if "training" in cells]
    is_ours, parts = name == arms.OURS, COLLECTION if done and name != "base" else ()

    def mean(key: str, of: Mapping[int, Cells] = done) -> float:
        return _mean(cells.get(key, 0) for cells in of.values())

    return {
        "label": arms.ARMS[name].label,
        "without_examples": [seed for seed, cells in found.items() if not cells],
        "accuracy": pooled(at_steps, accuracy) if done else None,
        "accuracy_by_seed": dict(by_seed(at_steps)),
        "pass_at_k": {k: pooled(at_steps, at_k(k), k) for k in ks if k > 1} if done else {},
        "ahead": None if is_ours else difference(other, at_steps),
        "training": {k: _mean(row[k] for row in trained) for k in trained[0]} if trained else None,
        "examples": mean("examples"),
        "steps": mean("steps"),
        "tokens": mean("tokens"),
        "steps_tokens": mean("steps", longer),
        "tokens_tokens": mean("tokens", longer),
        "accuracy_tokens": pooled(at_tokens, accuracy) if is_equal else None,
        "ahead_tokens": difference(other, at_tokens) if is_equal and not is_ours else None,
        "collection": {p: _mean(cells["collection"][p] for cells in done.values()) for p in parts},
    }


def compared(
    found: Mapping[int, Cells | None], ours: Mapping[int, Cells | None] | None
) -> tuple[dict[int, Cells], dict[int, Cells]]:
    """By seed, what an arm showed at equal steps, and at as many tokens as ours."""
    done = {seed: cells for seed, cells in found.items() if cells}
    # Where RL did not go on, it had its tokens already. Without ours there was nothing to equal.
    return done, {s: cells["longer"] or cells for s, cells in done.items() if (ours or {}).get(s)}


def accuracy(problem: ProblemCounts) -> float:
    """Share of right samples among the scored ones."""
    return problem.correct / problem.scored


def at_k(k: int) -> Values:
    """pass@k of a problem."""
    return lambda problem: pass_at_k(problem.scored, problem.correct, k)


def pooled(evaluations: Mapping[int, Evaluation], value: Values, least: int = 1) -> Estimate:
    """Mean over seeds and the problems of which every seed has `least` scored samples."""
    tables = [
        {p.problem_id: value(p) for p in evaluation.problems if p.scored >= least}
        for evaluation in evaluations.values()
    ]
    shared = _shared(tables)
    return bootstrap_seeds([[table[i] for i in shared] for table in tables], seed=0)


def pass_curve(evaluations: Mapping[int, Evaluation]) -> list[tuple[int, Estimate]]:
    """(k, pass@k) at the powers of two up to what every problem with scored samples has of them."""
    scored = [p.scored for e in evaluations.values() for p in e.problems if p.scored]
    most = min(scored, default=0)
    return [(k, pooled(evaluations, at_k(k), k)) for k in (2**i for i in range(most.bit_length()))]


def by_seed(evaluations: Mapping[int, Evaluation]) -> list[tuple[int, float]]:
    """(seed, mean accuracy over its problems)."""
    return [(seed, _mean(e.accuracies().values())) for seed, e in evaluations.items()]


def difference(ours: Mapping[int, Evaluation], theirs: Mapping[int, Evaluation]) -> Estimate | None:
    """Accuracy of ours minus theirs, paired by seed and problem; None without a shared seed."""
    pairs = [(ours[s].accuracies(), theirs[s].accuracies()) for s in ours if s in theirs]
    if not pairs:
        return None
    shared = _shared([table for pair in pairs for table in pair])
    return bootstrap_seeds([[a[i] - b[i] for i in shared] for a, b in pairs], seed=0)


def _shared(tables: Sequence[Mapping[str, float]]) -> list[str]:
    shared = [i for i in tables[0] if all(i in table for table in tables)]
    if not shared:
        raise ValueError("no test problem has enough scored samples in all of the evaluations")
    return shared


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


# --- the tables --------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """Both tables, at equal steps and at equal tokens, and the rows where ours is not ahead."""
    rows = found["arms"]
    seeds = ", ".join(map(str, found["seeds"]))
    num = next((row["accuracy"].num_problems for row in rows.values() if row["accuracy"]), None)
    if num is None:
        return "No arm had a single example to learn from: there is nothing to compare.\n"
    over = "seeds and problems" if len(found["seeds"]) > 1 else "problems"
    lines = [
        f"{num} held-out problems, seeds {seeds}; 95 % intervals, bootstrap over "
        f"{over}; differences paired by seed and problem."
    ]
    for table in [steps_table(found), *([tokens_table(found)] if found["equal_tokens"] else [])]:
        lines += ["", table.title, "", *table.markdown()]
    if found["compared_with"]:
        names = ", ".join(rows[name]["label"] for name in found["not_ahead"]) or "none"
        lines += ["", f"{OURS} is not clearly ahead (the interval reaches 0) of: {names}."]
    if found["own_settings"]:
        own = [f"{name}: {' '.join(words)}" for name, words in found["own_settings"].items()]
        lines += ["", f"Settings of single arms: {'; '.join(own)}."]
    left_out = [f"{name} ({why})" for name, why in found.get("left_out", {}).items()]
    lines += ["", f"Left out: {'; '.join(left_out)}."] if left_out else []
    if found.get("about"):
        lines += ["", found["about"]]
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
        at_ks = [interval(row["pass_at_k"].get(k)) for k in ks]
        examples = f"{row['examples']:.0f}" if row["examples"] else ""
        reward = f"{row['training']['reward']:.2f}" if row["training"] else ""
        rows.append([*_cells(name, row, "", top, by_seed, at_ks), examples, reward])
    title = "At equal RL steps. Training reward: last quarter of RL, on the training problems."
    return Table(title, columns, rows, style="arms")


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
            counts = (parts["attempts"], sum(parts.values()) - parts["attempts"])
            spent = [f"{count / 1000:,.0f}" for count in (*counts, row["tokens_tokens"])]
            spent.insert(2, f"{row['steps_tokens']:.0f}")
            seeds = (by_seed or {}).get(name, [])
            arm, *figures = _cells(name, row, "_tokens", top, seeds)
            rows.append([arm, *spent, *figures])
    title = (
        "At equal generated tokens: RL of the others goes on until they have generated as many as "
        f"{OURS}, all data collection included. Thousands of tokens, means of seeds."
    )
    return Table(title, columns, rows, style="arms")


def _top(found: Mapping[str, Any], key: str) -> float:
    return max((row[key].high for row in found["arms"].values() if row[key]), default=0) or 1


def _columns(top: float, ks: Sequence[int], compared_with: str | None) -> list[Column]:
    """Of an arm: its label, accuracy, pass@k, and how far ours is ahead of it."""
    return [
        *heads("*arm", ">accuracy %"),
        Column(f"0 to {short(100 * top)} %, dots: seeds", only="page"),
        *heads(*(f">pass@{k} %" for k in ks)),
        Column(f"{OURS} ahead by, points", "num", "" if compared_with else "text"),
        Column(f"{OURS} is", only="page" if compared_with else "nowhere"),
    ]


def _cells(
    name: str,
    row: Mapping[str, Any],
    at: str,
    top: float,
    by_seed: Sequence[tuple[int, float]],
    at_ks: Sequence[str] = (),
) -> list[str]:
    """The cells under `_columns` at equal steps or, with at="_tokens", tokens; and the seeds."""
    missing = ", ".join(map(str, row["without_examples"]))
    without = f"no example with seed {missing}" if missing else ""
    text = f"{row['label']} ({without})" if missing else row["label"]
    about = element("div", without, class_="note") if missing else None
    label = Cell(text, element("span", dot(arms.ARMS[name].color), row["label"], about))
    accuracy, ahead = row[f"accuracy{at}"], row[f"ahead{at}"]
    drawn = whisker(accuracy, top, arms.ARMS[name].color, by_seed)
    said = [interval(ahead), reading(ahead, "ahead", "behind"), in_percent(by_seed)]
    return [label, interval(accuracy), drawn, *at_ks, *said]


def in_percent(by_seed: Sequence[tuple[int, float]]) -> str:
    """The accuracies of seeds, side by side."""
    return " ".join(f"{100 * value:.1f}" for _, value in by_seed)
