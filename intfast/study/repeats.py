"""Runs that differ in their seed alone, pooled: intervals over seeds and problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli
from intfast.evaluate import Evaluation
from intfast.study import compare_table
from intfast.study.page_data import in_order, interval, label, read_evaluations, read_json


def pooled(folders: Sequence[Path], names: Sequence[str]) -> list[dict[str, Any]]:
    """Per group of two or more runs: its names, seeds, rows by weights, and their differences.

    A group has the same settings, test problems and model, and no seed twice.
    """
    groups: dict[str, list[tuple[int, str, dict[str, Evaluation]]]] = defaultdict(list)
    for folder, name in zip(folders, names, strict=True):
        config = cli.load(folder / "config.toml")
        manifest = read_json(folder, "manifest.json") or {}
        same = cli.to_toml(msgspec.structs.replace(config, seed=0, run="run"))
        key = f"{same}\n{manifest.get('test')}\n{manifest.get('model_files')}"
        groups[key].append((config.seed, name, read_evaluations(folder)))
    found = []
    for members in groups.values():
        seeds = [seed for seed, _, _ in members]
        if len(members) > 1 and len(set(seeds)) == len(seeds):
            found.append(_group(members))
    return [group for group in found if group["rows"]]


def _group(members: Sequence[tuple[int, str, dict[str, Evaluation]]]) -> dict[str, Any]:
    shared = set.intersection(*({n for n in e if "@" not in n} for _, _, e in members))
    tables = {n: {seed: e[n] for seed, _, e in members} for n in in_order(shared)}
    # Without a problem that every seed has scored there is nothing to pool.
    tables = {n: table for n, table in tables.items() if compare_table.shared_problems(table)}
    weights = list(tables)
    return {
        "names": [name for _, name, _ in members],
        "seeds": [seed for seed, _, _ in members],
        "rows": [
            {
                "name": name,
                "label": label(name),
                "accuracy": interval(compare_table.pooled(table, compare_table.accuracy)),
                "by_seed": compare_table.by_seed(table),
                "pass": [[k, *interval(e)] for k, e in compare_table.pass_curve(table)],
            }
            for name, table in tables.items()
        ],
        "differences": [
            [label(more), label(less), *interval(found)]
            for place, less in enumerate(weights)
            for more in weights[place + 1 :]
            if (found := compare_table.difference(tables[more], tables[less]))
        ],
    }
