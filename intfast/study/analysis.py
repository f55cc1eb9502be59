"""The paper's other tables, on any run: likelihoods, entropy, pass@k curves, and RL curves.

Written to `analysis.json` at the end of a run. Only reads weights and records: no result depends on
it. Every text is scored as it stands in training: prompt before it, token by token, temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from intfast import evaluate
from intfast.batch import pack
from intfast.collect import Found
from intfast.evaluate import Estimate
from intfast.kernels.linear_logprob import linear_logprob
from intfast.labels import label
from intfast.methods import sft_data
from intfast.prompts import encode
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.run import Run
from intfast.study.read import read_evaluations
from intfast.study.summary import summarised
from intfast.study.tables import Table, heads, interval
from intfast.study.token_logprobs import spread

CURVES = (
    "reward",
    "zero_advantage",
    "all_wrong",
    "all_right",
    "length",
    "truncated",
    "entropy_sampled",
    "entropy_mean",
    "sampled_tokens",
)


class TextMeasure(NamedTuple):
    """Of one text: its tokens, and per token the mean of -log-prob and of the entropy, in nats."""

    num_tokens: int
    nll: float
    entropy: float


def write(run: Run, found: Found, supervised: str) -> dict[str, Any]:
    """Print the tables and write analysis.json; texts are scored by "base" and by `supervised`.

    An interrupted run scores again: it takes one forward over `analysis.texts` texts of each kind.
    """
    names = ["base"] if supervised == "base" else ["base", supervised]
    result = {
        "texts": _texts(run, found, names) if run.config.analysis.texts else {},
        "pass_at_k": pass_curves(run),
        "rl_curves": rl_curves(run),
    }
    run.folder.write_json("analysis.json", result)
    say(run, result)
    return result


# --- texts -------------------------------------------------------------------------------------


def sources(run: Run, found: Found) -> dict[str, list[Example]]:
    """Texts by kind, as Examples whose weight marks the tokens that are measured.

    The kinds "intervention, ..." measure the replacement step alone, given problem and prefix:
    "kept" ones unlocked their problem, "held out" ones did too but stay out of the SFT set
    (`analysis.held_out`), "unsolved" ones never led to an answer.
    """
    problems = {problem.id: problem for problem in found.selected}
    by_id = {record.id: record for record in found.interventions}
    share = run.config.analysis.held_out

    def attempts(grade: str) -> list[Attempt]:
        return [r for r in found.attempts if r.grade == grade and r.problem_id in problems]

    def gate(name: str, held: bool | None = None) -> list[Intervention]:
        passed = [record for record in found.interventions if record.gate == name]
        is_held = [sft_data.is_held_out(record.problem_id, share) for record in passed]
        return [r for r, h in zip(passed, is_held, strict=True) if held is None or h == held]

    def target(record: Intervention) -> list[int]:
        return [*record.prefix_ids, *record.intervention_ids]

    right = [r for r in found.continuations if (r.start, r.grade) == ("intervention", "correct")]
    guided = [record for record in found.interventions if record.guided]
    references = [problem for problem in found.selected if problem.reference]
    tokenizer = run.sampler.tokenizer
    # kind: records, the answer before the measured tokens, the measured tokens
    kinds: dict[str, tuple[Sequence[Any], Any, Any]] = {
        "attempt, wrong": (attempts("wrong"), _nothing, _sampled),
        "attempt, right": (attempts("correct"), _nothing, _sampled),
        "reference": (references, _nothing, lambda r: encode(tokenizer, r.reference)),
        "guided solution": (guided, _nothing, lambda r: encode(tokenizer, r.guided)),
        "prefix + intervention": (gate("kept"), _nothing, target),
        "continuation, right": (right, lambda r: target(by_id[r.intervention_id]), _sampled),
        "intervention, kept": (gate("kept", False), _prefix, _step),
        "intervention, held out": (gate("kept", True), _prefix, _step),
        "intervention, unsolved": (gate("unsolved"), _prefix, _step),
    }
    made = {}
    for kind, (records, before, ids) in kinds.items():
        chosen = _spread(run, records)
        keys = [r.id if isinstance(r, Problem) else r.problem_id for r in chosen]
        rows = zip(keys, chosen, strict=True)
        examples = [_example(run, problems[key], before(r), ids(r)) for key, r in rows]
        made[kind] = [example for example in examples if any(example.weights)]
    made["SFT example"] = _spread(run, found.examples)
    return {kind: examples for kind, examples in made.items() if examples}


def _example(run: Run, problem: Problem, before: list[int], ids: list[int]) -> Example:
    head = [*run.sampler.prompt(problem), *before]
    weights = [0.0] * len(head) + [1.0] * len(ids)
    return Example(token_ids=[*head, *ids], weights=weights, problem_id=problem.id)


def _nothing(record: Any) -> list[int]:
    return []


def _sampled(record: Attempt | Continuation) -> list[int]:
    return record.token_ids


def _prefix(record: Intervention) -> list[int]:
    return record.prefix_ids


def _step(record: Intervention) -> list[int]:
    return record.intervention_ids


def _spread(run: Run, records: Sequence[Any]) -> list[Any]:
    """At most `analysis.texts` of the records, evenly spread over them."""
    return [records[place] for place in spread(len(records), run.config.analysis.texts)]


def _texts(run: Run, found: Found, names: Sequence[str]) -> dict[str, Any]:
    """Kind -> counts, and per weights the mean over texts of NLL, likelihood and entropy."""
    made = sources(run, found)
    measured: dict[str, dict[str, list[TextMeasure]]] = {kind: {} for kind in made}
    for name in names:
        run.hold(name)
        with run.metrics.phase("score"):
            for kind, examples in made.items():
                measured[kind][name] = measure(run, examples)
    run.metrics.row("analysis", 1, {"texts": sum(map(len, made.values()))})
    seed = run.config.seed
    table: dict[str, Any] = {}
    for kind, by_name in measured.items():
        texts = by_name[names[0]]
        table[kind] = {
            "texts": len(texts),
            "tokens": sum(text.num_tokens for text in texts),
            "of": {
                name: {
                    "nll": (nll := evaluate.estimate([text.nll for text in texts], seed)),
                    "likelihood": math.exp(-nll.value),
                    "entropy": evaluate.estimate([text.entropy for text in texts], seed),
                }
                for name, texts in by_name.items()
            },
        }
    return table


@torch.no_grad()
def measure(run: Run, examples: Sequence[Example]) -> list[TextMeasure]:
    """What the weights in the decoder make of the weighted tokens of each Example."""
    sums = [[0.0, 0.0, 0.0] for _ in examples]
    config = msgspec.structs.replace(run.config.batch, too_long="alone")
    for batch in pack(examples, config).batches:
        batch = batch.to(run.device)
        hidden_ND = run.decoder(*batch.inputs())
        logprob_N, entropy_N = linear_logprob(hidden_ND, run.decoder.head_weight_VD, batch.target_N)
        rows = zip(batch.sequence_N.tolist(), logprob_N.tolist(), entropy_N.tolist(), strict=True)
        for sequence, logprob, entropy in rows:
            total = sums[batch.examples_S[sequence]]
            for place, value in enumerate((1.0, -logprob, entropy)):
                total[place] += value
    return [TextMeasure(int(num), nll / num, entropy / num) for num, nll, entropy in sums]


# --- curves ------------------------------------------------------------------------------------


def pass_curves(run: Run) -> dict[str, dict[int, Estimate]]:
    """Stored evaluation -> k -> unbiased pass@k, for k = 1, 2, 4, ... and all samples."""
    samples = run.config.evaluate.samples
    ks = sorted({2**power for power in range(samples.bit_length())} | {samples})
    stored = read_evaluations(run.folder.path)
    found = {key: summarised(evaluation, ks) for key, evaluation in stored.items()}
    return {key: summary.pass_at_k for key, summary in found.items() if summary}


def rl_curves(run: Run) -> dict[str, dict[str, list[float | None]]]:
    """Stage -> figure -> its value at each RL step; None where a step had no update."""
    stages = {row["stage"] for row in run.metrics.journal.records if "zero_advantage" in row}
    return {
        stage: {key: [row.get(key) for row in run.metrics.rows(stage)] for key in ("step", *CURVES)}
        for stage in sorted(stages)
    }


# --- console -----------------------------------------------------------------------------------


def say(run: Run, result: dict[str, Any]) -> None:
    """The tables, as compact as they get."""
    if result["texts"]:
        run.metrics.console.print(text_table(result["texts"]).rich())
    if result["pass_at_k"]:
        run.metrics.console.print(_pass_table(result["pass_at_k"]).rich())


def text_table(texts: dict[str, Any]) -> Table:
    """Texts by kind: their likelihood and entropy under each of the weights."""
    names = list(next(iter(texts.values()))["of"])
    columns = ["text", ">texts", ">tokens", *(f">NLL, {label(name)}" for name in names)]
    columns += [f">{what}, {label(name)}" for name in names for what in ("p", "entropy")]
    rows = []
    for kind, row in texts.items():
        figures = [row["of"][name] for name in names]
        cells = [kind, f"{row['texts']}", f"{row['tokens']:,}"]
        cells += [interval(found["nll"], 3, scale=1) for found in figures]
        for found in figures:
            cells += [f"{found['likelihood']:.3f}", f"{found['entropy'].value:.3f}"]
        rows.append(cells)
    return Table(
        "Texts under the weights: per-token means in nats, mean over texts; p = exp(-NLL)",
        heads(*columns),
        rows,
    )


def _pass_table(curves: dict[str, dict[int, Estimate]]) -> Table:
    ks = sorted({k for curve in curves.values() for k in curve})
    return Table(
        "pass@k % on the held-out problems (unbiased)",
        heads("weights", *(f">k = {k}" for k in ks)),
        [
            [label(key), *(f"{100 * curve[k].value:.1f}" if k in curve else "" for k in ks)]
            for key, curve in curves.items()
        ],
    )
