"""What a method has generated, in tokens: for comparisons at equal tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intfast.records import Attempt, Continuation, Guided, Intervention
from intfast.run import Run


def generated_tokens(run: Run) -> dict[str, int]:
    """Tokens that the model generated to make training data and choose problems, by journal.

    Continuations from the error or the prefix alone, and evaluations, only measure: not counted.
    """

    records = run.folder.journal
    return {
        # An attempt is stored without the token that stopped it.
        "attempts": sum(
            len(record.token_ids) + (record.finish_reason == "stop")
            for record in records("attempts", Attempt)
        ),
        "verify": sum(record.num_tokens for record in records("interventions", Intervention)),
        "continue": sum(
            len(record.token_ids)
            for record in records("continuations", Continuation)
            if record.start == "intervention"
        ),
        "guided": sum(len(record.token_ids) for record in records("guided", Guided)),
    }


def rl_tokens(run: Run, name: str) -> int:
    """Tokens that an RL stage has generated so far: rollouts, and what its method drew beside."""
    return sum(map(of_step, run.metrics.rows(name)))


def of_step(row: Mapping[str, Any]) -> int:
    """Tokens that the step of a row generated; those before `rl.method` were of verifications."""
    return sum(row.get(key, 0) for key in ("sampled_tokens", "method_tokens", "verify_tokens"))
