"""Accuracy after SFT against how likely its data were: over all arms, seeds and cells.

    python -m benchmarks likelihood --runs runs/evidence

Reads every finished comparison below the folder. NLL of an arm's training data is that of their
loss tokens under the base, as example_logprobs.jsonl of its run holds them (at most
metrics.example_logprobs examples, evenly spread), in nats per token, mean over examples. Rank
correlation (Spearman) with 95 % intervals, bootstrap over points: over all, and over those of one
SFT setting. Where it breaks: the points whose rank by accuracy is farthest from that by NLL.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intfast import cli
from intfast.labels import Weights
from intfast.state.files import read_json
from intfast.study import arms
from intfast.study.read import TokenLogprobs, read_evaluations, read_rows

NAME = "likelihood"
BROKEN = 5
"""Points that are named as farthest from the order."""
Point = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the comparisons are."""
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="%(default)s")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: the points, the correlations, and where they break."""
    folders = sorted(path.parent for path in args.runs.rglob("compare.json"))
    points = [p for folder in folders for p in points_of(folder, args.runs)]
    if len(points) < 3:
        raise SystemExit(
            f"expected at least 3 arms with SFT in finished comparisons below {args.runs}, got "
            f"{len(points)}; run python -m benchmarks evidence, or intfast.compare, first"
        )
    figures = {"points": points, "correlations": correlations(points), "breaks": breaks(points)}
    print(table(figures))
    args.runs = str(args.runs)
    return [{"setting": {"comparisons": len(folders)}, "figures": figures}]


def points_of(folder: Path, root: Path) -> list[Point]:
    """One point for each seed and arm with SFT of a finished comparison, of those with examples."""
    stored = read_json(folder / "compare.json")
    names, found = list(stored["arms"]), []
    for name in filter(arms.needs_sft, arms.runs(names)):
        for seed in stored["seeds"]:
            run_folder = folder / f"seed-{seed}" / name
            rows = read_rows(run_folder / "example_logprobs.jsonl", TokenLogprobs)
            if not rows:
                continue
            losses = [[-x for x in row.base if x is not None] for row in rows]
            config = cli.load(run_folder / "config.toml").sft
            after = read_evaluations(run_folder)[Weights(arms.family(name)).key]
            accuracies = after.accuracies().values()
            found.append(
                {
                    "comparison": str(folder.relative_to(root)),
                    "arm": arms.family(name),
                    "seed": seed,
                    "sft": f"lr {config.optim.lr:g} x {config.epochs}",
                    "nll": sum(sum(x) / len(x) for x in losses) / len(losses),
                    "nll_trace": sum(map(sum, losses)) / len(losses),
                    "accuracy": sum(accuracies) / len(accuracies),
                }
            )
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs. Example: [3, 1, 3] -> [1.5, 0, 1.5]."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Rank correlation; None where all of one side are equal."""
    a, b = ranks(xs), ranks(ys)
    middle = (len(a) - 1) / 2
    aa, bb = sum((x - middle) ** 2 for x in a), sum((y - middle) ** 2 for y in b)
    if not aa or not bb:
        return None
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / (aa * bb) ** 0.5


def correlations(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """ "all" and each SFT setting -> points, and Spearman of NLL and accuracy with its interval."""
    settings = sorted({point["sft"] for point in points})
    groups = {"all": list(points)}
    groups |= {name: [p for p in points if p["sft"] == name] for name in settings}
    found = {}
    for name, group in groups.items():
        numbers, drawn = random.Random(0), []
        for _ in range(2000 if len(group) > 2 else 0):
            again = [numbers.choice(group) for _ in group]
            if (value := _of(again)) is not None:
                drawn.append(value)
        drawn.sort()
        ends = [drawn[int(share * (len(drawn) - 1))] for share in (0.025, 0.975)] if drawn else None
        found[name] = {"points": len(group), "spearman": _of(group), "interval": ends}
    return found


def _of(points: Sequence[Point]) -> float | None:
    return spearman([p["nll"] for p in points], [p["accuracy"] for p in points])


def breaks(points: Sequence[Point]) -> list[Point]:
    """The points farthest from the order; `ranks_above` > 0: better than their NLL says."""
    likely = ranks([-point["nll"] for point in points])
    right = ranks([point["accuracy"] for point in points])
    found = [p | {"ranks_above": b - a} for p, a, b in zip(points, likely, right, strict=True)]
    return sorted(found, key=lambda point: -abs(point["ranks_above"]))[:BROKEN]


def table(figures: dict[str, Any]) -> str:
    """Correlations and breaks, in Markdown."""
    lines = ["| SFT | points | Spearman of NLL and accuracy |", "| --- " * 3 + "|"]
    for name, row in figures["correlations"].items():
        value, ends = row["spearman"], row["interval"]
        text = "all equal" if value is None else f"{value:.2f}"
        text += f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends and value is not None else ""
        lines.append(f"| {name} | {row['points']} | {text} |")
    lines += ["", "| farthest from the order | NLL | accuracy % | ranks above |"]
    lines.append("| --- " * 4 + "|")
    for p in figures["breaks"]:
        name = f"{p['comparison']}, {p['arm']}, {p['sft']}, seed {p['seed']}"
        cells = f"{p['nll']:.3f} | {100 * p['accuracy']:.1f} | {p['ranks_above']:+.1f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)
