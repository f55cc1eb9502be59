"""A run folder, read whole for its page: also one that a run is writing to.

What is not there yet is listed as missing, with what it would have shown.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from markupsafe import Markup

from intfast import cli
from intfast.config import Config
from intfast.evaluate import Evaluation
from intfast.labels import LABELS, Weights, in_order
from intfast.records import Attempt, Continuation, Intervention
from intfast.study.read import read_evaluations, read_figures, read_json, read_rows
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


@dataclass
class RunData:
    """What a run has written so far."""

    folder: Path
    name: str
    config: Config
    missing: list[str]
    manifest: dict[str, Any]
    evaluations: dict[str, Evaluation]
    """In the order of the tables."""
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    analysis: dict[str, Any]
    ablations: dict[str, Any]
    attempts: list[Attempt]
    interventions: list[Intervention]
    continuations: list[Continuation]
    texts: dict[str, Any] = field(default_factory=dict)
    """For the browser of interventions, see browser.browse."""

    @property
    def finals(self) -> dict[str, Evaluation]:
        """The evaluations outside RL."""
        return {key: value for key, value in self.evaluations.items() if "@" not in key}


def load_all(folders: Sequence[Path]) -> list[RunData]:
    """The runs of these folders, each with a name of its own.

    Raises ValueError when a folder holds no run, or one of a version that this one cannot read.
    """
    names = _names([folder.resolve() for folder in folders])
    return [load(folder, name) for folder, name in zip(folders, names, strict=True)]


def load(folder: Path, name: str) -> RunData:
    """One run; see `load_all`."""
    if not (folder / "config.toml").is_file():
        raise ValueError(
            f"{folder} holds no run: it has no config.toml; name the folder that run=FOLDER named"
        )
    config = cli.load(folder / "config.toml")
    evaluations = read_evaluations(folder)
    return RunData(
        folder=folder,
        name=name,
        config=config,
        missing=[
            file for file in SHOWS if not (folder / file).is_file() and _is_expected(file, config)
        ],
        manifest=read_json(folder / "manifest.json") or {},
        evaluations={key: evaluations[key] for key in in_order(list(evaluations))},
        metrics=read_rows(folder / "metrics.jsonl"),
        summary=read_figures(folder / "summary.json") or {},
        analysis=read_figures(folder / "analysis.json") or {},
        ablations=read_json(folder / "ablations.json") or {},
        attempts=read_rows(folder / "attempts.jsonl", Attempt),
        interventions=read_rows(folder / "interventions.jsonl", Intervention),
        continuations=read_rows(folder / "continuations.jsonl", Continuation),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call run folders: their names, or as much of their paths as tells them apart."""
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(shared).as_posix() for folder in folders]


def _is_expected(name: str, config: Config) -> bool:
    """Whether a finished run of this config has the file."""
    needed = {
        "evaluations.json": config.data.test is not None,
        "attempts.jsonl": config.needs_attempts,
        "interventions.jsonl": config.needs_interventions,
        "continuations.jsonl": config.needs_interventions and config.intervene.continuations,
        "examples.jsonl": config.sft.epochs,
        "example_logprobs.jsonl": config.sft.epochs and config.metrics.example_logprobs,
    }
    return bool(needed.get(name, True))


def toml(value: Any) -> str:
    """A setting as a person would write it; "absent" for None."""
    return "absent" if value is None else msgspec.json.encode(value).decode()


# --- what sections have in common ---------------------------------------------------------------


class Section(NamedTuple):
    """A part of the page: its anchor, its name in the navigation, its heading, what is in it."""

    id: str
    name: str
    title: str
    parts: Sequence[Any]


def named(runs: Sequence[RunData], run: RunData, text: str) -> str:
    """A text of a run, with the name of the run where there are several."""
    return f"{run.name}: {text}" if len(runs) > 1 else text


def headed(runs: Sequence[RunData], run: RunData) -> Markup | None:
    """The name of a run as a heading, where there are several."""
    return element("h3", run.name) if len(runs) > 1 else None


def colors(runs: Sequence[RunData]) -> dict[tuple[str, str], int]:
    """(name of the run, stage) -> colour, the same all over the page."""
    usual = ("base", "base_rl", "int", "int_rl")
    found: dict[tuple[str, str], int] = {}
    if len(runs) == 1:
        found = {(runs[0].name, stage): place for place, stage in enumerate(usual)}
    for run in runs:
        made = [
            Weights.parse(key) for key in (*run.evaluations, *(r["stage"] for r in run.metrics))
        ]
        for weights in made:
            if weights.arm in LABELS:
                found.setdefault((run.name, weights.stage), len(found))
    return found


def origin(config: Config, manifest: dict[str, Any]) -> list[Any]:
    """What a run started from, and on what."""
    parts: list[Any] = [element("code", config.model.path)]
    if "num_parameters" in manifest:
        parts.append(f", {manifest['num_parameters']:,} parameters")
    return [*parts, f", on {manifest['device']}"] if manifest.get("device") else parts


def test_set(run: RunData) -> str | None:
    """What tells the held-out problems of a run from others."""
    return run.manifest.get("test", {}).get("hash")
