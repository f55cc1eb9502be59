"""A finished comparison as plain data for its page: compare.json, and what its run folders add.

The estimates are those of compare.json; curves, tokens by purpose, settings and folders are read
from the runs of the arms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli
from intfast.study import arms, compare_table
from intfast.study.page_data import interval, read_json, read_rows, short, toml

SERIES = ("reward", "zero_advantage", "all_wrong", "length", "truncated", "entropy_sampled")
"""The curves of RL that are shown, arm beside arm."""
ESTIMATES = ("accuracy", "ahead", "accuracy_tokens", "ahead_tokens")


def is_comparison(folder: Path) -> bool:
    """Whether a folder was made by intfast.study.compare."""
    return (folder / "compare.json").is_file() or any(folder.glob("seed-*/collection"))


def ours(folder: Path) -> dict[str, Path]:
    """Name -> run folder of our arm, one per seed, whose interventions the page shows."""
    found = _read(folder)
    name = next((name for name in (arms.OURS, "int") if name in found["arms"]), "")
    folders = {
        f"seed {seed}": folder / f"seed-{seed}" / arms.run_of(name, list(found["arms"]))
        for seed in found["seeds"]
        if name
    }
    return {name: path for name, path in folders.items() if (path / "summary.json").is_file()}


def collect(folder: Path) -> dict[str, Any]:
    """Everything of a comparison but its interventions.

    Raises ValueError where it has not finished or holds what this version does not know.
    """
    found = _read(folder)
    names, seeds = list(found["arms"]), found["seeds"]
    runs = {name: arms.run_of(name, names) for name in names if name != "base"}
    # The arm whose settings the others are shown against.
    standard = runs.get(arms.OURS, "collection")
    first = folder / f"seed-{seeds[0]}"
    config = cli.load(first / standard / "config.toml")
    manifest = read_json(first / "collection", "manifest.json") or {}
    return {
        "name": folder.resolve().name,
        "seeds": seeds,
        "ks": found["ks"],
        "samples": config.evaluate.samples,
        "sampling": msgspec.to_builtins(config.evaluate.sampling),
        "model": config.model.path,
        "compared_with": found["compared_with"],
        "manifest": {key: value for key, value in manifest.items() if key != "starts"},
        "arms": [_arm(folder, name, names, found) for name in names],
        "steps": config.rl.steps,
        "curves": {
            name: curves
            for name in names
            if arms.ARMS[name].evaluation.endswith("_rl")
            and (curves := _curves(folder, runs[name], arms.ARMS[name].evaluation, seeds))
        },
        "standard": standard,
        "settings": [
            [key, *map(toml, pair)]
            for key, pair in cli.differences(config).items()
            if key not in ("run", "seed")
        ],
        "own": [
            [run, [name for name in runs if runs[name] == run], _own(first / run, config)]
            for run in dict.fromkeys(runs.values())
        ],
        "given": found.get("own_settings", {}),
        "folders": [
            [seed, run, _state(folder / f"seed-{seed}" / run)]
            for seed in seeds
            for run in ["collection", *dict.fromkeys(runs.values())]
        ],
    }


def _read(folder: Path) -> dict[str, Any]:
    found = read_json(folder, "compare.json")
    if found is None:
        raise ValueError(
            f"{folder} holds a comparison that has not finished: it has no compare.json; repeat "
            "its command, or name run folders in it"
        )
    if unknown := [name for name in found["arms"] if name not in arms.ARMS]:
        raise ValueError(f"{folder}/compare.json: this version knows no arm {', '.join(unknown)}")
    return found


def _arm(folder: Path, name: str, names: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """A row: the stored estimates, each seed's accuracy, and pass@k at powers of two."""
    row = found["arms"][name]
    cells = {s: compare_table.measure(folder, name, names, s) for s in found["seeds"]}
    done = {seed: cell for seed, cell in cells.items() if cell}
    at_steps = {seed: cell["evaluation"] for seed, cell in done.items()}
    ours = (
        {s: compare_table.measure(folder, arms.OURS, names, s) for s in found["seeds"]}
        if (found["compared_with"])
        else {}
    )
    longer = {
        seed: (cell["longer"] or cell)["evaluation"]
        for seed, cell in done.items()
        if ours.get(seed)
    }
    estimates = {key: _interval(row[key]) for key in ESTIMATES}
    rollouts = {
        key: row[key] - sum(row["collection"].values()) for key in ("tokens", "tokens_tokens")
    }
    return estimates | {
        "name": name,
        "family": arms.family(name),
        "label": row["label"],
        "without_examples": row["without_examples"],
        "by_seed": compare_table.by_seed(at_steps),
        "by_seed_tokens": compare_table.by_seed(longer) if row["accuracy_tokens"] else [],
        "pass": [[k, *interval(e)] for k, e in compare_table.pass_curve(at_steps)],
        "training": row["training"],
        "examples": row["examples"],
        "collection": row["collection"],
        "rollouts": [rollouts["tokens"], rollouts["tokens_tokens"]],
        "steps": [row["steps"], row["steps_tokens"]],
    }


def _interval(stored: Mapping[str, Any] | None) -> list[Any] | None:
    if stored is None:
        return None
    return [short(stored[key]) for key in ("value", "low", "high", "num_problems")]


def _curves(folder: Path, run: str, stage: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Series -> [[step, mean, lowest, highest]] over the seeds, at steps that all of them have."""
    tables: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with_rows = 0
    for seed in seeds:
        rows = read_rows(folder / f"seed-{seed}" / run, "metrics", dict)
        rows = [row for row in rows if row["stage"] == stage]
        with_rows += bool(rows)
        for row in rows:
            # Hinted rollouts are no measure of the bare problem.
            row["reward"] = row.get("reward_bare", row["reward"])
            for name in SERIES:
                if row.get(name) is not None:
                    tables[name][row["step"]].append(row[name])
    return {
        name: [
            [step, short(sum(values) / len(values)), short(min(values)), short(max(values))]
            for step, values in sorted(steps.items())
            if len(values) == with_rows
        ]
        for name, steps in tables.items()
    }


def _own(folder: Path, config: Any) -> list[str]:
    """The settings of a run that differ from `config`."""
    if not (folder / "config.toml").is_file():
        return []
    found = cli.differences(cli.load(folder / "config.toml"), config)
    return [f"{key}={toml(new)}" for key, (_, new) in found.items() if key != "run"]


def _state(folder: Path) -> str:
    if (folder / "skipped.json").is_file():
        return "no example to learn from"
    if folder.name == "collection":
        return "shared attempts and interventions"
    return "finished" if (folder / "summary.json").is_file() else "not finished"
