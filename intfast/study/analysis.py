"""The paper's other tables, on any run: likelihoods, entropy, pass@k curves, and RL curves.

Written to `analysis.json` at the end of a run, and, of single tokens, to `example_logprobs.jsonl`
for the report. Only reads weights and records: no result depends on it. Every text is scored as it
stands in training: prompt before it, token by token, temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import torch

from intfast import evaluate
from intfast.batch import pack
from intfast.collect import Found
from intfast.kernels.linear_logprob import linear_logprob
from intfast.labels import label
from intfast.methods import sft_data
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.run import Run
from intfast.state.journal import where
from intfast.study.read import TokenLogprobs, read_evaluations
from intfast.study.summary import summarised
from intfast.study.tables import Table, heads, interval
from intfast.tokens import decode, encode

CURVES = ("reward", "zero_advantage", "all_wrong", "all_right", "length", "truncated")
CURVES += ("entropy_sampled", "entropy_mean", "sampled_tokens")


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
    samples = run.config.evaluate.samples
    ks = sorted({2**power for power in range(samples.bit_length())} | {samples})
    stored = read_evaluations(run.folder.path)
    summaries = {key: summarised(evaluation, ks) for key, evaluation in stored.items()}
    stages = {row["stage"] for row in run.metrics.journal if "zero_advantage" in row}
    result = {
        "texts": _texts(run, found, names) if run.config.analysis.texts else {},
        "pass_at_k": {key: summary.pass_at_k for key, summary in summaries.items() if summary},
        # None where a step had no update.
        "rl_curves": {
            stage: {k: [row.get(k) for row in run.metrics.rows(stage)] for k in ("step", *CURVES)}
            for stage in sorted(stages)
        },
    }
    run.folder.write_json("analysis.json", result)
    if result["texts"]:
        run.metrics.console.print(text_table(result["texts"]).rich())
    return result


# --- texts -------------------------------------------------------------------------------------


def sources(run: Run, found: Found) -> dict[str, list[Example]]:
    """Texts by kind, as Examples whose weight marks the tokens that are measured.

    The kinds "intervention, ..." measure the replacement step alone, given problem and prefix:
    "kept" ones unlocked their problem, "held out" ones did too but stay out of the SFT set
    (`analysis.held_out`), "unsolved" ones never led to an answer.
    """
    problems = {problem.id: problem for problem in found.selected}
    by_id = {record.id: place for place, record in enumerate(found.interventions)}
    share = run.config.analysis.held_out

    def attempts(grade: str) -> Sequence[Attempt]:
        return where(found.attempts, lambda r: r.grade == grade and r.problem_id in problems)

    def gate(name: str, *held_out: bool) -> Sequence[Intervention]:
        wanted = held_out or (False, True)
        return where(
            found.interventions,
            lambda r: r.gate == name and sft_data.is_held_out(r.problem_id, share) in wanted,
        )

    def target(record: Intervention) -> list[int]:
        return [*record.prefix_ids, *record.intervention_ids]

    def begun(record: Continuation) -> Intervention:
        return found.interventions[by_id[record.intervention_id]]

    right = where(found.continuations, lambda r: (r.start, r.grade) == ("intervention", "correct"))
    guided = where(found.interventions, lambda r: bool(r.guided))
    references = [problem for problem in found.selected if problem.reference]
    nothing, sampled = (lambda r: []), attrgetter("token_ids")
    prefix, step = attrgetter("prefix_ids"), attrgetter("intervention_ids")
    tokenizer, lead = run.sampler.tokenizer, run.sampler.style.lead
    # kind: records, the answer before the measured tokens, the measured tokens
    kinds: dict[str, tuple[Sequence[Any], Any, Any]] = {
        "attempt, wrong": (attempts("wrong"), nothing, sampled),
        "attempt, right": (attempts("correct"), nothing, sampled),
        "reference": (references, nothing, lambda r: encode(tokenizer, lead + r.reference)),
        "guided solution": (guided, nothing, lambda r: encode(tokenizer, lead + r.guided)),
        "prefix + intervention": (gate("kept"), nothing, target),
        "continuation, right": (right, lambda r: target(begun(r)), sampled),
        "intervention, kept": (gate("kept", False), prefix, step),
        "intervention, held out": (gate("kept", True), prefix, step),
        "intervention, unsolved": (gate("unsolved"), prefix, step),
    }
    made = {}
    for kind, (records, before, ids) in kinds.items():
        examples = []
        for record in _spread(run, records):
            key = record.id if isinstance(record, Problem) else record.problem_id
            head, measured = [*run.sampler.prompt(problems[key]), *before(record)], ids(record)
            weights = [0.0] * len(head) + [1.0] * len(measured)
            ids_all = [*head, *measured]
            examples.append(Example(token_ids=ids_all, weights=weights, problem_id=key))
        made[kind] = [example for example in examples if any(example.weights)]
    made["SFT example"] = _spread(run, found.examples)
    return {kind: examples for kind, examples in made.items() if examples}


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
    # A run that is continued after its analysis scores again: one row, of the last time.
    run.metrics.forget_after("analysis", 0)
    run.metrics.row("analysis", 1, {"texts": sum(map(len, made.values()))})
    seed = run.config.seed
    return {
        kind: {
            "texts": len(by_name[names[0]]),
            "tokens": sum(text.num_tokens for text in by_name[names[0]]),
            "of": {
                name: {
                    "nll": (nll := evaluate.estimate([text.nll for text in texts], seed)),
                    "likelihood": math.exp(-nll.value),
                    "entropy": evaluate.estimate([text.entropy for text in texts], seed),
                }
                for name, texts in by_name.items()
            },
        }
        for kind, by_name in measured.items()
    }


def measure(run: Run, examples: Sequence[Example]) -> list[TextMeasure]:
    """What the weights in the decoder make of the weighted tokens of each Example."""
    found = []
    for scored in score(run, examples):
        logprobs, entropies = zip(*scored.values(), strict=True)
        num = len(scored)
        found.append(TextMeasure(num, -sum(logprobs) / num, sum(entropies) / num))
    return found


# --- tokens ------------------------------------------------------------------------------------


def write_tokens(run: Run, name: str, examples: Sequence[Example]) -> None:
    """Fill example_logprobs.jsonl, once: `metrics.example_logprobs` examples, spread over all.

    Ends with `name` in the decoder.
    """
    chosen = spread(len(examples), run.config.metrics.example_logprobs)
    journal = run.folder.journal("example_logprobs", TokenLogprobs)
    if [row.example for row in journal] == chosen:
        return
    wanted = [examples[index] for index in chosen]
    found = {}
    for held in ("base", name):
        run.hold(held)
        with run.metrics.phase("score"):
            found[held] = score(run, wanted)
    rows = zip(chosen, wanted, found["base"], found[name], strict=True)
    journal.replace(
        TokenLogprobs(
            example=index,
            pieces=pieces(run.sampler.tokenizer, example.token_ids),
            weights=example.weights,
            base=[base.get(place, (None,))[0] for place in range(len(example.token_ids))],
            trained=[trained.get(place, (None,))[0] for place in range(len(example.token_ids))],
        )
        for index, example, base, trained in rows
    )


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` places of `count`, evenly spread. Example: spread(5, 2) == [0, 2]."""
    num = min(count, limit)
    return [place * count // num for place in range(num)]


@torch.no_grad()
def score(run: Run, examples: Sequence[Example]) -> list[dict[int, tuple[float, float]]]:
    """Of each example: place of a loss token -> its log-prob and the entropy there, in nats."""
    found: list[dict[int, tuple[float, float]]] = [{} for _ in examples]
    config = msgspec.structs.replace(run.config.batch, too_long="alone")
    for batch in pack(examples, config).batches:
        batch = batch.to(run.device)
        hidden_ND = run.decoder(*batch.inputs())
        head_VD, options = run.decoder.head_weight_VD, run.decoder.head_options
        scored = linear_logprob(hidden_ND, head_VD, batch.target_N, **options)
        columns = (batch.sequence_N, batch.position_ids_T[batch.rows_N], *scored)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for sequence, position, logprob, entropy in rows:
            # A row speaks of the token behind it.
            found[batch.examples_S[sequence]][position + 1] = (logprob, entropy)
    return found


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, so that they join to the text of all.

    A token may end inside a character, and a space may depend on the token before: each piece is
    what its token adds to the text of the tokens since the last two whole pieces.
    """
    found: list[str] = []
    begin = settled = 0
    before = ""
    for end in range(1, len(token_ids) + 1):
        text = decode(tokenizer, token_ids[begin:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        begin, settled = settled, end
        before = decode(tokenizer, token_ids[begin:settled])
    return found


# --- tables ------------------------------------------------------------------------------------


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
    title = "Texts under the weights: per-token means in nats, mean over texts; p = exp(-NLL)"
    return Table(title, heads(*columns), rows)
