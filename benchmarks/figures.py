"""Draw the README's figures from the stored rows: one SVG file each, readable at phone width.

python -m benchmarks.figures [--results FOLDER]

Reads cpu.jsonl there and writes figures/*.svg beside it; the same rows and the same Matplotlib give
the same bytes. The last row of `quickstart` and of each part of `evidence` counts, as the default
run folder and the shipped base made it.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from intfast.labels import label
from intfast.study.read import read_rows

COLORS = {"base": "#6b6862", "base_rl": "#b85c00", "int": "#1d5ba8", "int_rl": "#0a7a68"}
"""Weights of a run -> colour."""
PHASE = {"reference_rl": "#b85c00", "reflection_rl": "#7a3d9c", "int_rl": "#0a7a68"}
"""Arm of a cell -> colour."""
POINTS = ("#1d5ba8", "#b85c00", "#0a7a68", "#8a2f6b", "#6b6862", "#a08000")
"""Colours of arms, by name."""
BUDGETS = {"accuracy": "at equal RL steps", "accuracy_tokens": "at equal generated tokens"}
CURVES = {
    "reward": ("Reward on training problems", "mean of a step's rollouts"),
    "zero_advantage": ("Groups without an advantage", "share of a step's groups"),
    "length": ("Length", "mean tokens of a rollout"),
    "entropy_sampled": ("Entropy of the policy", "nats, mean over sampled tokens"),
}
WINDOW = 5
"""Steps in the centred mean of a curve."""
INK, MUTED, LINE = "#1d1c1a", "#625e57", "#dfdbd3"
WIDTH = 6.4
"""Inches of 72 pixels: a phone shows a figure at about three quarters of that, still readable."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "intfast",
    # A label may hold a dollar sign.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}


def arms(tables: Mapping[str, Mapping[str, Any]], note: str) -> Figure:
    """Held-out accuracy of every arm at equal RL steps with its interval, one colour a table."""
    first = next(iter(tables.values()))
    names = [name for name, arm in first["arms"].items() if arm["accuracy"]]
    problems = first["arms"][names[0]]["accuracy"]["num_problems"]
    note = (
        f"Accuracy on {problems} held-out problems, mean over seeds "
        f"{', '.join(map(str, first['seeds']))}, equal RL steps. Bars: 95 % intervals, bootstrap "
        f"over seeds and problems. {note}"
    )
    title = "Held-out accuracy of the arms"
    figure, (axes,) = _figure(title, note, 1, 1.1 + 0.36 * len(names))
    for (text, found), color, shift in zip(
        tables.items(), (COLORS["int"], COLORS["base_rl"]), (-0.16, 0.16), strict=False
    ):
        rows = [found["arms"].get(name, {}) for name in names]
        _bars(axes, [row.get("accuracy") for row in rows], shift, color, text)
    labels = [first["arms"][name]["label"] for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    for tick, text in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if text.startswith("InT") else "normal")
    _scale(axes, len(tables))
    return figure


def _bars(
    axes: Axes, estimates: Sequence[Mapping[str, float] | None], shift: float, color: str, name: str
) -> None:
    """The estimates of one colour, row by row from above, with their intervals and values."""
    for place, estimate in enumerate(estimates):
        if not estimate:
            continue
        value, low, high = (100 * estimate[part] for part in ("value", "low", "high"))
        y, named = place + shift, {"label": name} if name else {}
        axes.plot([low, high], [y, y], color=color, lw=2.5, solid_capstyle="round", **named)
        axes.plot([value], [y], "o", color=color, ms=5)
        axes.annotate(
            f"{value:.1f}", (high, y), (6, 0), textcoords="offset points", va="center",
            size=8, color=MUTED,
        )  # fmt: skip
        name = ""


def _scale(axes: Axes, columns: int) -> None:
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, borderpad=0)


def phase(row: Mapping[str, Any]) -> Figure:
    """Accuracy after RL of InT and its rivals in every cell: where the order flips."""
    found = row["figures"]["cells"]
    cells = sorted(found, key=lambda cell: (cell["rewrite"] is not None, -cell["problems"]))
    seeds = ", ".join(sorted({str(seed) for cell in cells for seed in cell["found"]["seeds"]}))
    note = (
        "q: share of the routine steps that references leave out; SFT light, middle, hard: lr "
        "2.5e-4 x 8, 1e-3 x 8, 2e-3 x 16 epochs; own dialect: whole right solutions by a program "
        "in the place of the references, r left out. Accuracy after RL, 95 % intervals; seeds "
        f"{seeds}. {source(row)}"
    )
    figure, (axes,) = _figure("Where the order flips", note, 1, 0.8 + 0.42 * len(cells))
    for (name, color), shift in zip(PHASE.items(), (-0.24, 0.0, 0.24), strict=True):
        rows = [cell["found"]["arms"].get(name, {}).get("accuracy") for cell in cells]
        _bars(axes, rows, shift, color, label(name))
    axes.set_yticks(range(len(cells)), [_cell_label(cell) for cell in cells])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    _scale(axes, len(PHASE))
    return figure


def _cell_label(cell: Mapping[str, Any]) -> str:
    whole = "" if cell["rewrite"] is None else f", own dialect, r = {cell['rewrite']:g}"
    return f"q = {cell['q']:g}, SFT {cell['strength']}, {cell['problems']} problems{whole}"


def pass_at_k(row: Mapping[str, Any]) -> Figure:
    """pass@k of base, RL, InT, InT + RL with bands, logarithmic in k."""
    stored = row["figures"]["analysis"]["pass_at_k"]
    curves = {key: stored[key] for key in COLORS if stored.get(key)}
    problems = next(iter(curves["base"].values()))["num_problems"]
    note = (
        f"Share of {problems} held-out problems of which at least one of k samples is right, "
        f"unbiased estimate. Bands: 95 % intervals, bootstrap over problems. {source(row)}"
    )
    figure, (axes,) = _figure("pass@k before and after training", note, 1, 3.9)
    ends = []
    for key, curve in curves.items():
        ks = sorted(map(int, curve))
        value, low, high = (
            [100 * curve[str(k)][part] for k in ks] for part in ("value", "low", "high")
        )
        axes.fill_between(ks, low, high, color=COLORS[key], alpha=0.15, lw=0)
        axes.plot(ks, value, "o-", color=COLORS[key], ms=4, label=label(key))
        ends.append((value[-1], COLORS[key], f"{label(key)} {value[-1]:.0f} %"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, list(map(str, ks)))
    axes.minorticks_off()
    axes.set_xlabel("k, samples of a problem")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.yaxis.set_major_formatter("{x:g} %")
    _names(axes, ks[-1], ends)
    return figure


def likelihood(row: Mapping[str, Any]) -> Figure:
    """Accuracy after SFT against the NLL of its data under the base, a point for arm and seed."""
    points, stored = row["figures"]["points"], row["figures"]["correlations"]["all"]
    rho = "" if stored["spearman"] is None else f"Spearman {stored['spearman']:.2f}"
    if rho and stored["interval"]:
        rho += " [{:.2f}, {:.2f}]".format(*stored["interval"])
    note = (
        f"{len(points)} trainings. NLL: per token of the training data under the base. {rho}, all "
        f"SFT settings together; bootstrap over points. {source(row)}"
    )
    figure, (axes,) = _figure("Likely data teach more?", note, 1, 3.9)
    shapes = dict(zip(sorted({p["sft"] for p in points}), "os^Dv", strict=False))
    for name, color in zip(sorted({p["arm"] for p in points}), POINTS, strict=False):
        for sft, shape in shapes.items():
            own = [p for p in points if (p["arm"], p["sft"]) == (name, sft)]
            values = [100 * p["accuracy"] for p in own]
            text = f"{label(name)}, {sft}" if own else None
            axes.plot([p["nll"] for p in own], values, shape, color=color, ms=5, label=text)
    axes.set_xscale("log")
    axes.set_xlabel("NLL of the training data, nats per token")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.legend(fontsize=8)
    return figure


def _names(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the ends of lines (y, colour, text), moved apart where they would overlap."""
    step = 0.07 * axes.get_ylim()[1]
    free = float("inf")
    for y, color, text in sorted(ends, reverse=True):
        free = min(y, free - step)
        axes.annotate(
            text, (x, free), (9, 0), textcoords="offset points", va="center", color=color,
            annotation_clip=False,
        )  # fmt: skip


def rl_curves(row: Mapping[str, Any]) -> Figure:
    """Reward, zero-advantage share, length and entropy of RL and InT + RL, step by step."""
    found = row["figures"]["analysis"]["rl_curves"]
    keys = [key for key in ("base_rl", "int_rl") if key in found]
    note = f"Faint: every step; line: centred mean of {WINDOW} steps. One run. {source(row)}"
    figure, panels = _figure("RL from the base and from InT", note, len(CURVES), 8.2)
    for axes, (name, (title, unit)) in zip(panels, CURVES.items(), strict=True):
        axes.set_title(title, loc="left", size=10, weight="bold")
        axes.set_title(unit, loc="right", size=9, color=MUTED)
        for key in keys:
            pairs = zip(found[key]["step"], found[key][name], strict=True)
            steps, values = zip(*((x, y) for x, y in pairs if y is not None), strict=True)
            axes.plot(steps, values, color=COLORS[key], lw=1, alpha=0.35)
            axes.plot(steps, rolling(values), color=COLORS[key], label=label(key))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.locator_params(axis="y", nbins=4)
    panels[-1].set_xlabel("RL step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", ncols=2)
    return figure


def rolling(values: Sequence[float]) -> list[float]:
    """Centred means of WINDOW neighbours."""
    half = WINDOW // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def _figure(title: str, note: str, panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a title above and a note below its panels, which share their steps."""
    lines = textwrap.wrap(note.replace(" %", "\u00a0%"), 100)
    figure = Figure(figsize=(WIDTH, height + 0.17 * len(lines) + 0.6), facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", weight="bold", size=12)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    figure.supxlabel("\n".join(lines), x=0.012, ha="left", size=8.5, color=MUTED)
    return figure, list(axes)


def svg(figure: Figure) -> str:
    """The file of a figure; without a date, so that the same figure is the same file."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    # Matplotlib ends some lines in spaces.
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


# --- rows --------------------------------------------------------------------------------------


def source(row: Mapping[str, Any]) -> str:
    """Which row of the results a figure shows."""
    return f'Row "{row["benchmark"]}" of {row["time"][:10]}, commit {row["commit"][:7]}.'


def last_rows(file: Path) -> dict[str, dict[str, Any]]:
    """What a row shows -> the last such row whose run folder is the default one: `quickstart`,
    `evidence q=1`, `evidence q=0`, `evidence cells`.

    Raises ValueError where the file does not exist.
    """
    found = {}
    for row in read_rows(file, finished=True):
        name, given, setting = row["benchmark"], row.get("arguments", {}), row.get("setting", {})
        if name not in RUNS or RUNS[name] not in (given.get("run"), given.get("runs")):
            continue
        if name == "evidence":
            if setting["base"] != "base":
                continue
            name += f" q={setting['q']:g}" if "q" in setting else " cells"
        found[name] = row
    return found


RUNS = {
    "quickstart": "runs/quickstart_int",
    "evidence": "runs/evidence",
    "likelihood": "runs/evidence",
}
"""Benchmark -> the run folder of the rows that are drawn."""


def draw(rows: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    """File name -> figure, for the rows that hold what a figure needs."""
    found = {}
    titles = {"evidence q=1": "terse references", "evidence q=0": "complete references"}
    if tables := {text: rows[name] for name, text in titles.items() if name in rows}:
        shown = {text: row["figures"]["table"] for text, row in tables.items()}
        found["arms.svg"] = arms(shown, source(next(iter(tables.values()))))
    if row := rows.get("evidence cells"):
        found["phase.svg"] = phase(row)
    if row := rows.get("likelihood"):
        found["likelihood.svg"] = likelihood(row)
    if (row := rows.get("quickstart")) and "analysis" in row["figures"]:
        found["pass_at_k.svg"] = pass_at_k(row)
        found["rl_curves.svg"] = rl_curves(row)
    return found


def files(rows: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """File name -> its SVG."""
    with matplotlib.rc_context(STYLE):
        return {name: svg(figure) for name, figure in draw(rows).items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    folder = parser.parse_args().results
    (folder / "figures").mkdir(exist_ok=True)
    for name, text in files(last_rows(folder / "cpu.jsonl")).items():
        (folder / "figures" / name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / 'figures' / name}")


if __name__ == "__main__":
    main()
