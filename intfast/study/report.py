"""One self-contained HTML page of a run, of several side by side, or of a comparison.

python -m intfast.report RUN [RUN ...] [--out FILE]
python -m intfast.report COMPARISON [--out FILE]
python -m intfast.report FOLDER_OF_COMPARISONS [--out FILE]

The page holds its style, script and data and loads nothing; long texts are packed. What a model
wrote is data in it: `<` never occurs inside a data block, the script puts texts into text nodes
only, and a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from markupsafe import Markup

import intfast
from intfast import cli, intervene, ranks
from intfast.labels import STARTS
from intfast.safe_text import shown
from intfast.state.command import outcome, say
from intfast.state.files import write_atomic
from intfast.study import compare_page, phase, results, sections
from intfast.study.browser import browse
from intfast.study.page_data import RunData, Section, load_all
from intfast.study.tables import PAGE, render

USAGE = """\
usage: python -m intfast.report RUN [RUN ...] [--out FILE]

Writes one HTML page about a run folder, the folder of a comparison, or a folder of comparisons (who
wins in each of them), to report.html in it; or about several runs, side by side, to report.html
here. A run that has not finished gives a page of what is there.
"""


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of these run folders to `out`, atomically; returns `out`.

    Raises ValueError when a folder holds no run that this version can read.
    """
    write_atomic(out, page(runs).encode())
    return out


def page(folders: Sequence[Path]) -> str:
    """The page of these run folders, or of one comparison, as text."""
    title, header, parts, runs = gather(folders)
    files = ("page.css", "browser.js", "detail.js")
    style, *scripts = (Markup((PAGE / name).read_text(encoding="utf-8")) for name in files)
    script = Markup("\n").join(scripts)
    figures = [
        {"name": run.name, "candidates": len(run.interventions), "scored": run.texts["scored"]}
        for run in runs
    ]
    policy = f"style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    return render(
        "page.html",
        policy=f"default-src 'none'; {policy}; form-action 'none'",
        version=intfast.__version__,
        title=title,
        style=style,
        script=script,
        header=header,
        sections=parts,
        figures=_block({"runs": figures, "gates": intervene.GATES, "starts": STARTS}),
        texts=[_packed(run.texts) for run in runs],
    )


def gather(folders: Sequence[Path]) -> tuple[str, list[Any], list[Section], list[RunData]]:
    """A title, the header, the sections, and the runs whose interventions can be read."""
    compared = [folder for folder in folders if compare_page.is_comparison(folder)]
    if compared and len(folders) > 1:
        raise ValueError(
            f"{compared[0]} holds a comparison, which has a page of its own; expected it alone, "
            "or run folders only"
        )
    if compared:
        about = compare_page.About(compared[0])
        ours = about.ours()
        runs = load_all(list(ours.values()), list(ours))
        title, header = about.folder.resolve().name, compare_page.header(about)
        before, after = compare_page.sections(about)
    elif len(folders) == 1 and phase.folders(folders[0]):
        title, header, before = phase.gather(folders[0])
        after, runs = [], []
    else:
        runs = load_all(folders)
        title, header = ", ".join(run.name for run in runs), sections.header(runs)
        before, after = [results.results(runs)], [sections.training(runs)]
        after += [part(runs) for part in (sections.time, sections.grading, sections.settings)]
    for run in runs:
        run.texts = browse(run)
    middle = sections.interventions(runs) if runs else []
    return title, header, [*before, *middle, *after], runs


def _block(value: Any) -> Markup:
    """JSON in which no character can end the element around it or begin a comment in it."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _packed(value: Any) -> Markup:
    """base64 of zlib of JSON: fewer bytes to parse when the page opens."""
    return Markup(base64.b64encode(zlib.compress(msgspec.json.encode(value), 6)).decode())


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code, as `intfast.train` does."""
    words = list(arguments)
    if not words or "--help" in words or "-h" in words:
        return say(USAGE, 0 if words else 2)

    with outcome("nothing was written") as ended:
        ranks.require_one()
        name = ""
        if "--out" in words:
            place = words.index("--out")
            if len(words) == place + 1:
                raise ValueError("--out: expected a file name after it, got none")
            _, name = words.pop(place), words.pop(place)
        if unknown := [word for word in words if word.startswith("-")]:
            raise ValueError(f"unknown option {unknown[0]}; see --help")
        if not words:
            raise ValueError("expected at least one run folder, got none")
        runs = [cli.expanded(word) for word in words]
        usual = (runs[0] if len(runs) == 1 else Path()) / "report.html"
        print(shown(f"wrote {write(runs, cli.expanded(name) if name else usual)}"))
    return ended.code
