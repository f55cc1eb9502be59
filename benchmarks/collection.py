"""Stop rules for continuations on the same interventions: tokens, unlocked problems, accuracy.

Draws all continuations of the paper's recipe once per seed, with the quickstart's task and model,
then replays every rule on the stored outcomes: a rule draws a prefix of the same seeded samples, so
the replay is exact. Then the rules under SFT are trained and evaluated on the held-out problems.
Interrupted, it continues.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from intfast import cli, collect, intervene, sft
from intfast.config import Config, InterveneConfig
from intfast.evaluate import Estimate, bootstrap
from intfast.methods import sft_data
from intfast.records import Continuation, Intervention
from intfast.run import Run, open_run
from intfast.state.metrics import make_console
from intfast.waves import Tried, waves

NAME = "collection"
ALL = 32
ONE = {"one_per_problem": True}
FIRST = {"stop": "first_success"}
RULES: dict[str, dict[str, Any]] = {
    "paper": {"stop": "never", "wave": ALL},
    "first success, waves of 8": FIRST | {"wave": 8},
    "first success, waves of 4": FIRST | {"wave": 4},
    "first success, waves of 1": FIRST | {"wave": 1},
    "one per problem, waves of 8": FIRST | ONE | {"wave": 8},
    "one per problem, waves of 4": FIRST | ONE | {"wave": 4},
    "one per problem, waves of 1": FIRST | ONE | {"wave": 1},
    "at most 16": FIRST | {"wave": 4, "continuations": 16},
    "at most 8": FIRST | {"wave": 4, "continuations": 8},
    "at most 4": FIRST | {"wave": 4, "continuations": 4},
    "at most 16, one per problem": FIRST | ONE | {"wave": 4, "continuations": 16},
    "at most 8, one per problem": FIRST | ONE | {"wave": 4, "continuations": 8},
    **{
        f"futility {chance:g}, waves of {wave}{one}": {
            "stop": "futility",
            "wave": wave,
            "futility": chance,
            "one_per_problem": bool(one),
        }
        for chance in (0.02, 0.05, 0.1, 0.2)
        for wave in (4, 8)
        for one in ("", ", one per problem")
    },
}
TRAINED = ("paper", "one per problem, waves of 4", "at most 8")
"""Under SFT; "first success" gives the paper's examples, so its SFT is the paper's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, how many, and what to change about them."""
    parser.add_argument("--config", default="configs/quickstart.toml", help="%(default)s")
    parser.add_argument("--runs", default="runs/collection", help="their folder (%(default)s)")
    parser.add_argument("--num-seeds", type=int, default=3, help="runs (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], help="settings: key=value ...")
    parser.add_argument("--no-sft", action="store_true", help="replay only")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row over all seeds, and its table on the console."""
    figures: dict[str, Any] = {"rules": defaultdict(list), "sft": defaultdict(list), "seeds": []}
    setting: dict[str, Any] = {"rules": RULES}
    for seed in range(args.seed, args.seed + args.num_seeds):
        path = Path(args.runs) / f"seed-{seed}"
        with open_run(load(args, seed, path), make_console()) as run:
            setting |= run.folder.read_json("manifest.json") or {}
            figures["seeds"].append(seed)
            _run_seed(run, figures, () if args.no_sft else TRAINED)
    figures["pooled"] = {name: pool(rows) for name, rows in figures["rules"].items()}
    figures["sft_pooled"] = {name: _pool_sft(rows) for name, rows in figures["sft"].items()}
    print(table(figures))
    return [{"setting": setting, "figures": msgspec.to_builtins(figures, str_keys=True)}]


def load(args: argparse.Namespace, seed: int, path: Path) -> Config:
    """The config of the draw: every continuation, no baselines."""
    words = [f"run={path}", f"seed={seed}", f"intervene.continuations={ALL}"]
    words += [f"intervene.wave={ALL}", "intervene.stop=never", "intervene.baselines=false"]
    words += [f"model.threads={args.threads}"] * bool(args.threads)
    return cli.load(Path(args.config), [*words, *args.set])


def _run_seed(run: Run, figures: dict[str, Any], trained: Sequence[str]) -> None:
    attempts = collect.attempts(run)
    selected = collect.select(run, attempts)
    wrong = collect.wrong_attempts(run, selected, attempts)
    candidates, continuations = collect.interventions(run, wrong)
    verified = sum(record.num_tokens for record in candidates)
    for name, changes in RULES.items():
        rule = msgspec.structs.replace(run.config.intervene, **changes)
        drawn = replay(candidates, continuations, rule)
        figures["rules"][name].append(
            count(drawn) | {"problems": len(selected), "verify_tokens": verified}
        )
        if name in trained:
            figures["sft"][name].append(_train(run, name, candidates, drawn, rule))
    known = oracle(candidates, continuations)
    figures["rules"]["(who knew which problems unlock)"].append(
        count(known) | {"problems": len(selected), "verify_tokens": verified}
    )


def replay(
    candidates: Sequence[Intervention],
    continuations: Sequence[Continuation],
    rule: InterveneConfig,
) -> list[Continuation]:
    """The continuations that the rule would have drawn, of those that were."""
    passed = [c for c in candidates if c.gate in intervene.REACHED_CONTINUATION]
    done: dict[str, dict[int, bool]] = defaultdict(dict)
    for record in continuations:
        done[record.intervention_id][record.sample] = record.grade == "correct"
    chosen = {
        (candidate.id, sample)
        for wave_I in waves([Tried(c.problem_id, done[c.id]) for c in passed], rule)
        for candidate, wave in zip(passed, wave_I, strict=True)
        for sample in wave
    }
    return [r for r in continuations if (r.intervention_id, r.sample) in chosen]


def oracle(
    candidates: Sequence[Intervention], continuations: Sequence[Continuation]
) -> list[Continuation]:
    """What one who knew which problems will unlock draws, one at a time: a bound for futility."""
    rule = msgspec.structs.replace(InterveneConfig(), continuations=ALL, wave=1, **FIRST, **ONE)
    unlocked = {record.problem_id for record in continuations if record.grade == "correct"}
    return [r for r in replay(candidates, continuations, rule) if r.problem_id in unlocked]


def count(drawn: Sequence[Continuation]) -> dict[str, int]:
    """Generated tokens, and what they unlocked."""
    right = [record for record in drawn if record.grade == "correct"]
    return {
        "continuations": len(drawn),
        "tokens": sum(len(record.token_ids) for record in drawn),
        "unlocked_problems": len({record.problem_id for record in right}),
        "kept_interventions": len({record.intervention_id for record in right}),
    }


def _train(
    run: Run,
    name: str,
    candidates: Sequence[Intervention],
    drawn: Sequence[Continuation],
    rule: InterveneConfig,
) -> dict[str, Any]:
    """SFT on what the rule kept, and its accuracy on the held-out problems."""
    problems = {problem.id: problem for problem in run.problems}
    judged = list(intervene.judge(candidates, drawn, rule))
    target = run.config.sft.target
    examples = list(sft_data.build_examples(run.sampler, problems, judged, drawn, target))
    stage = name.replace(" ", "-").replace(",", "")
    sft.sft(run, stage, examples)
    found = collect.evaluation(run, stage)
    assert found is not None
    summary = found.summary(run.config.evaluate.ks)
    return {
        "examples": len(examples),
        "accuracy": summary.accuracy,
        "pass_at_k": summary.pass_at_k,
        "accuracies": found.accuracies(),
    }


def pool(rows: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums over the seeds."""
    return {key: sum(row[key] for row in rows) for key in rows[0]}


def _pool_sft(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy: mean over the seeds, then an interval over the problems."""
    names = list(rows[0]["accuracies"])
    means = [sum(row["accuracies"].get(n, 0.0) for row in rows) / len(rows) for n in names]
    low, high = bootstrap(means, 0)
    accuracies = [row.pop("accuracies") for row in rows]
    assert all(found.keys() == accuracies[0].keys() for found in accuracies)
    value = sum(means) / len(means)
    return {
        "accuracy": Estimate(value=value, low=low, high=high, num_problems=len(means)),
        "by_seed": [row["accuracy"].value for row in rows],
        "examples": sum(row["examples"] for row in rows) / len(rows),
    }


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    paper = figures["pooled"]["paper"]
    lines = [
        "| rule | tokens, of the paper's | unlocked problems, of the paper's | tokens per unlocked "
        "problem | examples | accuracy after SFT % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in figures["pooled"].items():
        unlocked = found["unlocked_problems"]
        sft = figures["sft_pooled"].get(name)
        accuracy = ""
        if sft:
            value, low, high = (100 * getattr(sft["accuracy"], k) for k in ("value", "low", "high"))
            each = ", ".join(f"{100 * x:.1f}" for x in sft["by_seed"])
            accuracy = f"{value:.1f} [{low:.1f}, {high:.1f}] ({each})"
        lines.append(
            f"| {name} | {found['tokens'] / paper['tokens']:.0%} | "
            f"{unlocked / max(1, paper['unlocked_problems']):.0%} | "
            f"{found['tokens'] / max(1, unlocked):,.0f} | {found['kept_interventions']} | "
            f"{accuracy} |"
        )
    return "\n".join(lines)
