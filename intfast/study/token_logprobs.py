"""How SFT changed the log-probability of each trained token, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intfast.batch import pack
from intfast.prompts import decode
from intfast.records import Example, Record
from intfast.run import Run
from intfast.update import logprobs


class TokenLogprobs(Record):
    """One SFT example before and after SFT, for reports; all lists are as long as its tokens.

    Log-probs are natural, and None where a token carries no loss.
    Example: TokenLogprobs(example=0, pieces=["a", " b"], weights=[0, 1], base=[None, -2.5],
    trained=[None, -0.5])
    """

    example: int
    """The line of examples.jsonl, counted from 0."""
    pieces: list[str]
    """The text of each token; a character of several tokens is with its last one."""
    weights: list[float]
    base: list[float | None]
    trained: list[float | None]


Logprobs = list[float | None]
"""One per token of an Example; None where it carries no loss."""


def write(run: Run, name: str, examples: Sequence[Example]) -> None:
    """Fill example_logprobs.jsonl, once: `metrics.example_logprobs` examples, spread over all.

    Only reads the weights: no result of the run depends on it. Ends with `name` in the decoder.
    """
    chosen = spread(len(examples), run.config.metrics.example_logprobs)
    journal = run.folder.journal("example_logprobs", TokenLogprobs)
    if [row.example for row in journal.records] == chosen:
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
            base=base,
            trained=trained,
        )
        for index, example, base, trained in rows
    )


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` places of `count`, evenly spread. Example: spread(5, 2) == [0, 2]."""
    num = min(count, limit)
    return [place * count // num for place in range(num)]


def score(run: Run, examples: Sequence[Example]) -> list[Logprobs]:
    """Log-probs (natural log) of the examples' loss tokens under the weights in the decoder."""
    found: list[Logprobs] = [[None] * len(example.token_ids) for example in examples]
    packed = pack(examples, run.config.batch)
    scored = logprobs(run.decoder, packed, run.device, temperature=1.0)
    for batch, logprob_N in zip(packed.batches, scored, strict=True):
        positions = batch.position_ids_T[batch.rows_N].tolist()
        sequences, values = batch.sequence_N.tolist(), logprob_N.tolist()
        for position, sequence, value in zip(positions, sequences, values, strict=True):
            # A row speaks of the token behind it.
            found[batch.examples_S[sequence]][position + 1] = value
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
