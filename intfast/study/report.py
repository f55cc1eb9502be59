"""One self-contained HTML page of a run, of several side by side, or of a comparison.

python -m intfast.report RUN [RUN ...] [--out FILE]
python -m intfast.report COMPARISON [--out FILE]

The page holds its style, script and data and loads nothing; long texts are packed. What a model
wrote is data in it: `<` never occurs inside a data block, the script puts texts into text nodes
only, and a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import zlib
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import msgspec

import intfast
from intfast.safe_text import shown
from intfast.state.command import outcome
from intfast.state.files import write_atomic
from intfast.study import compare_page, repeats
from intfast.study.browser import browse
from intfast.study.page_data import collect_all

USAGE = """\
usage: python -m intfast.report RUN [RUN ...] [--out FILE]

Writes one HTML page about a run folder, or the folder of a comparison, to report.html in it; or
about several runs, side by side, to report.html here. Runs that differ in their seed alone are also
pooled. A run that has not finished gives a page of what is there.
"""
PAGE = Path(__file__).with_name("page")
SCRIPTS = ("dom.js", "charts.js", "sections.js", "compare.js", "browser.js", "main.js")


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of these run folders to `out`, atomically; returns `out`.

    Raises ValueError when a folder holds no run that this version can read.
    """
    write_atomic(out, page(runs).encode())
    return out


def page(runs: Sequence[Path]) -> str:
    """The page of these run folders, or of one comparison, as text."""
    title, folders, found = _gather(runs)
    items = [browse(folder) for folder in folders]
    for run, texts in zip(found["runs"], items, strict=True):
        run |= {key: texts.pop(key) for key in ("scored", "trained")}
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    texts = [_packed(f"items-{i}", part) for i, part in enumerate(items)]
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        version=html.escape(intfast.__version__),
        title=html.escape(f"{title} - intfast"),
        style=style,
        script=script,
        figures=_block("runs", found),
        # Behind the script: the figures are drawn before the texts are read.
        texts="\n".join(texts),
    )


def _gather(folders: Sequence[Path]) -> tuple[str, list[Path], dict[str, Any]]:
    """A title, the folders whose interventions can be read, and all figures."""
    compared = [folder for folder in folders if compare_page.is_comparison(folder)]
    if not compared:
        found = collect_all(folders)
        names = [run["name"] for run in found["runs"]]
        found["pooled"] = repeats.pooled(folders, names)
        return ", ".join(names), list(folders), found
    if len(folders) > 1:
        raise ValueError(
            f"{compared[0]} holds a comparison, which has a page of its own; expected it alone, "
            "or run folders only"
        )
    comparison = compare_page.collect(compared[0])
    ours = compare_page.ours(compared[0])
    found = collect_all(list(ours.values()))
    for run, name in zip(found["runs"], ours, strict=True):
        run["name"] = name
    return comparison["name"], list(ours.values()), found | {"comparison": comparison}


def _block(name: str, value: Any) -> str:
    """A data block: JSON in which no character can end the element or begin a comment in it."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _packed(name: str, value: Any) -> str:
    """A data block of base64 of zlib of JSON: fewer bytes to parse when the page opens."""
    data = base64.b64encode(zlib.compress(msgspec.json.encode(value), 6)).decode()
    return f'<script type="text/plain" id="{name}">{data}</script>'


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code, as `intfast.train` does."""
    words = list(arguments)
    if not words or "--help" in words or "-h" in words:
        print(USAGE)
        return 0 if words else 2

    with outcome("nothing was written") as ended:
        out = None
        if "--out" in words:
            place = words.index("--out")
            out = Path(*words[place + 1 : place + 2])
            if len(words) == place + 1:
                raise ValueError("--out: expected a file name after it, got none")
            del words[place : place + 2]
        if unknown := [word for word in words if word.startswith("-")]:
            raise ValueError(f"unknown option {unknown[0]}; see --help")
        runs = [Path(word) for word in words]
        if not runs:
            raise ValueError("expected at least one run folder, got none")
        if out is None:
            out = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
        print(shown(f"wrote {write(runs, out)}"))
    return ended.code
