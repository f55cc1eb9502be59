"""Draw the README's figures from the stored rows: one SVG file each, readable at phone width.

python -m benchmarks.figures [--results FOLDER]

Reads cpu.jsonl there and writes figures/*.svg beside it; the same rows and the same Matplotlib give
the same bytes. The last row of `compare`, `tuned_compare` and `quickstart` counts, as their default
run folder made it.
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


def arms(row: Mapping[str, Any], found: Mapping[str, Any], title: str) -> Figure:
    """Held-out accuracy of every arm with its interval, at equal steps and at equal tokens."""
    listed = [arm for arm in found["arms"].values() if arm["accuracy"]]
    note = (
        f"Accuracy on {listed[0]['accuracy']['num_problems']} held-out problems, mean over seeds "
        f"{', '.join(map(str, found['seeds']))}. Bars: 95 % intervals, bootstrap over seeds and "
        f"problems. {source(row)}"
    )
    figure, (axes,) = _figure(title, note, 1, 1.1 + 0.36 * len(listed))
    for (key, budget), color, shift in zip(
        BUDGETS.items(), (COLORS["int"], COLORS["base_rl"]), (-0.16, 0.16), strict=True
    ):
        drawn = [(place + shift, arm[key]) for place, arm in enumerate(listed) if arm[key]]
        for number, (y, e) in enumerate(drawn):
            value, low, high = (100 * e[part] for part in ("value", "low", "high"))
            name = None if number else budget
            axes.plot([low, high], [y, y], color=color, lw=2.5, solid_capstyle="round", label=name)
            axes.plot([value], [y], "o", color=color, ms=5)
            axes.annotate(
                f"{value:.1f}", (high, y), (6, 0), textcoords="offset points", va="center",
                size=8, color=MUTED,
            )  # fmt: skip
    axes.set_yticks(range(len(listed)), [arm["label"] for arm in listed])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    for tick, arm in zip(axes.get_yticklabels(), listed, strict=True):
        tick.set_fontweight("bold" if arm["label"].startswith("InT") else "normal")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    return figure


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
    """Benchmark -> its last row whose run folder is the default one.

    Raises ValueError where the file does not exist.
    """
    found = {}
    for row in read_rows(file, finished=True):
        given = row.get("arguments", {})
        if RUNS.get(row["benchmark"]) in (given.get("run"), given.get("runs")):
            found[row["benchmark"]] = row
    return found


RUNS = {
    "compare": "runs/compare_quickstart",
    "tuned_compare": "runs/tuned_compare",
    "quickstart": "runs/quickstart",
    "likelihood": "runs/evidence",
}
"""Benchmark -> the run folder of the rows that are drawn."""


def draw(rows: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    """File name -> figure, for the rows that hold what a figure needs."""
    found = {}
    if row := rows.get("compare"):
        found["arms.svg"] = arms(row, row["figures"], "Held-out accuracy of the arms")
    if row := rows.get("tuned_compare"):
        title = "Held-out accuracy, each arm at its own best"
        found["tuned_arms.svg"] = arms(row, row["figures"]["table"], title)
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
