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
from intfast.study.tables import Cell, element, short

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


def color(place: int) -> str:
    """The class of a colour of the palette."""
    return f"c{place % 8}"


def chart(
    title: str,
    about: str,
    lines: Sequence[Line],
    *,
    log_x: bool = False,
    unit: str = "",
    x_name: str = "step",
    from_zero: bool = True,
    wide: bool = False,
) -> Markup | None:
    """One chart, or None without a point."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    width, height = (560, 250) if wide else (360, 190)
    place = math.log2 if log_x else float
    xs = sorted({point.x for point in points})
    ys = [y for p in points for y in (p.y, p.low, p.high) if y is not None]
    across = _scale(place(xs[0]), place(xs[-1]), LEFT, width - RIGHT, 0.5)
    low, high = min(ys), max(ys)
    low = min(0.0, low) if from_zero else low
    if low == high:
        pad = abs(low) * 0.1 or 0.1
        low, high = low - (pad if low else 0), high + pad
    up = _scale(low, high, height - BOTTOM, TOP)

    def at(x: float) -> float:
        return across(place(x))

    drawn = [_grid_row(up(value), value, width, unit) for value in _ticks(low, high, 4)]
    marks = xs if log_x else [v for v in _ticks(xs[0], xs[-1], 5) if v == round(v)]
    for value in marks[:: math.ceil(len(marks) / 8) or 1]:
        drawn.append(
            element("text", short(value), x=_px(at(value)), y=height - 10, text_anchor="middle")
        )
    drawn += [_line(line, at, up) for line in lines]
    drawn += _hits(lines, xs, at, unit, x_name, height)
    svg = element("svg", drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    caption = element("figcaption", element("b", title), about)
    return element("figure", caption, svg, class_="wider" if wide else None)


def legend(names: Sequence[tuple[str, int]], mark: str = "dot") -> Markup:
    """Names with the dots, or swatches, of their colours."""
    entries = [element("span", dot(place, mark), name) for name, place in names]
    return element("div", entries, class_="legend")


def dot(place: int, mark: str = "dot") -> Markup:
    """A spot of colour."""
    return element("i", class_=f"{mark} {color(place)}")


def dotted(text: str, place: int) -> Cell:
    """A name with the dot of its colour, for a table cell."""
    return Cell(text, element("span", dot(place), text))


def whisker(
    estimate: Estimate | None, top: float, place: int, dots: Sequence[tuple[str, float]] = ()
) -> str:
    """A value with its interval on a scale from 0 to `top`, for a table cell.

    dots: (text, value) of single seeds, below it
    """
    if estimate is None:
        return ""
    at = _scale(0, top or 1, 4, 156)
    low, high, value = map(_px, map(at, (estimate.low, estimate.high, estimate.value)))
    drawn = [
        element("line", class_="grid", x1=4, x2=156, y1=8, y2=8),
        element("line", class_=f"range {color(place)}", x1=low, x2=high, y1=8, y2=8),
        element("circle", class_=f"spot {color(place)}", cx=value, cy=8, r=4.5),
    ]
    for text, seed in dots:
        mark = element("title", text)
        drawn.append(element("circle", mark, class_="seed", cx=_px(at(seed)), cy=16.5, r=2.4))
    box = f"0 0 160 {20 if dots else 16}"
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
    svg = element("svg", drawn, viewBox="0 0 160 20", preserveAspectRatio="none", class_="bar")
    return Cell("", svg)


def tenths(counts: Sequence[int], about: str) -> Markup:
    """Ten bars, one for each tenth of an attempt."""
    drawn = []
    for i, count in enumerate(counts):
        size = 66 * count / (max(counts) or 1)
        x = 10 + i * 34
        drawn.append(
            element("rect", class_="c2", x=x, y=_px(80 - size), width=28, height=_px(size))
        )
        number = count or ""
        drawn.append(element("text", number, x=x + 14, y=_px(75 - size), text_anchor="middle"))
    drawn += [
        element("line", class_="grid", x1=8, x2=350, y1=80.5, y2=80.5),
        element("text", "first steps", x=10, y=95),
        element("text", "last steps", x=344, y=95, text_anchor="end"),
    ]
    words = f"located steps by tenth: {', '.join(map(str, counts))}"
    svg = element("svg", drawn, viewBox="0 0 360 100", role="img", aria_label=words)
    return element("figure", element("figcaption", about), svg)


# --- parts of a chart --------------------------------------------------------------------------


def _scale(
    low: float, high: float, first: float, last: float, pad: float = 0.0
) -> Callable[[float], float]:
    """A linear map of values to pixels; `pad` widens a range without width."""
    if low == high:
        low, high = low - pad, high + pad
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values in a range."""
    raw = (high - low) / count or 1
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _grid_row(y: float, value: float, width: int, unit: str) -> list[Markup]:
    return [
        element("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=_px(y), y2=_px(y)),
        element("text", short(value) + unit, x=LEFT - 6, y=_px(y + 4), text_anchor="end"),
    ]


def _line(line: Line, at: Callable[[float], float], up: Callable[[float], float]) -> list[Markup]:
    paint = color(line.color)
    points = [(at(p.x), up(p.y)) for p in line.points]
    drawn = []
    ranged = [p for p in line.points if p.low is not None]
    if len(ranged) > 1:
        band = [(at(p.x), up(p.high)) for p in ranged]
        band += [(at(p.x), up(p.low)) for p in reversed(ranged)]
        drawn.append(element("path", class_=f"band {paint}", d=_path(band) + "Z"))
    if line.window > 1:
        drawn.append(element("path", class_=f"raw {paint}", d=_path(points)))
    smooth = [(x, y) for (x, _), y in zip(points, _rolling(points, line.window), strict=True)]
    dash = "5 3" if line.dashed else None
    drawn.append(element("path", class_=f"line {paint}", d=_path(smooth), stroke_dasharray=dash))
    if line.dots or len(points) < 2:
        r = 2 if len(points) > 12 else 3
        spot = f"spot {paint}"
        drawn += [element("circle", class_=spot, cx=_px(x), cy=_px(y), r=r) for x, y in points]
    return drawn


def _rolling(points: Sequence[tuple[float, float]], window: int) -> list[float]:
    """The centred means of `window` neighbours."""
    half, found = window // 2, []
    for i in range(len(points)):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        found.append(sum(near) / len(near))
    return found


def _hits(
    lines: Sequence[Line], xs: Sequence[float], at: Any, unit: str, x_name: str, height: int
) -> list[Markup]:
    """Strips that say the values of all lines at their place."""
    tables = [(line.label, {p.x: p for p in line.points}) for line in lines]
    shown = xs[:: math.ceil(len(xs) / MAX_HITS)]
    places = [at(x) for x in shown]
    edges = [(a + b) / 2 for a, b in pairwise(places)]
    edges = [places[0] - 12, *edges, places[-1] + 12]
    found = []
    for i, x in enumerate(shown):
        said = [f"{label}: {_said(table[x], unit)}" for label, table in tables if x in table]
        title = element("title", "\n".join([f"{x_name} {short(x)}", *said]))
        box = {"x": _px(edges[i]), "width": _px(max(0.1, edges[i + 1] - edges[i]))}
        found.append(
            element("rect", title, class_="hit", y=TOP, height=height - TOP - BOTTOM, **box)
        )
    return found


def _said(point: Point, unit: str) -> str:
    text = short(point.y) + unit
    if point.low is not None:
        text += f" [{short(point.low)}, {short(point.high)}]"
    return text + (f" of {point.of} problems" if point.of else "")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_px(x)} {_px(y)}" for x, y in points)


def _px(value: float) -> str:
    return f"{value:.1f}"
