"""Which interventions are worth continuing, judged by log-probs alone: replayed, and under SFT.

    python -m benchmarks collection --runs A ... ; python -m benchmarks collection --runs B ...
    python -m benchmarks scored --calibrate A/seed-* --report B/seed-*

A score takes one prefill and no decoding: how likely the gold answer is behind prefix +
intervention, how much likelier the reference is there than behind the wrong step, how likely the
step is, and what is left of the attempt. A Beta prior whose mean follows the scores is fitted to
the calibration runs. Then, in turns, every problem without a success continues its most promising
intervention, by Thompson sampling or by the posterior mean, per expected token; it ends where the
promise falls below a price, the highest that kept 95 % of the unlocked problems in calibration. The
replay is that of `collection`, on other seeds. With --sft, SFT on those of the best score, without
a single continuation, beside the outcome filter and no filter, of the first reported run.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from benchmarks import collection
from intfast import cli, collect, intervene, sft
from intfast.methods import sft_data
from intfast.records import Continuation, Intervention
from intfast.run import Run, open_run
from intfast.sample import Start
from intfast.state.metrics import make_console
from intfast.study import derive
from intfast.tokens import encode

NAME = "scored"
WAVE, POOL = 4, 0.5
"""Continuations a turn; what a failure of another attempt at the problem counts. Set, like the
sets of scores, on seeds 0 and 1 of both tasks."""
SCORES = {
    "no score": (),
    "length": ("left",),
    "answer": ("answer",),
    "answer, length": ("answer", "left"),
    "all": ("answer", "reference", "step", "left", "log left", "steps left"),
}
KINDS = {"posterior mean": False, "Thompson": True}
PRICES = [0.02 * 0.8**i for i in range(30)]
TODAY = ("paper", "one per problem, waves of 4")
TODAY += tuple(f"futility {chance}, waves of 4, one per problem" for chance in (0.05, 0.1))


class Scored(NamedTuple):
    """A run's interventions with their scores, and what became of all continuations."""

    problems: list[str]
    scores: dict[str, list[float]]
    scored_tokens: dict[str, int]
    """Set of scores -> tokens of its prefills."""
    right: list[list[bool]]
    lengths: list[list[int]]


class Drawn(NamedTuple):
    """What a rule drew: generated tokens, and the problems with a success."""

    tokens: int
    unlocked: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folders of `collection`, and what is trained."""
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--report", type=Path, nargs="+", required=True, help="others")
    parser.add_argument("--task", required=True, help="its name in the row")
    parser.add_argument(
        "--sft", type=Path, help="folder of the trainings on the first reported run"
    )
    parser.add_argument("--set", nargs="*", default=[], help="settings of the trainings")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: rules on the reported seeds, and accuracy after SFT."""
    before = [read(path)[0] for path in args.calibrate]
    rules: dict[str, list[dict[str, float]]] = defaultdict(list)
    weights, trained = [], defaultdict(list)
    fitted, prices = {}, {}
    for name in SCORES:
        fitted[name] = fit(before, SCORES[name])
        for kind, thompson in KINDS.items():
            floor = price(before, fitted[name], SCORES[name], thompson)
            prices[f"{name}, {kind}"] = (name, floor, thompson)
    for path in args.report:
        found, today, weight = read(path)
        weights.append(weight)
        for name, row in today.items():
            rules[name].append(row)
        beta = {name: posterior(found, fitted[name], SCORES[name]) for name in SCORES}
        for label, (name, floor, thompson) in prices.items():
            rules[label].append(_row(found, beta[name], floor, thompson, name))
        if args.sft and path == args.report[0]:
            _train(args, path, found, beta["all"], trained)
    figures = {
        "rules": rules,
        "prices": {label: floor for label, (_, floor, _) in prices.items()},
        "weight_of_a_scored_token": weights,
        "sft": trained,
    }
    print(table(figures))
    args.calibrate, args.report = ([p.name for p in x] for x in (args.calibrate, args.report))
    args.sft, args.set = bool(args.sft), [w for w in args.set if not w.startswith("data.")]
    setting = {"task": args.task, "scores": SCORES, "wave": WAVE, "pool": POOL}
    return [{"setting": setting, "figures": figures}]


# --- scores ------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Scored, dict[str, dict[str, float]], float]:
    """A finished run of `collection`: its scores, today's rules, the weight of a scored token."""
    with open_run(cli.load(path / "config.toml"), make_console()) as run:
        wrong, candidates, continuations = _collected(run)
        found, seconds = score(run, wrong, candidates, continuations)
        paper = sum(map(sum, found.lengths))
        total = sum(map(any, _by_problem(found).values()))
        today = {}
        for name in TODAY:
            rule = msgspec.structs.replace(run.config.intervene, **collection.RULES[name])
            today[name] = collection.count(collection.replay(candidates, continuations, rule))
        today["(who knew which problems unlock)"] = collection.count(
            collection.oracle(candidates, continuations)
        )
        today = {
            name: {"tokens": row["tokens"] / paper, "unlocked": row["unlocked_problems"] / total}
            for name, row in today.items()
        }
        # The same engine, thread and model: what a token costs to draw.
        starts = [Start(problem, list(range(8))) for problem, _ in list(wrong)[:32]]
        begin = time.process_time()
        drawn = run.sampler.sample(starts, run.config.intervene.continuation)
        spent = time.process_time() - begin
        num = sum(len(graded.completion.token_ids) for group in drawn for graded in group)
    return found, today, seconds / (spent / num)


def _collected(run: Run) -> tuple[Any, Sequence[Intervention], Sequence[Continuation]]:
    attempts = collect.attempts(run)
    wrong = collect.wrong_attempts(run, collect.select(run, attempts), attempts)
    candidates, continuations = collect.interventions(run, wrong)
    run.hold("base")
    return wrong, [c for c in candidates if c.gate in intervene.REACHED_CONTINUATION], continuations


def score(
    run: Run, wrong: Any, passed: Sequence[Intervention], continuations: Sequence[Continuation]
) -> tuple[Scored, float]:
    """Every intervention that reached the continuations; CPU seconds of a scored token."""
    pairs = {(problem.id, attempt.sample): (problem, attempt) for problem, attempt in wrong}
    sampler, sequences, measured = run.sampler, [], []
    scores: dict[str, list[float]] = defaultdict(list)
    for record in passed:
        problem, attempt = pairs[record.problem_id, record.attempt]
        prompt = sampler.prompt(problem)
        fixed, error = (
            intervene.answer_so_far(sampler, attempt, record, start)
            for start in ("intervention", "error")
        )
        lead = sampler.style.lead
        answer = encode(sampler.tokenizer, f"{lead}ans {problem.answer}")
        reference = encode(sampler.tokenizer, lead + problem.reference)
        for head, tail in ((fixed, answer), (fixed, reference), (error, reference)):
            sequences.append([*prompt, *head, *tail])
            measured.append(len(tail))
        left = max(5, len(attempt.token_ids) - len(error))
        steps = len(sampler.style.split(attempt.text)) - record.location
        for key, value in (("left", left), ("log left", math.log(left)), ("steps left", steps)):
            scores[key].append(float(value))
    begin = time.process_time()
    logprobs = sampler.engine.score(sequences)
    seconds = (time.process_time() - begin) / sum(map(len, sequences))
    for place, record in enumerate(passed):
        own, num = logprobs[3 * place : 3 * place + 3], measured[3 * place : 3 * place + 3]
        answer, reference, without = (sum(t[-n:]) for t, n in zip(own, num, strict=True))
        step = sum(own[0][-num[0] - len(record.intervention_ids) : -num[0]])
        for key, value in (("answer", answer), ("reference", reference - without), ("step", step)):
            scores[key].append(value)
    sizes = list(map(len, sequences))
    costs = {"answer": sum(sizes[::3]), "all": sum(sizes)}
    done: dict[str, dict[int, tuple[bool, int]]] = defaultdict(dict)
    for record in continuations:
        found = (record.grade == "correct", len(record.token_ids))
        done[record.intervention_id][record.sample] = found
    drawn = [[done[record.id][n] for n in range(collection.ALL)] for record in passed]
    return Scored(
        problems=[record.problem_id for record in passed],
        scores=dict(scores),
        scored_tokens={n: costs.get(n.partition(",")[0], 0) for n in SCORES},
        right=[[right for right, _ in row] for row in drawn],
        lengths=[[length for _, length in row] for row in drawn],
    ), seconds


def _by_problem(found: Scored) -> dict[str, list[bool]]:
    rows: dict[str, list[bool]] = defaultdict(list)
    for problem, right in zip(found.problems, found.right, strict=True):
        rows[problem] += right
    return rows


# --- the prior, and the rule -------------------------------------------------------------------


def _standard(found: Scored, names: Sequence[str]) -> torch.Tensor:
    """(interventions, 1 + scores): one, and each score in standard deviations of its run."""
    columns = [torch.tensor(found.scores[name], dtype=torch.float64) for name in names]
    columns = [(column - column.mean()) / column.std() for column in columns]
    return torch.stack([torch.ones(len(found.problems), dtype=torch.float64), *columns], 1)


def fit(runs: Sequence[Scored], names: Sequence[str]) -> torch.Tensor:
    """Weights of the mean's logit, then log concentration: the most likely beta-binomial."""
    inputs = torch.cat([_standard(found, names) for found in runs])
    right = torch.tensor([float(sum(row)) for found in runs for row in found.right]).double()
    start = [-3.5, *[0.0] * len(names), 0.0]
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.lgamma() + b.lgamma() - (a + b).lgamma()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mean, size = torch.sigmoid(inputs @ weights[:-1]), weights[-1].exp()
        a, b = mean * size, (1 - mean) * size
        value = (log_beta(a, b) - log_beta(a + right, b + collection.ALL - right)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def posterior(
    found: Scored, weights: torch.Tensor, names: Sequence[str]
) -> list[tuple[float, float]]:
    """(a, b) of each intervention before its first continuation."""
    mean, size = torch.sigmoid(_standard(found, names) @ weights[:-1]), weights[-1].exp()
    return list(zip((mean * size).tolist(), ((1 - mean) * size).tolist(), strict=True))


def draw(found: Scored, beta: Sequence[tuple[float, float]], floor: float, thompson: bool) -> Drawn:
    """Replay the rule: in turns, each open problem's most promising intervention."""
    numbers = random.Random(0)
    drawn = [0] * len(beta)
    failed: dict[str, int] = defaultdict(int)
    unlocked: set[str] = set()
    left = found.scores["left"]
    usual, tokens = sum(left) / len(left), 0
    while True:
        best: dict[str, tuple[float, int]] = {}
        for i, (problem, (a, b)) in enumerate(zip(found.problems, beta, strict=True)):
            if problem in unlocked or drawn[i] == collection.ALL:
                continue
            # A rate is likely shared by the attempts at a problem, in part.
            b += drawn[i] + POOL * (failed[problem] - drawn[i])
            promise = a / (a + b) * usual / left[i]
            if promise >= floor:
                rank = numbers.betavariate(a, b) / left[i] if thompson else promise
                best[problem] = max(best.get(problem, (-1.0, 0)), (rank, i))
        if not best:
            return Drawn(tokens, len(unlocked))
        for problem, (_, i) in best.items():
            wave = slice(drawn[i], drawn[i] + WAVE)
            tokens += sum(found.lengths[i][wave])
            drawn[i] += WAVE
            failed[problem] += WAVE
            if any(found.right[i][wave]):
                unlocked.add(problem)


def price(
    runs: Sequence[Scored], weights: torch.Tensor, names: Sequence[str], thompson: bool
) -> float:
    """The highest price that keeps 95 % of the problems that the paper's recipe unlocks."""
    total = sum(any(rows) for found in runs for rows in _by_problem(found).values())
    betas = [posterior(found, weights, names) for found in runs]
    for floor in PRICES:
        pairs = zip(runs, betas, strict=True)
        if sum(draw(f, b, floor, thompson).unlocked for f, b in pairs) >= 0.95 * total:
            return floor
    raise RuntimeError("no price keeps 95 %; lower the last of PRICES")


def _row(
    found: Scored, beta: list[tuple[float, float]], floor: float, thompson: bool, name: str
) -> dict[str, float]:
    """At the price of the calibration, and at the best one for this very run (`hindsight`)."""
    paper = sum(map(sum, found.lengths))
    total = sum(map(any, _by_problem(found).values()))
    drawn = draw(found, beta, floor, thompson)
    known = (draw(found, beta, p, thompson) for p in PRICES)
    hindsight = next(d.tokens for d in known if d.unlocked >= 0.95 * total)
    return {
        "tokens": drawn.tokens / paper,
        "scored": found.scored_tokens[name] / paper,
        "unlocked": drawn.unlocked / total,
        "hindsight": hindsight / paper,
    }


# --- SFT ---------------------------------------------------------------------------------------


def _train(
    args: argparse.Namespace, path: Path, found: Scored, beta: Any, trained: dict[str, list[Any]]
) -> None:
    """SFT on what each filter keeps, and accuracy on the held-out problems."""
    folder = args.sft / path.parent.name / path.name
    names = ("attempts.jsonl", "interventions.jsonl", "continuations.jsonl", "prompt_time.txt")
    derive.give(path, folder, names)
    config = cli.load(path / "config.toml", [f"run={folder}", *args.set])
    with open_run(config, make_console()) as run:
        _, passed, continuations = _collected(run)
        right = [sum(row) for row in found.right]
        by_score = sorted(range(len(passed)), key=lambda i: -beta[i][0] / sum(beta[i]))
        unlocking = [i for i in by_score if right[i]]
        at_random = random.Random(0).sample(by_score, len(unlocking))
        chosen = {
            "no filter": by_score,
            "outcome": unlocking,
            "score, as many as outcome": by_score[: len(unlocking)],
            "any, as many as outcome": at_random,
        }
        problems = {problem.id: problem for problem in run.problems}
        for name, places in chosen.items():
            kept = [msgspec.structs.replace(passed[i], gate="kept") for i in sorted(places)]
            target = (run.sampler, problems, kept, continuations, "recipe")
            stage = name.replace(" ", "-").replace(",", "")
            sft.sft(run, stage, list(sft_data.build_examples(*target)))
            evaluation = collect.evaluation(run, stage)
            assert evaluation is not None
            accuracy = evaluation.summary([]).accuracy
            row = {"examples": len(places), "unlocking": sum(map(bool, (right[i] for i in places)))}
            row |= {k: getattr(accuracy, k) for k in ("value", "low", "high")}
            trained[name].append(row | {"problems": accuracy.num_problems})


def table(figures: dict[str, Any]) -> str:
    """Both tables of the README, in Markdown; means over the reported seeds."""

    def mean(rows: Sequence[dict[str, float]], key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows) / len(rows)

    weights = figures["weight_of_a_scored_token"]
    weight = sum(weights) / len(weights)
    lines = [
        f"| rule | generated tokens, of the paper's | with scored ones at {weight:.2f} each | at 1 "
        "each | unlocked problems, of the paper's | tokens for 95 %, knowing the price |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in figures["rules"].items():
        tokens, scored = mean(rows, "tokens"), mean(rows, "scored")
        cells = [tokens, tokens + weight * scored, tokens + scored, mean(rows, "unlocked")]
        known = f"{mean(rows, 'hindsight'):.0%}" if "hindsight" in rows[0] else ""
        lines.append(f"| {name} | {' | '.join(f'{cell:.0%}' for cell in cells)} | {known} |")
    if figures["sft"]:
        lines += ["", "| SFT on | examples | of them unlocking | accuracy % |", "| --- " * 4 + "|"]
    for name, rows in figures["sft"].items():
        percents = [[f"{100 * row[k]:.1f}" for k in ("value", "low", "high")] for row in rows]
        each = ", ".join(f"{value} [{low}, {high}]" for value, low, high in percents)
        counts = f"{mean(rows, 'examples'):.0f} | {mean(rows, 'unlocking'):.0f}"
        lines.append(f"| {name} | {counts} | {each} |")
    return "\n".join(lines)
