"""A run folder as plain data for its page: figures with intervals, curves, and the interventions.

Only reads, also a folder that a run is writing to: a last line without its end is left out. What is
not there yet is listed under "missing" with what it would have shown.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from intfast import cli, intervene
from intfast.config import Config
from intfast.evaluate import Estimate, Evaluation, compare
from intfast.prompts import split_steps
from intfast.records import Attempt, Continuation, Intervention
from intfast.study.summary import ARMS, STARTS

T = TypeVar("T")
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


def collect_all(folders: Sequence[Path]) -> dict[str, Any]:
    """Everything of the runs but their interventions, and the differences between them."""
    names = _names([folder.resolve() for folder in folders])
    runs = [collect(folder) | {"name": n} for folder, n in zip(folders, names, strict=True)]
    found = [read_evaluations(folder) for folder in folders]
    across = []
    for run, evaluations in list(zip(runs, found, strict=True))[1:]:
        if _test_set(run) is None or _test_set(run) != _test_set(runs[0]):
            continue
        for name in in_order(evaluations):
            if name in found[0] and "@" not in name:
                titles = [f"{run['name']}: {label(name)}", f"{runs[0]['name']}: {label(name)}"]
                across += _difference(titles, evaluations[name], found[0][name])
    return {"runs": runs, "across": across}


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call run folders: their names, or as much of their paths as tells them apart."""
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(shared).as_posix() for folder in folders]


def _test_set(run: dict[str, Any]) -> str | None:
    return run["manifest"].get("test", {}).get("hash")


def collect(folder: Path) -> dict[str, Any]:
    """Everything of a run but its interventions; small, so the page can show it at once.

    Raises ValueError when the folder holds no run, or one of a version that this one cannot read.
    """
    if not (folder / "config.toml").is_file():
        raise ValueError(
            f"{folder} holds no run: it has no config.toml; name the folder that run=FOLDER named"
        )
    config = cli.load(folder / "config.toml")
    missing = [
        [name, text]
        for name, text in SHOWS.items()
        if not (folder / name).is_file() and _is_expected(name, config)
    ]
    metrics = read_rows(folder, "metrics", dict)
    evaluations = read_evaluations(folder)
    summary = read_json(folder, "summary.json") or {}
    found = summary.get("intervention") or {}
    attempts = read_rows(folder, "attempts", Attempt)
    interventions = read_rows(folder, "interventions", Intervention)
    continuations = read_rows(folder, "continuations", Continuation)
    return {
        "missing": missing,
        "seed": config.seed,
        "model": config.model.path,
        "manifest": read_json(folder, "manifest.json") or {},
        "settings": [[key, *map(toml, pair)] for key, pair in cli.differences(config).items()],
        "sampling": msgspec.to_builtins(config.evaluate.sampling),
        "ks": config.evaluate.ks,
        "samples": config.evaluate.samples,
        "evaluations": [
            _evaluation(name, evaluations[name], config) for name in in_order(evaluations)
        ],
        "differences": _differences(evaluations),
        "curves": _curves(metrics),
        "seconds": _seconds(metrics),
        "outcomes": _outcomes(attempts, continuations, evaluations),
        "intervention": _intervention(interventions, continuations, config)
        | {
            "cost": found.get("tokens_per_unlocked_problem"),
            "alone": found.get("problem_alone"),
            "places": _places(interventions, attempts, config),
        },
        "generated": [
            [label(n), count] for n, count in summary.get("generated_tokens", {}).items()
        ],
        "texts": _texts(read_json(folder, "analysis.json") or {}),
        "ablations": _ablations(read_json(folder, "ablations.json") or {}),
    }


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


# --- files -------------------------------------------------------------------------------------


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of the run, or None where it does not exist."""
    path = folder / name
    return msgspec.json.decode(path.read_bytes()) if path.is_file() else None


def read_rows(folder: Path, name: str, kind: type[T]) -> list[T]:
    """The whole lines of `name`.jsonl; empty where it does not exist.

    Unlike runfolder.Journal it changes nothing: another process may be writing the last line.
    """
    path = folder / f"{name}.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    decoder = msgspec.json.Decoder(kind)
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}:{number} is no {kind.__name__} record ({error})") from error
    return rows


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """The evaluations of the run so far, by name."""
    stored = read_json(folder, "evaluations.json") or {}
    return {name: msgspec.convert(value, Evaluation) for name, value in stored.items()}


# --- figures -----------------------------------------------------------------------------------


def in_order(evaluations: Iterable[str]) -> list[str]:
    """Names as the tables have them; evaluations within RL ("int_rl@20") after their stage."""
    places = list(ARMS)

    def key(name: str) -> tuple[int, str, int]:
        stage, _, step = name.partition("@")
        place = places.index(stage) if stage in places else len(places)
        return place, stage, int(step) if step.isdigit() else -1

    return sorted(evaluations, key=key)


def label(name: str) -> str:
    """The name of weights for a reader: "int_rl@20" is "InT + RL, step 20"."""
    stage, _, step = name.partition("@")
    return ARMS.get(stage, stage) + (f", step {step}" if step else "")


def _evaluation(name: str, evaluation: Evaluation, config: Config) -> dict[str, Any]:
    most = max((problem.scored for problem in evaluation.problems), default=0)
    found = {"name": name, "label": label(name), "problems": len(evaluation.problems)}
    if not most:
        return found | {"samples": sum(p.samples for p in evaluation.problems), "unscored": 1.0}
    powers = [2**i for i in range(most.bit_length())]
    ks = [] if "@" in name else sorted({*powers, *(k for k in config.evaluate.ks if k <= most)})
    summary = evaluation.summary(ks)
    return found | {
        "samples": summary.num_samples,
        "accuracy": interval(summary.accuracy),
        "pass": [[k, *interval(estimate)] for k, estimate in summary.pass_at_k.items()],
        "coverage": interval(summary.coverage),
        "truncated": summary.truncated,
        "unscored": summary.unscored,
        "tokens": summary.mean_tokens,
    }


def interval(estimate: Estimate) -> list[float]:
    """[value, low, high, problems] of an estimate."""
    return [*map(short, (estimate.value, estimate.low, estimate.high)), estimate.num_problems]


def _differences(evaluations: dict[str, Evaluation]) -> list[list[Any]]:
    """The difference of every pair of final weights."""
    names = [name for name in in_order(evaluations) if "@" not in name]
    return [
        row
        for place, less in enumerate(names)
        for more in names[place + 1 :]
        for row in _difference((label(more), label(less)), evaluations[more], evaluations[less])
    ]


def _difference(titles: Sequence[str], more: Evaluation, less: Evaluation) -> list[list[Any]]:
    """[[minuend, subtrahend, value, low, high, problems]]; [] without a problem scored in both."""
    if not more.accuracies().keys() & less.accuracies().keys():
        return []
    return [[*titles, *interval(compare(more, less))]]


def _curves(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stage -> {"label", "steps", "series": name -> values}; None where a row has no such value."""
    rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in metrics:
        rows_of[row["stage"]].append(row)
    found = {}
    for stage, rows in rows_of.items():
        names = {
            name
            for row in rows
            for name, value in row.items()
            if name not in ("stage", "step") and isinstance(value, int | float)
        }
        found[stage] = {
            "label": label(stage),
            "steps": [row["step"] for row in rows],
            "of": [row.get("of") for row in rows],
            "series": {n: [short(row.get(n)) for row in rows] for n in sorted(names)},
        }
    return found


def _seconds(metrics: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """[stage, {phase: seconds}] over all rows."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for row in metrics:
        for name, value in row.items():
            if name.startswith("seconds_"):
                total[row["stage"]][name.removeprefix("seconds_")] += value
    return [
        [label(stage), {name: round(value, 3) for name, value in phases.items()}]
        for stage, phases in total.items()
    ]


def _outcomes(
    attempts: Sequence[Attempt],
    continuations: Sequence[Continuation],
    evaluations: dict[str, Evaluation],
) -> list[list[Any]]:
    """[what was graded, {reason: count}]."""
    found = [["attempts", Counter(record.reason for record in attempts)]]
    for start, text in STARTS.items():
        reasons = Counter(record.reason for record in continuations if record.start == start)
        found.append([f"continuations of {text}", reasons])
    for name in in_order(evaluations):
        if "@" not in name:
            reasons = Counter()
            for problem in evaluations[name].problems:
                reasons.update(problem.reasons)
            found.append([f"evaluation of {label(name)}", reasons])
    return [[text, dict(reasons)] for text, reasons in found if reasons]


def _intervention(
    interventions: Sequence[Intervention], continuations: Sequence[Continuation], config: Config
) -> dict[str, Any]:
    gates = Counter(record.gate for record in interventions)
    continued = [r for r in interventions if r.gate in intervene.REACHED_CONTINUATION]
    known = {record.id for record in continued}
    starts = []
    for start, text in STARTS.items():
        drawn = [r for r in continuations if r.start == start and r.intervention_id in known]
        if any(record.grade != "unscored" for record in drawn):
            early = start == "intervention" and config.intervene.stop != "never"
            first = config.intervene.wave if early else None
            figures = intervene.start_figures(continued, drawn, config.seed, first)
            starts.append(
                {"start": text, "num": figures["continuations"], "each": figures["per_attempt"]}
                | {
                    name: interval(figures[name])
                    for name in ("accuracy", "attempt_coverage", "problem_coverage")
                }
            )
    return {
        "candidates": len(interventions),
        "problems": len({record.problem_id for record in interventions}),
        "unlocked": len({r.problem_id for r in interventions if r.gate == "kept"}),
        "attempts": len({(r.problem_id, r.attempt) for r in interventions}),
        "gates": [[name, gates[name], text] for name, text in intervene.GATES.items()],
        "starts": starts,
        "first": config.intervene.wave if config.intervene.stop != "never" else None,
    }


def _texts(analysis: dict[str, Any]) -> list[list[Any]]:
    """[kind, texts, tokens, {weights: [NLL, low, high, texts], ...}, {weights: entropy}]."""
    return [
        [
            kind,
            row["texts"],
            row["tokens"],
            {label(n): [short(f["nll"][k]) for k in ("value", "low", "high")] for n, f in of},
            {label(name): short(figures["entropy"]["value"]) for name, figures in of},
        ]
        for kind, row in analysis.get("texts", {}).items()
        for of in [row["of"].items()]
    ]


def _ablations(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """What SFT was trained on, and what came of it; "samples" is per problem."""
    rows = []
    for name, row in stored.items():
        found = {key: row[key] for key in ("settings", "examples", "loss_tokens")} | {"name": name}
        if evaluation := row["evaluation"]:
            found["samples"] = evaluation["num_samples"] / evaluation["num_problems"]
            for key in ("accuracy", "coverage"):
                found[key] = interval(msgspec.convert(evaluation[key], Estimate))
        rows.append(found)
    return rows


def _places(
    interventions: Sequence[Intervention], attempts: Sequence[Attempt], config: Config
) -> list[int]:
    """How many located steps lie in each tenth of their attempt, counted in steps."""
    texts = {(record.problem_id, record.sample): record.text for record in attempts}
    tenths = [0] * 10
    for record in interventions:
        text = texts.get((record.problem_id, record.attempt), "")
        num_steps = len(split_steps(text, config.prompt.separator))
        if 1 <= record.location <= num_steps:
            tenths[(record.location - 1) * 10 // num_steps] += 1
    return tenths


def short(value: Any) -> Any:
    """A number with six significant digits: what a chart can show, at a third of the bytes."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def toml(value: Any) -> str:
    """A setting as a person would write it; "absent" for None."""
    return "absent" if value is None else msgspec.json.encode(value).decode()
