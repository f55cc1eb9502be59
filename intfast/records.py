"""The records that walk through the house, and the legend of shapes.

Shapes: P problems, G samples per problem, N = P x G flat, S packed sequences, T packed tokens,
D model width, F feed-forward width, H query heads, J key/value heads, K head width, V vocabulary.
A tensor or nested list that crosses a function border ends in one letter per axis:
`hidden_TD`, `completions_P_G`.

The records of this file are lines of JSONL files of the run folder: a run can be read from it
alone.
"""

from __future__ import annotations

import copyreg

import msgspec
from msgspec import UNSET, UnsetType

Reward = float | UnsetType
"""Where `grade` does not say it: 1 for right, 0 for wrong. Not written where it is UNSET."""


def _unset() -> UnsetType:
    return UNSET


# Ranks send each other records. Pickle would look for the name of UNSET in every loaded module, and
# lazy ones fail when they are asked.
copyreg.pickle(UnsetType, lambda _: (_unset, ()))


# Strict: a field that is misspelt in a file is an error with its line, not a default.
class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: immutable, strict about its fields."""


class Problem(Record):
    """One question that can be graded.

    Example: Problem(id="omni-17", problem="What is 1 + 1?", answer="2",
    reference="1 + 1 = 2, so the answer is \\boxed{2}.")
    """

    id: str
    problem: str
    answer: str
    reference: str | None = None
    """A correct worked solution. Interventions need it; RL and evaluation do not."""
    source: str = ""
    """Where the row came from, for a person: "train.jsonl:17"."""
    row: str | UnsetType = UNSET
    """The whole row as JSON, for a grading function; not written where there is none."""


class Attempt(Record):
    """One sampled solution of a problem, graded.

    Example: Attempt(problem_id="omni-17", sample=0, prompt_ids=[1, 2], token_ids=[7, 8],
    text="1 + 1 = 3", finish_reason="stop", grade="wrong", reason="wrong", policy_version=0)
    """

    problem_id: str
    sample: int
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    grade: str
    """"correct", "wrong" or "unscored"."""
    reason: str
    """The reason code of the grade, for example "wrong", "no_answer", "timeout"."""
    policy_version: int
    reward: Reward = UNSET


class Intervention(Record):
    """One candidate intervention for one wrong attempt; kept, or dropped at a named gate.

    `prefix_ids` are the attempt's own token ids before the located step; `intervention_ids` are
    the replacement step, tokenised once. `gate` is "kept" or the gate that dropped the candidate.
    """

    id: str
    problem_id: str
    attempt: int
    sample: int
    guided: str
    reply: str
    gate: str
    reason: str = ""
    location: int = 0
    """The number of the first wrong step, counted from 1; 0 when the reply named none."""
    content: str = ""
    prefix_ids: list[int] = []
    intervention_ids: list[int] = []
    num_tokens: int = 0
    """Tokens generated for this candidate (guided solve counted once, with sample 0)."""
    finish_reason: str = ""
    """Of the reply, as in a Completion; "" where there is none, and in runs before this field."""


class Continuation(Record):
    """One sampled completion of a partial answer, graded.

    `start` says what was continued: "intervention" (prefix + intervention), "error" (prefix + the
    original wrong step) or "prefix" (the prefix alone).
    """

    intervention_id: str
    problem_id: str
    start: str
    sample: int
    token_ids: list[int]
    text: str
    finish_reason: str
    grade: str
    reason: str
    reward: Reward = UNSET


class Guided(Record):
    """One solution that was sampled with the reference, or part of it, in the prompt; graded.

    `kind` is "reflection" (a rewrite of a wrong attempt), "star", "regft" (a solution along the
    reference) or "hint" (a continuation of the reference's beginning, `share` of its characters).
    """

    kind: str
    problem_id: str
    sample: int
    token_ids: list[int]
    text: str
    finish_reason: str
    grade: str
    reason: str
    attempt: int = -1
    """The attempt that was rewritten; -1 where there is none."""
    share: float = 0.0
    reward: Reward = UNSET


class Example(Record):
    """One training sequence: tokens, and what the loss does with each of them.

    All lists are as long as `token_ids`; entry t speaks of predicting token t from those before
    it, so entry 0 is never used. Prompt tokens have weight 0.
    Example: Example(token_ids=[1, 2, 7, 8], weights=[0, 0, 1, 1])
    """

    token_ids: list[int]
    weights: list[float]
    advantages: list[float] | None = None
    """Policy objective only: the advantage of each token."""
    sampler_logprobs: list[float] | None = None
    """Policy objective only: the log-prob under which each token was sampled (natural log)."""
    problem_id: str = ""
    kind: str = ""
    """What the sequence is, for reports: "intervention", "rollout", ..."""


# Never stored: a field of Example would be in every line of examples.jsonl.
class Aimed(Example, kw_only=True):
    """An Example of a policy whose last token was not sampled, and should have this log-prob."""

    goal: float
