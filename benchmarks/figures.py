"""Draw the README's figures from the stored rows: one SVG file each, light and dark, phone width.

python -m benchmarks.figures [--results FOLDER]

Reads cpu.jsonl there and writes figures/*.svg beside it; the same rows give the same bytes. The
last row of `compare`, `tuned_compare` and `quickstart` counts, as their default run folder made it.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS

WIDTH, MARGIN = 480, 16
"""A phone shows the figure at about three quarters of this many pixels: text stays readable."""
STYLE = """
svg { --bg: #fff; --ink: #1d1c1a; --muted: #625e57; --line: #dfdbd3;
  --c0: #6b6862; --c1: #b85c00; --c2: #1d5ba8; --c3: #0a7a68; }
@media (prefers-color-scheme: dark) { svg { --bg: #1b1d22; --ink: #e9e7e2; --muted: #a8a49b;
  --line: #34373f; --c0: #a8a49b; --c1: #eda04a; --c2: #78aef2; --c3: #4cc4a9; } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.head { font-size: 16px; font-weight: 600; } .ours { font-weight: 600; }
.muted { font-size: 13px; fill: var(--muted); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.card { fill: var(--bg); stroke: var(--line); } .grid { stroke: var(--line); fill: none; }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round; }
.raw { fill: none; opacity: .35; } .band { stroke: none; opacity: .15; }
.range { stroke-width: 3; stroke-linecap: round; }
"""
WEIGHTS = {"base": "base", "base_rl": "RL", "int": "InT", "int_rl": "InT + RL"}
"""Weights of a run -> label; their place is their colour."""
CURVES = {
    "reward": ("Reward on training problems", "mean of a step's rollouts"),
    "zero_advantage": ("Groups without an advantage", "share of a step's groups"),
    "length": ("Length", "mean tokens of a rollout"),
    "entropy_sampled": ("Entropy of the policy", "nats, mean over sampled tokens"),
}
WINDOW = 5
"""Steps in the centred mean of a curve."""


class Scale(NamedTuple):
    """A linear map of values to pixels."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values in range."""
        raw = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 9) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


# --- elements ----------------------------------------------------------------------------------


def tag(name: str, text: str = "", **attributes: Any) -> str:
    """An element; a trailing underscore of an attribute is dropped, others become dashes."""
    words = []
    for key, value in attributes.items():
        text_of = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(text_of)}"')
    return f"<{name}{''.join(words)}>{html.escape(text)}</{name}>"


def label(x: float, y: float, text: str, class_: str = "", **more: Any) -> str:
    """A line of text with its baseline at y."""
    return tag("text", text, x=x, y=y, class_=class_, **more)


def paint(place: int, kind: str = "stroke") -> dict[str, str]:
    """The style of a colour of the palette."""
    return {"style": f"{kind}: var(--c{place % 4})"}


def path(points: Iterable[tuple[float, float]]) -> str:
    """The `d` of a line through pixels."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def figure(title: str, body: Sequence[str], height: float, note: str) -> str:
    """The file: a card with a title, what was drawn, and a note below it."""
    # No line ends between a figure and its unit.
    lines = textwrap.wrap(note.replace(" %", "\u00a0%"), 66)
    bottom = height + 18 * len(lines) + 8
    parts = [
        tag("title", f"{title}. {note}"),
        f"<style>{STYLE}</style>",
        tag("rect", class_="card", x=0.5, y=0.5, width=WIDTH - 1, height=bottom - 1, rx=8),
        label(MARGIN, 28, title, "head"),
        *body,
        *(label(MARGIN, height + 12 + 18 * i, line, "muted") for i, line in enumerate(lines)),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:g}"'
    size = f' width="{WIDTH}" height="{bottom:g}" role="img">'
    return head + size + "\n" + "\n".join(parts) + "\n</svg>\n"


def legend(entries: Sequence[tuple[int, str]], y: float) -> list[str]:
    """Dots with their names, in one line."""
    drawn, x = [], float(MARGIN + 5)
    for place, name in entries:
        drawn.append(tag("circle", cx=x, cy=y - 5, r=5, **paint(place, "fill")))
        drawn.append(label(x + 11, y, name))
        x += 32 + 7.6 * len(name)
    return drawn


# --- figures -----------------------------------------------------------------------------------


def arms(row: Mapping[str, Any], found: Mapping[str, Any], title: str) -> str:
    """Held-out accuracy of every arm with its interval, at equal steps and at equal tokens."""
    listed = [arm for arm in found["arms"].values() if arm["accuracy"]]
    estimates = [e for arm in listed for e in (arm["accuracy"], arm["accuracy_tokens"]) if e]
    most = max(estimate["high"] for estimate in estimates)
    scale = Scale(0, 100 * most or 1, MARGIN + 6, WIDTH - MARGIN - 44)
    marks, y = [], 84.0
    for arm in listed:
        is_ours = arm["label"].startswith("InT")
        marks.append(label(MARGIN, y, arm["label"], "ours" if is_ours else ""))
        y += 13
        for place, key in ((2, "accuracy"), (1, "accuracy_tokens")):
            if arm[key]:
                marks += whisker(scale, y, place, arm[key])
                y += 15
        y += 14
    axis = y - 12
    grid = []
    for value in scale.ticks(5):
        x = scale(value)
        grid.append(tag("line", class_="grid", x1=x, x2=x, y1=66, y2=axis))
        marks.append(label(x, axis + 17, f"{value:g} %", "muted middle"))
    note = (
        f"Accuracy on {listed[0]['accuracy']['num_problems']} held-out problems, mean over seeds "
        f"{', '.join(map(str, found['seeds']))}. Bars: 95 % intervals, bootstrap over seeds and "
        f"problems. {source(row)}"
    )
    names = legend([(2, "at equal RL steps"), (1, "at equal generated tokens")], 54)
    return figure(title, [*names, *grid, *marks], axis + 30, note)


def whisker(scale: Scale, y: float, place: int, estimate: Mapping[str, float]) -> list[str]:
    """An interval with its mean, and the mean in figures behind it."""
    value, low, high = (scale(100 * estimate[key]) for key in ("value", "low", "high"))
    return [
        tag("line", class_="range", x1=low, x2=high, y1=y, y2=y, **paint(place)),
        tag("circle", cx=value, cy=y, r=4.5, **paint(place, "fill")),
        label(max(high, value + 5) + 6, y + 4.5, f"{100 * estimate['value']:.1f}", "muted"),
    ]


def pass_at_k(row: Mapping[str, Any]) -> str:
    """pass@k of base, RL, InT, InT + RL with bands, logarithmic in k."""
    curves = {n: row["figures"]["analysis"]["pass_at_k"].get(n) for n in WEIGHTS}
    curves = {name: curve for name, curve in curves.items() if curve}
    ks = sorted({int(k) for curve in curves.values() for k in curve})
    top, bottom, last = 48.0, 300.0, WIDTH - MARGIN - 116
    across = Scale(0, math.log2(ks[-1]), MARGIN + 44, last)
    most = max(e["high"] for curve in curves.values() for e in curve.values())
    up = Scale(0, 100 * most, bottom, top)
    body = [piece for value in up.ticks(5) for piece in grid_row(up, value, last, " %")]
    body += [label(across(math.log2(k)), bottom + 18, str(k), "muted middle") for k in ks]
    body.append(
        label((MARGIN + 44 + last) / 2, bottom + 38, "k, samples of a problem", "muted middle")
    )
    ends = []
    for name, curve in curves.items():
        place, points = list(WEIGHTS).index(name), sorted((int(k), e) for k, e in curve.items())
        places = [across(math.log2(k)) for k, _ in points]
        lines = [[up(100 * e[key]) for _, e in points] for key in ("value", "low", "high")]
        value, low, high = (list(zip(places, line, strict=True)) for line in lines)
        body.append(
            tag("path", class_="band", d=path(high + low[::-1]) + "Z", **paint(place, "fill"))
        )
        body.append(tag("path", class_="line", d=path(value), **paint(place)))
        body += [tag("circle", cx=x, cy=y, r=3, **paint(place, "fill")) for x, y in value]
        ends.append((value[-1][1], place, f"{WEIGHTS[name]} {100 * points[-1][1]['value']:.0f} %"))
    body += end_labels(last + 8, ends)
    problems = next(iter(curves["base"].values()))["num_problems"]
    note = (
        f"Share of {problems} held-out problems of which at least one of k samples is right, "
        f"unbiased estimate. Bands: 95 % intervals, bootstrap over problems. {source(row)}"
    )
    return figure("pass@k before and after training", body, bottom + 48, note)


def end_labels(x: float, ends: Iterable[tuple[float, int, str]]) -> list[str]:
    """Names at the ends of lines (y, colour, text), moved apart where they would overlap."""
    drawn, free = [], math.inf
    for y, place, text in sorted(ends, reverse=True):
        free = min(y + 5, free - 18)
        drawn.append(tag("circle", cx=x + 4, cy=free - 5, r=4, **paint(place, "fill")))
        drawn.append(label(x + 13, free, text))
    return drawn


def grid_row(up: Scale, value: float, last: float, unit: str = "") -> list[str]:
    """A horizontal grid line with its value on the left."""
    y, x = up(value), MARGIN + 40
    return [
        tag("line", class_="grid", x1=x, x2=last, y1=y, y2=y),
        label(x - 6, y + 4, f"{value:g}{unit}", "muted end"),
    ]


def rl_curves(row: Mapping[str, Any]) -> str:
    """Reward, zero-advantage share, length and entropy of RL and InT + RL, step by step."""
    found = row["figures"]["analysis"]["rl_curves"]
    names = [name for name in ("base_rl", "int_rl") if name in found]
    steps = found[names[0]]["step"]
    last = WIDTH - MARGIN - 4
    across = Scale(steps[0], max(steps[-1], steps[0] + 1), MARGIN + 44, last)
    body = legend([(list(WEIGHTS).index(name), WEIGHTS[name]) for name in names], 54)
    y = 84.0
    for key, (title, unit) in CURVES.items():
        body += [label(MARGIN, y, title, "ours"), label(last, y, unit, "muted end")]
        drawn = {name: [v for v in found[name][key] if v is not None] for name in names}
        most = max(max(values) for values in drawn.values())
        up = Scale(0, most or 1, y + 116, y + 16)
        body += [piece for value in up.ticks(3) for piece in grid_row(up, value, last)]
        for name in names:
            pairs = zip(found[name]["step"], found[name][key], strict=True)
            points = [(across(step), value) for step, value in pairs if value is not None]
            body += curve_lines(points, up, list(WEIGHTS).index(name))
        y += 146
    body += [label(across(v), y - 8, f"{v:g}", "muted middle") for v in across.ticks(6)]
    body.append(label(WIDTH / 2, y + 12, "RL step", "muted middle"))
    note = f"Faint: every step; line: centred mean of {WINDOW} steps. One run. {source(row)}"
    return figure("RL from the base and from InT", body, y + 22, note)


def curve_lines(points: Sequence[tuple[float, float]], up: Scale, place: int) -> list[str]:
    """Every value, faint, and the centred mean, of (pixel, value) pairs."""
    half = WINDOW // 2
    means = []
    for i, (x, _) in enumerate(points):
        near = [value for _, value in points[max(0, i - half) : i + half + 1]]
        means.append((x, up(sum(near) / len(near))))
    raw = [(x, up(value)) for x, value in points]
    return [
        tag("path", class_="raw", d=path(raw), **paint(place)),
        tag("path", class_="line", d=path(means), **paint(place)),
    ]


# --- rows --------------------------------------------------------------------------------------


def source(row: Mapping[str, Any]) -> str:
    """Which row of the results a figure shows."""
    return f'Row "{row["benchmark"]}" of {row["time"][:10]}, commit {row["commit"][:7]}.'


def last_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> its last row whose run folder is the default one.

    Raises ValueError where the file does not exist.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected the rows of python -m benchmarks")
    found = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        given = row.get("arguments", {})
        if RUNS.get(row["benchmark"]) in (given.get("run"), given.get("runs")):
            found[row["benchmark"]] = row
    return found


RUNS = {
    "compare": "runs/compare_quickstart",
    "tuned_compare": "runs/tuned_compare",
    "quickstart": "runs/quickstart",
}
"""Benchmark -> the run folder of the rows that are drawn."""


def draw(rows: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """File name -> SVG, for the rows that hold what a figure needs."""
    found = {}
    if row := rows.get("compare"):
        found["arms.svg"] = arms(row, row["figures"], "Held-out accuracy of the arms")
    if row := rows.get("tuned_compare"):
        title = "Held-out accuracy, each arm at its own best"
        found["tuned_arms.svg"] = arms(row, row["figures"]["table"], title)
    if (row := rows.get("quickstart")) and "analysis" in row["figures"]:
        found["pass_at_k.svg"] = pass_at_k(row)
        found["rl_curves.svg"] = rl_curves(row)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    folder = parser.parse_args().results
    (folder / "figures").mkdir(exist_ok=True)
    for name, text in draw(last_rows(folder / "cpu.jsonl")).items():
        (folder / "figures" / name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / 'figures' / name}")


if __name__ == "__main__":
    main()
