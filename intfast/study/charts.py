"""Charts of the page as SVG; the values are in `<title>` elements, where a pointer finds them.

Colours are classes "c0" to "c7": the page's policy allows no style attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

from intfast.evaluate import Estimate
from intfast.study.tables import Cell, element, render, short

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 26
MAX_HITS = 200
"""Places of a chart that tell their values; of more steps some stay silent."""


class Point(NamedTuple):
    """A value at a step, with an interval and the problems behind it where it has them."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    of: int | None = None


class Line(NamedTuple):
    """A named line of a chart."""

    label: str
    color: int
    points: Sequence[Point]
    window: int = 1
    """Points in the centred mean that is drawn, the points themselves being faint."""
    dots: bool = False
    dashed: bool = False


def percent(x: float, e: Estimate) -> Point:
    """An estimate as a point of a chart."""
    return Point(x, 100 * e.value, 100 * e.low, 100 * e.high, e.num_problems)


def color(place: int) -> str:
    """The class of a colour of the palette."""
    return f"c{place % 8}"


def chart(
    title: str,
    about: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    log_k: bool = False,
    from_zero: bool = True,
    wide: bool = False,
) -> Markup | None:
    """One chart over steps, or over k on a logarithmic scale; None without a point."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    width, height = (560, 250) if wide else (360, 190)
    xs = sorted({point.x for point in points})
    ys = [y for p in points for y in (p.y, p.low, p.high) if y is not None]
    low, high = min(ys), max(ys)
    low = min(0.0, low) if from_zero else low
    if low == high:
        pad = abs(low) * 0.1 or 0.1
        low, high = low - (pad if low else 0), high + pad
    up = _scale(low, high, height - BOTTOM, TOP)
    place = math.log2 if log_k else float
    along = _scale(place(xs[0]), place(xs[-1]), LEFT, width - RIGHT)

    def at(x: float) -> float:
        return along(place(x))

    marks = xs if log_k else [v for v in _ticks(xs[0], xs[-1], 5) if v == round(v)]
    return render(
        "chart.html",
        title=title,
        about=about,
        size=(width, height),
        edges=(LEFT, width - RIGHT, TOP, height - TOP - BOTTOM),
        wide=wide,
        rows=[(_px(up(value)), short(value) + unit) for value in _ticks(low, high, 4)],
        marks=[(_px(at(v)), short(v)) for v in marks[:: math.ceil(len(marks) / 8) or 1]],
        lines=[_drawn(line, at, up) for line in lines],
        hits=_hits(lines, xs, at, unit, "k =" if log_k else "step"),
    )


def legend(names: Sequence[tuple[Any, ...]], mark: str = "dot") -> Markup:
    """(name, colour, ...) with the dots, or swatches, of their colours."""
    entries = [element("span", dot(place, mark), name) for name, place, *_ in names]
    return element("div", entries, class_="legend")


def dot(place: int, mark: str = "dot") -> Markup:
    """A spot of colour."""
    return element("i", class_=f"{mark} {color(place)}")


def dotted(text: str, place: int) -> Cell:
    """A name with the dot of its colour, for a table cell."""
    return Cell(text, element("span", dot(place), text))


def whisker(
    estimate: Estimate | None,
    top: float,
    place: int,
    by_seed: Sequence[tuple[int, float]] = (),
    low: float = 0.0,
) -> str:
    """A value with its interval on a scale from `low` to `top`, for a table cell.

    by_seed: (seed, value) of single seeds, as dots below it
    """
    if estimate is None:
        return ""
    at, paint = _scale(low, top or 1, 4, 156), color(place)
    left, right, value = (_px(at(v)) for v in (estimate.low, estimate.high, estimate.value))
    drawn = [
        element("line", class_="grid", x1=4, x2=156, y1=8, y2=8),
        # Of differences: where there is none.
        element("line", class_="grid", x1=_px(at(0)), x2=_px(at(0)), y1=0, y2=16) if low else None,
        element("line", class_=f"range {paint}", x1=left, x2=right, y1=8, y2=8),
        element("circle", class_=f"spot {paint}", cx=value, cy=8, r=4.5),
    ]
    for seed, v in by_seed:
        mark = element("title", f"seed {seed}: {100 * v:.1f} %")
        drawn.append(element("circle", mark, class_="seed", cx=_px(at(v)), cy=16.5, r=2.4))
    box = f"0 0 160 {20 if by_seed else 16}"
    return Cell("", element("svg", drawn, viewBox=box, aria_hidden="true"))


def bar(parts: Sequence[tuple[str, float, int]], whole: float) -> str:
    """(text, size, colour) side by side, as shares of `whole`, for a table cell."""
    drawn, x = [], 0.0
    for text, size, place in parts:
        if size:
            share = 160 * size / (whole or 1)
            box = {"x": _px(x), "width": _px(share), "y": 0, "height": 20}
            drawn.append(element("rect", element("title", text), class_=color(place), **box))
            x += share
    box = "0 0 160 20"
    return Cell("", element("svg", drawn, viewBox=box, preserveAspectRatio="none", class_="bar"))


# --- parts of a chart --------------------------------------------------------------------------

Scale = Callable[[float], float]


def _scale(low: float, high: float, first: float, last: float) -> Scale:
    """A linear map of values to pixels; a range without width is in the middle."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values in a range."""
    raw = (high - low) / count or 1
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _drawn(line: Line, at: Scale, up: Scale) -> dict[str, Any]:
    """A line for the template: its colour, paths of several kinds, and dots."""
    xs, ys = [at(p.x) for p in line.points], [p.y for p in line.points]
    half = line.window // 2
    near = [ys[max(0, i - half) : i + half + 1] for i in range(len(ys))]
    paths = []
    if len(ranged := [p for p in line.points if p.low is not None]) > 1:
        band = [(p.x, p.high) for p in ranged] + [(p.x, p.low) for p in reversed(ranged)]
        paths.append(("band", _path([(at(x), up(y)) for x, y in band]) + "Z"))
    if line.window > 1:
        paths.append(("raw", _path([(x, up(y)) for x, y in zip(xs, ys, strict=True)])))
    smooth = [(x, up(sum(part) / len(part))) for x, part in zip(xs, near, strict=True)]
    paths.append(("line dashed" if line.dashed else "line", _path(smooth)))
    dots = [(_px(x), _px(up(y))) for x, y in zip(xs, ys, strict=True)]
    shown = dots if line.dots or len(dots) < 2 else []
    return {"paint": color(line.color), "paths": paths, "dots": shown, "r": 2 + (len(dots) <= 12)}


def _hits(
    lines: Sequence[Line], xs: Sequence[float], at: Scale, unit: str, x_name: str
) -> list[tuple[str, str, str]]:
    """(x, width, text) of strips that say the values of all lines at their place."""
    tables = [(line.label, {p.x: p for p in line.points}) for line in lines]
    shown = xs[:: math.ceil(len(xs) / MAX_HITS)]
    places = [at(x) for x in shown]
    edges = [(a + b) / 2 for a, b in pairwise(places)]
    edges = [places[0] - 12, *edges, places[-1] + 12]
    found = []
    for x, (left, right) in zip(shown, pairwise(edges), strict=True):
        text = f"{x_name} {short(x)}"
        for label, table in tables:
            if p := table.get(x):
                text += f"\n{label}: {short(p.y)}{unit}"
                text += "" if p.low is None else f" [{short(p.low)}, {short(p.high)}]"
                text += f" of {p.of} problems" if p.of else ""
        found.append((_px(left), _px(max(0.1, right - left)), text))
    return found


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_px(x)} {_px(y)}" for x, y in points)


def _px(value: float) -> str:
    return f"{value:.1f}"
