"""A run folder, read whole for its page: also one that a run is writing to.

What is not there yet is listed as missing, with what it would have shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intfast import cli
from intfast.config import Config
from intfast.evaluate import Evaluation
from intfast.labels import LABELS, Weights, in_order
from intfast.records import Attempt, Continuation, Intervention
from intfast.state.files import read_json
from intfast.study.read import read_evaluations, read_figures, read_rows, rows
from intfast.study.tables import element

SHOWS = {
    "config.toml": "the settings",
    "manifest.json": "versions, hardware, commit, data",
    "evaluations.json": "accuracy and pass@k on held-out problems",
    "metrics.jsonl": "the curves and where the time went",
    "problems.jsonl": "the problems and their references",
    "attempts.jsonl": "the model's own attempts",
    "interventions.jsonl": "the interventions and their gates",
    "continuations.jsonl": "what became of the interventions",
    "examples.jsonl": "the SFT sequences",
    "example_logprobs.jsonl": "how SFT changed the log-probability of each trained token",
    "analysis.json": "how likely the texts are before and after SFT",
    "summary.json": "the end of the run: it has not finished",
}
"""What the page takes from each file of the folder."""


class RunData:
    """What a run has written so far.

    place   among the runs of the page
    prefix  before what is said of the run: its name, where there are several
    Raises ValueError when the folder holds no run, or one of a version that this one cannot read.
    """

    def __init__(self, folder: Path, name: str, place: int = 0, prefix: str = "") -> None:
        if not (folder / "config.toml").is_file():
            raise ValueError(
                f"{folder} holds no run: it has no config.toml; name the folder that run=FOLDER "
                "named"
            )
        self.folder, self.name, self.place, self.prefix = folder, name, place, prefix
        self.config = config = cli.load(folder / "config.toml")
        drawn = config.needs_interventions
        unasked = {
            "evaluations.json": config.data.test is None,
            "attempts.jsonl": not config.needs_attempts,
            "interventions.jsonl": not drawn,
            "continuations.jsonl": not (drawn and config.intervene.continuations),
            "examples.jsonl": not config.sft.epochs,
            "example_logprobs.jsonl": not (config.sft.epochs and config.metrics.example_logprobs),
        }
        absent = [file for file in SHOWS if not (folder / file).is_file()]
        self.missing = [file for file in absent if not unasked.get(file)]
        self.manifest: dict[str, Any] = read_json(folder / "manifest.json") or {}
        stored = read_evaluations(folder)
        self.evaluations = {key: stored[key] for key in in_order(list(stored))}
        self.metrics: list[dict[str, Any]] = read_rows(folder / "metrics.jsonl")
        self.summary: dict[str, Any] = read_figures(folder / "summary.json") or {}
        self.analysis: dict[str, Any] = read_figures(folder / "analysis.json") or {}
        self.ablations: dict[str, Any] = read_json(folder / "ablations.json") or {}
        self.attempts = rows(folder / "attempts.jsonl", Attempt)
        self.interventions = rows(folder / "interventions.jsonl", Intervention)
        self.continuations = rows(folder / "continuations.jsonl", Continuation)
        self.colors: dict[str, int] = {}
        """Stage -> colour, the same all over the page."""
        self.texts: dict[str, Any] = {}
        """For the browser of interventions, see browser.browse."""

    @property
    def finals(self) -> dict[str, Evaluation]:
        """The evaluations outside RL."""
        return {key: value for key, value in self.evaluations.items() if "@" not in key}

    @property
    def test_set(self) -> str | None:
        """What tells its held-out problems from others."""
        return self.manifest.get("test", {}).get("hash")


def load_all(folders: Sequence[Path], names: Sequence[str] = ()) -> list[RunData]:
    """The runs of these folders, each with a name and colours of its own."""
    names = names or _names([folder.resolve() for folder in folders])
    several = len(folders) > 1
    free, runs = count(), []
    for place, (folder, name) in enumerate(zip(folders, names, strict=True)):
        run = RunData(folder, name, place, f"{name}: " if several else "")
        usual = () if several else ("base", "base_rl", "int", "int_rl")
        keys = [*run.evaluations, *(row["stage"] for row in run.metrics)]
        made = [w.stage for w in map(Weights.parse, keys) if w.arm in LABELS]
        run.colors = {stage: next(free) for stage in dict.fromkeys([*usual, *made])}
        runs.append(run)
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call run folders: their names, or as much of their paths as tells them apart."""
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(shared).as_posix() for folder in folders]


# --- what sections have in common ---------------------------------------------------------------


class Section(NamedTuple):
    """A part of the page: its anchor, its name in the navigation, its heading, what is in it."""

    id: str
    name: str
    title: str
    parts: Sequence[Any]


def each(runs: Sequence[RunData], parts: Callable[[RunData], list[Any]]) -> list[Any]:
    """The parts of every run, under its name where there are several."""
    found = []
    for run in runs:
        if own := parts(run):
            found += [element("h3", run.name), *own] if run.prefix else own
    return found


def toml(value: Any) -> str:
    """A setting as a person would write it; "absent" for None."""
    return "absent" if value is None else msgspec.json.encode(value).decode()


def origin(config: Config, manifest: dict[str, Any]) -> list[Any]:
    """What a run started from, and on what."""
    parts: list[Any] = [element("code", config.model.path)]
    if "num_parameters" in manifest:
        parts.append(f", {manifest['num_parameters']:,} parameters")
    return [*parts, f", on {manifest['device']}"] if manifest.get("device") else parts
