"""One table, three forms: on the console, in Markdown, and on the page.

A cell is text; where the page shows more of it (an interval in grey, a chart), it is a `Cell`.
Everything that goes onto the page is escaped here, with hidden characters written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from intfast.evaluate import Estimate
from intfast.safe_text import printable, shown

PAGE = Path(__file__).with_name("page")


class Cell(str):
    """A text with another form on the page."""

    html: Markup

    def __new__(cls, text: str, html: Markup) -> Cell:
        cell = super().__new__(cls, text)
        cell.html = html
        return cell

    def __html__(self) -> Markup:
        return self.html


class Column(NamedTuple):
    """A column: its heading, how its cells look, and where it is shown."""

    name: str
    kind: str = ""
    """"num" is to the right; "name" and "code" are classes of the page."""
    only: str = ""
    """"page", "text" (console and Markdown), or both where empty."""


def heads(*names: str, only: str = "") -> list[Column]:
    """Columns; those of figures begin with ">", those of names with "*"."""
    kinds = {">": "num", "*": "name"}
    return [Column(n.lstrip(">*"), kinds.get(n[:1], ""), only) for n in names]


class Table(NamedTuple):
    """Rows of cells under columns; a row has a cell for every column, shown or not."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    style: str = ""
    """A class of the page."""

    def rich(self) -> _Fitted:
        """For the console."""
        return _Fitted(self)

    def markdown(self) -> list[str]:
        """Lines of a Markdown file, without the title."""
        columns, rows = self._of("text")
        lines = [[column.name for column in columns], *rows]
        head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
        return [head, "| --- " * len(columns) + "|", *body]

    def __html__(self) -> str:
        columns, rows = self._of("page")
        # Not `rows`: a name of this module's own, so that a template cannot meet Table.rows.
        return render("table.html", columns=columns, lines=rows, style=self.style)

    def _of(self, place: str) -> tuple[list[Column], list[list[str]]]:
        kept = [i for i, column in enumerate(self.columns) if column.only in ("", place)]
        return [self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows]


class _Fitted(NamedTuple):
    """A table for a console of any width, which cuts no number: where it is too narrow, intervals
    go below their values, then columns below others, behind the first one again."""

    table: Table

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[rich.table.Table]:
        columns, rows = self.table._of("text")
        # The text of each column, its heading first.
        texts = [[c.name, *(shown(row[i]) for row in rows)] for i, c in enumerate(columns)]
        room = options.max_width - 1
        if sum(map(_need, columns, texts)) > room:
            texts = [[text.replace(" [", "\n[") for text in column] for column in texts]
        needs = list(map(_need, columns, texts))
        stacks = [[0]]
        for place, need in list(enumerate(needs))[1:]:
            if len(stacks[-1]) > 1 and sum(needs[i] for i in stacks[-1]) + need > room:
                stacks.append([0])
            stacks[-1].append(place)
        for stack in stacks:
            part = rich.table.Table(title_justify="left", caption_justify="left")
            part.title = self.table.title if stack is stacks[0] else None
            part.caption = self.table.caption or None if stack is stacks[-1] else None
            left = room - sum(needs[i] for i in stack)
            for i in stack:
                lines = "\n".join(texts[i]).split("\n")
                width = min(_FRAME + max(map(cell_len, lines)), needs[i] + max(0, left))
                left -= width - needs[i]
                side = "right" if columns[i].kind == "num" else "left"
                part.add_column(texts[i][0], justify=side, width=width - _FRAME, overflow="fold")
            for cells in zip(*(texts[i][1:] for i in stack), strict=True):
                part.add_row(*map(Text, cells))
            yield part


_FRAME = 3
"""Characters around a cell."""


def _need(column: Column, texts: list[str]) -> int:
    """Characters below which a column would be cut: in its lines of figures, in words of texts."""
    head, *cells = texts
    lines = (text.split("\n") if column.kind == "num" else text.split() for text in cells)
    pieces = [*head.split(), *(piece for line in lines for piece in line)]
    return _FRAME + max(map(cell_len, pieces), default=0)


# --- cells -------------------------------------------------------------------------------------


def interval(estimate: Estimate | None, digits: int = 1, scale: float = 100) -> str:
    """ "value [low, high]", in percent; "" without an estimate. In other units: scale=1."""
    if estimate is None:
        return ""
    parts = (estimate.value, estimate.low, estimate.high)
    value, low, high = (f"{scale * part:.{digits}f}" for part in parts)
    range_ = element("span", f"[{low}, {high}]", class_="ci")
    return Cell(f"{value} [{low}, {high}]", element("span", value, " ", range_))


def share(estimate: Estimate) -> str:
    """ "4 of 15"; on the page in percent with its interval."""
    text = f"{round(estimate.value * estimate.num_problems)} of {estimate.num_problems}"
    return Cell(text, Markup("{} of {:,}").format(interval(estimate), estimate.num_problems))


def short(value: float | None) -> str:
    """A number in at most three significant digits."""
    if value is None:
        return ""
    size = abs(value)
    return f"{value:.1e}" if size >= 1e5 or 0 < size < 1e-3 else f"{float(f'{value:.3g}'):g}"


def reading(estimate: Estimate | None, above: str, below: str) -> str:
    """What an interval of a difference says, in words."""
    if estimate is None:
        return ""
    return above if estimate.low > 0 else below if estimate.high < 0 else "not told apart"


# --- the page ----------------------------------------------------------------------------------


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An HTML or SVG element; texts are escaped, None is left out, lists are laid flat.

    `class_` is `class`, `data_run` is `data-run`; an attribute that is None or False is left out.
    """
    words = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            words += " " + key.rstrip("_").replace("_", "-")
            words += "" if value is True else f'="{_escape(value)}"'
    inside = "".join(_escape(child) for child in _flat(children) if child is not None)
    return Markup(f"<{tag}{words}>{inside}</{tag}>")


def note(*children: Any) -> Markup:
    """A small paragraph."""
    return element("p", *children, class_="note")


def fold(summary: str, *children: Any, open: bool = False) -> Markup:
    """A block that can be folded."""
    body = element("div", *children, class_="body")
    return element("details", element("summary", summary), body, class_="block", open=open)


def render(name: str, **values: Any) -> Markup:
    """A template of page/, filled; autoescape is on."""
    return Markup(_templates.get_template(name).render(**values))


def _finalize(value: Any) -> Any:
    return value if hasattr(value, "__html__") else printable(str(value))


def _escape(value: Any) -> str:
    return str(escape(_finalize(value)))


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else [value]


_templates = Environment(
    loader=FileSystemLoader(PAGE),
    autoescape=True,
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
