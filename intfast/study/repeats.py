"""Runs that differ in their seed alone, pooled: intervals over seeds and problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import msgspec

from intfast import cli
from intfast.evaluate import Estimate, Evaluation
from intfast.labels import in_order, label
from intfast.study import compare_table
from intfast.study.charts import dotted, whisker
from intfast.study.page_data import RunData
from intfast.study.results import Difference, difference_table
from intfast.study.tables import Table, element, heads, interval, note, short


class Group(NamedTuple):
    """Two or more runs with the same settings, test problems and model, and no seed twice."""

    names: list[str]
    seeds: list[int]
    tables: dict[str, dict[int, Evaluation]]
    """Weights -> seed -> evaluation."""

    def accuracy(self, key: str) -> Estimate:
        """Of weights, over seeds and problems."""
        return compare_table.pooled(self.tables[key], compare_table.accuracy)

    def differences(self) -> list[Difference]:
        """Of every pair of weights, paired by seed and problem."""
        return [
            (label(more), label(less), found)
            for less, more in combinations(self.tables, 2)
            if (found := compare_table.difference(self.tables[more], self.tables[less]))
        ]


def groups(runs: Sequence[RunData]) -> list[Group]:
    """The runs that repeat each other."""
    alike: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        same = cli.to_toml(msgspec.structs.replace(run.config, seed=0, run="run"))
        about = f"{run.manifest.get('test')}\n{run.manifest.get('model_files')}"
        alike[f"{same}\n{about}"].append(run)
    found = []
    for members in alike.values():
        seeds = [run.config.seed for run in members]
        if len(members) > 1 and len(set(seeds)) == len(seeds):
            shared = set.intersection(*(set(run.finals) for run in members))
            tables = {
                key: {run.config.seed: run.finals[key] for run in members}
                for key in in_order(list(shared))
            }
            # Without a problem that every seed has scored there is nothing to pool.
            tables = {k: t for k, t in tables.items() if compare_table.shared_problems(t)}
            found.append(Group([run.name for run in members], seeds, tables))
    return [group for group in found if group.tables]


def pooled(runs: Sequence[RunData]) -> list[Any]:
    """The groups as parts of the page's results."""
    parts: list[Any] = []
    for group in groups(runs):
        text = (
            f"{', '.join(group.names)} differ in their seed alone. Means over seeds and problems; "
            "95 % intervals by drawing both again with replacement (bootstrap, 2,000 times); of "
            "few seeds they tell little more than their spread. Differences are paired by seed "
            "and problem."
        )
        seeds = ", ".join(map(str, group.seeds))
        parts += [element("h3", f"Over seeds {seeds}"), note(text), _table(group)]
        if differences := group.differences():
            parts.append(difference_table(differences))
    return parts


def _table(group: Group) -> Table:
    accuracy = {key: group.accuracy(key) for key in group.tables}
    curves = {key: dict(compare_table.pass_curve(table)) for key, table in group.tables.items()}
    ks = sorted({k for curve in curves.values() for k in curve if k > 1})
    top = max(estimate.high for estimate in accuracy.values()) or 1
    scale = f"0 to {short(100 * top)} %, dots: seeds"
    columns = heads("*weights", ">accuracy %", scale, *(f">pass@{k} %" for k in ks), ">by seed %")
    rows = []
    for place, (key, estimate) in enumerate(accuracy.items()):
        by_seed = compare_table.by_seed(group.tables[key])
        drawn = whisker(estimate, top, place, compare_table.seed_dots(by_seed))
        figures = [interval(curves[key].get(k)) for k in ks]
        seeds = compare_table.in_percent(by_seed)
        rows.append([dotted(label(key), place), interval(estimate), drawn, *figures, seeds])
    return Table("", columns, rows, style="arms")
