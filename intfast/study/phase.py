"""The page of a folder of comparisons, its cells: who wins in each, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from intfast import cli
from intfast.evaluate import Estimate
from intfast.study import arms, compare_page
from intfast.study.charts import dotted, whisker
from intfast.study.page_data import Section, toml
from intfast.study.tables import Cell, Column, Table, element, heads, interval, note, reading

SETTLED = ("ahead", "not told apart", "behind")
READ = (
    "The best rival is the other arm of the highest accuracy in that cell, chosen by the same "
    "samples, which favours it a little. Differences are paired by seed and problem; brackets are "
    "95 % intervals. Cells stand in the order of the difference."
)


class Compared(NamedTuple):
    """A cell: its comparison, and ours against the best of the others."""

    name: str
    arms: dict[str, dict[str, Any]]
    about: str
    settings: dict[str, str]
    rival: str
    ahead: Estimate

    @property
    def settled(self) -> str:
        """One of SETTLED."""
        return reading(self.ahead, "ahead", "behind")


def folders(root: Path) -> list[Path]:
    """The comparisons in a folder that is none itself."""
    found = sorted(path.parent for path in root.glob("*/compare.json"))
    return [] if compare_page.is_comparison(root) else found


def gather(root: Path) -> tuple[str, list[Any], list[Section]]:
    """Title, header and sections; raises ValueError where no comparison has ours and a rival."""
    every = [read(folder) for folder in folders(root)]
    cells = sorted((c for c in every if c), key=lambda cell: -cell.ahead.value)
    if not cells:
        raise ValueError(f"no comparison in {root} has {arms.OURS} and another arm with examples")
    title = root.resolve().name
    text = f"{len(cells)} comparisons, of {len(every)} in this folder, beside each other."
    header = [element("h1", title), element("p", text, class_="muted")]
    header += [compare_page.assumed(text) for text in dict.fromkeys(c.about for c in cells) if text]
    return title, header, [Section("cells", "Cells", "Where the order flips", _parts(cells))]


def read(folder: Path) -> Compared | None:
    """A cell, or None where it lacks ours or a rival with a measured difference."""
    found = compare_page.read(folder)
    rivals = {n: row for n, row in found["arms"].items() if n != arms.OURS and row["ahead"]}
    if not rivals:
        return None
    best = max(rivals, key=lambda name: rivals[name]["accuracy"].value)
    first = folder / f"seed-{found['seeds'][0]}" / "collection" / "config.toml"
    changed = cli.differences(cli.load(first)) if first.is_file() else {}
    settings = {key: toml(new) for key, (_, new) in changed.items() if key not in ("run", "seed")}
    about, ahead = found.get("about", ""), rivals[best]["ahead"]
    return Compared(folder.name, found["arms"], about, settings, best, ahead)


def _parts(cells: list[Compared]) -> list[Any]:
    ours, low = arms.ARMS[arms.OURS].label, min(cell.ahead.low for cell in cells)
    top = max(cell.ahead.high for cell in cells)
    low, top = min(low, 0.0), max(top, 0.0)
    items = []
    for settled in SETTLED:
        if names := "; ".join(cell.name for cell in cells if cell.settled == settled):
            items.append(element("li", element("b", settled), f": {names}."))
    changed = sorted({key for cell in cells for key in cell.settings})
    values = {key: {cell.settings.get(key) for cell in cells} for key in changed}
    shown = [key for key, found in values.items() if len(found) > 1]
    names = [n for n in arms.ARMS if any(n in cell.arms for cell in cells)]
    scale = f"{100 * low:.0f} to {100 * top:.0f} points"
    columns = heads("*cell", scale, f">{ours} minus the best rival", f"{ours} is", "best rival")
    columns += heads(*(f">{arms.ARMS[n].label} %" for n in names))
    rows = []
    for cell in cells:
        link = Cell(cell.name, element("a", cell.name, href=f"{quote(cell.name)}/report.html"))
        color = arms.ARMS[cell.rival if cell.settled == "behind" else arms.OURS].color
        drawn = whisker(cell.ahead, top, color, low=low)
        rival = dotted(cell.arms[cell.rival]["label"], arms.ARMS[cell.rival].color)
        own = [interval(cell.arms[n]["accuracy"]) if n in cell.arms else "" for n in names]
        rows.append([link, drawn, interval(cell.ahead), cell.settled, rival, *own])
    lines = [[c.name, *(c.settings.get(key, "default") for key in shown)] for c in cells]
    settings = Table("", [Column("cell"), *(Column(key, "code") for key in shown)], lines)
    return [
        element("p", element("b", f"Against the best rival of each cell, {ours} is")),
        element("ul", items, class_="verdicts"),
        Table("", columns, rows, style="arms"),
        note(READ),
        *([element("h3", "What differs between the cells"), settings] if shown else []),
    ]
