"""What of the SFT stage does the work: the paper's ablations, on the records of a finished run.

python -m intfast.study ablate RUN [key.sub=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intfast import checks, cli, ranks
from intfast.grading.function import check_named
from intfast.state.command import outcome, say
from intfast.state.runfolder import PROMPT_TIME, write_json
from intfast.study import derive
from intfast.study.read import read_evaluations
from intfast.study.summary import ablation_table

USAGE = """\
usage: python -m intfast.study ablate RUN [key.sub=value ...]

Trains on the records of a finished run with one part of the SFT stage changed at a time, the
paper's ablations. Each is a run of its own in RUN/ablations, with the run's attempts, interventions
and continuations and without RL: only SFT and the evaluation are done again. The same command
continues where it was interrupted; its table is also in the run's page. Exit codes are those of
intfast.train.

Settings given are those of every ablation: of sft (but for what the ablations vary), evaluate,
batch, model, rollout, parity, metrics, grade (but for its mode), seed and watchdog_s. A run that
was graded by a function of yours needs its name again: grade.function=...
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
RECORDS = ("attempts.jsonl", "interventions.jsonl", "continuations.jsonl")
RECORDS += ("manifest.json", "golds.json", PROMPT_TIME)


def ablate(
    folder: Path, words: Sequence[str], console: Any = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Run every ablation (or those of `names`); returns what `ablations.json` in `folder` holds.

    Raises ValueError where the run lacks what SFT needs, or settings cannot work or are not open.
    """
    from intfast.state.metrics import make_console
    from intfast.study import finish, report

    console = console or make_console()
    if not (folder / "continuations.jsonl").is_file():
        raise ValueError(
            f"{folder} has no continuations.jsonl; expected a run folder whose collection is "
            "finished: run python -m intfast.train first"
        )
    rows = {}
    _check_settings(words)
    path, given = folder / "config.toml", [w for w in words if w.startswith("grade.function=")]
    check_named(path, cli.load(path).grade.function, "".join(given)[15:], "grade.function=")
    # The base model is evaluated once: settings given here may change how, but for all alike.
    evaluated = None if words else folder
    for name in names or ABLATIONS:
        changes = ABLATIONS[name]
        target = folder / "ablations" / name.replace(" ", "-").replace("+", "and")
        fixed = [f"run={target}", "rl.steps=0", "rl.from_base=false", "analysis.texts=0"]
        config = cli.load(path, [*fixed, *RECIPE, *changes, *words])
        checks.check_paths(config)
        remedy = f"delete {folder / 'ablations'} to repeat all, or give the old values to continue"
        derive.check(config, "this ablation", remedy)
        # The manifest too: another model is refused.
        derive.give(folder, target, RECORDS)
        base = read_evaluations(evaluated).get("base") if evaluated else None
        if base and not (target / "evaluations.json").exists():
            write_json(target / "evaluations.json", {"base": base})
        evaluated = target
        summary = finish.train(config, console)
        rows[name] = {
            "run": str(target),
            "settings": changes,
            "examples": summary["intervention"]["examples"],
            "loss_tokens": summary["intervention"]["loss_tokens"],
            "evaluation": summary["evaluations"].get("int"),
        }
    write_json(folder / "ablations.json", rows)
    report.write([folder], folder / "report.html")
    console.print(ablation_table(rows).rich())
    return rows


def _check_settings(words: Sequence[str]) -> None:
    """The collection is there already, and the rows are named after what they vary."""
    given = [word.removeprefix("--").partition("=")[0] for word in words if "=" in word]
    if bad := [key for key in given if key.partition(".")[0] not in OPEN or key in (*FIXED, "sft")]:
        raise ValueError(
            f"{', '.join(bad)}: an ablation takes these from the run, or varies them; expected "
            f"settings of {', '.join(OPEN)}, without {', '.join(sorted(FIXED))}"
        )


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code, as `intfast.train` does."""
    if "--help" in arguments or "-h" in arguments:
        return say(USAGE)
    if not arguments or "=" in arguments[0]:
        return say(USAGE, 2)
    with outcome("the same command continues", goes_on=True) as ended:
        ranks.require_one()
        ablate(cli.expanded(arguments[0]), arguments[1:])
    return ended.code
