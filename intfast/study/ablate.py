"""What of the SFT stage does the work: the paper's ablations, on the records of a finished run.

python -m intfast.study ablate RUN [key.sub=value ...]
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli
from intfast.config import MAY_CHANGE, Config
from intfast.state import files
from intfast.state.command import outcome
from intfast.study import report

USAGE = """\
usage: python -m intfast.study ablate RUN [key.sub=value ...]

Trains on the records of a finished run with one part of the SFT stage changed at a time, the
paper's ablations. Each is a run of its own in RUN/ablations, with the run's attempts, interventions
and continuations and without RL: only SFT and the evaluation are done again. The same command
continues where it was interrupted; its table is also in the run's page. Exit codes are those of
intfast.train.

Settings given are those of every ablation: of sft (but for what the ablations vary), evaluate,
batch, model, rollout, parity, metrics, grade (but for its mode), seed and watchdog_s.
"""
ABLATIONS = {
    "prefix + intervention": [],
    "intervention only": ["sft.target=intervention"],
    "with a right suffix": ["sft.target=suffix"],
    "one per problem": ["sft.target=one_per_problem"],
    "no filter": ["sft.target=no_filter"],
}
"""Row of the table -> settings that differ from the paper's recipe."""
RECIPE = ["sft.target=recipe"]
OPEN = ["seed", "watchdog_s", "sft", "evaluate", "batch", "model", "grade", "rollout"]
OPEN += ["parity", "metrics"]
FIXED = {"sft.data", "grade.mode", *(setting.partition("=")[0] for setting in RECIPE)}
RECORDS = ("attempts.jsonl", "interventions.jsonl", "continuations.jsonl", "manifest.json")


def ablate(
    folder: Path, words: Sequence[str], console: Any = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Run every ablation (or those of `names`); returns what `ablations.json` in `folder` holds.

    Raises ValueError where the run lacks what SFT needs, or settings cannot work or are not open.
    """
    from intfast.state.metrics import make_console
    from intfast.study import finish

    console = console or make_console()
    if not (folder / "continuations.jsonl").is_file():
        raise ValueError(
            f"{folder} has no continuations.jsonl; expected a run folder whose collection is "
            "finished: run python -m intfast.train first"
        )
    rows = {}
    _check_settings(words)
    # Settings given here may change the evaluation, but then for all ablations alike.
    evaluated = None if words else folder
    for name in names or ABLATIONS:
        changes = ABLATIONS[name]
        target = folder / "ablations" / name.replace(" ", "-").replace("+", "and")
        fixed = [f"run={target}", "rl.steps=0", "rl.from_base=false", "analysis.texts=0"]
        config = cli.load(folder / "config.toml", [*fixed, *RECIPE, *changes, *words])
        _check_target(config, folder)
        _copy_records(folder, target)
        if evaluated:
            _copy_base_evaluation(evaluated, target)
        evaluated = target
        summary = finish.train(config, console)
        rows[name] = {
            "run": str(target),
            "settings": changes,
            "examples": summary["intervention"]["examples"],
            "loss_tokens": summary["intervention"]["loss_tokens"],
            "evaluation": summary["evaluations"].get("int"),
        }
    data = msgspec.json.format(msgspec.json.encode(rows), indent=2)
    files.write_atomic(folder / "ablations.json", data + b"\n")
    report.write([folder], folder / "report.html")
    _say(console, rows)
    return rows


def _check_settings(words: Sequence[str]) -> None:
    """The collection is there already, and the rows are named after what they vary."""
    given = [word.removeprefix("--").partition("=")[0] for word in words if "=" in word]
    if bad := [key for key in given if key.partition(".")[0] not in OPEN or key in (*FIXED, "sft")]:
        raise ValueError(
            f"{', '.join(bad)}: an ablation takes these from the run, or varies them; expected "
            f"settings of {', '.join(OPEN)}, without {', '.join(sorted(FIXED))}"
        )


def _check_target(config: Config, folder: Path) -> None:
    """An ablation that is there continues with its own settings only."""
    stored = Path(config.run) / "config.toml"
    if not stored.is_file():
        return
    changed = cli.differences(config, cli.load(stored))
    if kept := {key: pair for key, pair in changed.items() if key not in MAY_CHANGE}:
        rows = "".join(f"\n  {key}: was {a!r}, is {b!r}" for key, (a, b) in kept.items())
        raise ValueError(
            f"{config.run} holds this ablation with other settings:{rows}\n"
            f"delete {folder / 'ablations'} to repeat all, or give the old values to continue"
        )


def _copy_records(folder: Path, target: Path) -> None:
    """Give an ablation the collection of the run, and its manifest: another model is refused."""
    target.mkdir(parents=True, exist_ok=True)
    for name in RECORDS:
        if not (target / name).exists():
            # Whole or not at all: a part would be taken for a collection that was interrupted.
            shutil.copyfile(folder / name, target / f"{name}.copy")
            (target / f"{name}.copy").rename(target / name)


def _copy_base_evaluation(folder: Path, target: Path) -> None:
    """The base model was evaluated there with the same settings: not again here."""
    source = folder / "evaluations.json"
    stored = msgspec.json.decode(source.read_bytes()) if source.is_file() else {}
    if "base" in stored and not (target / source.name).exists():
        data = msgspec.json.encode({"base": stored["base"]})
        files.write_atomic(target / source.name, data)


def _say(console: Any, rows: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        title="SFT on the same interventions (held-out problems, 95 % intervals over problems)",
        title_justify="left",
    )
    for column in ("trained on", "examples", "loss tokens", "accuracy %", "covered"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    for name, row in rows.items():
        cells = [name, str(row["examples"]), f"{row['loss_tokens']:,}"]
        if found := row["evaluation"]:
            value, low, high = (100 * getattr(found.accuracy, k) for k in ("value", "low", "high"))
            covered = found.coverage
            cells += [
                f"{value:.1f} [{low:.1f}, {high:.1f}]",
                f"{round(covered.value * covered.num_problems)} of {covered.num_problems}",
            ]
        table.add_row(*cells)
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code, as `intfast.train` does."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    if not arguments or "=" in arguments[0]:
        print(USAGE, file=sys.stderr)
        return 2
    with outcome("the same command continues") as ended:
        ablate(Path(arguments[0]), arguments[1:])
    return ended.code
