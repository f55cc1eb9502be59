"""What the rivals of interventions ask, in both prompt styles: rewrites, rationales, hints.

Each function gives token ids; the rest of a conversation is prompts.Style's.
"""

from __future__ import annotations

from intfast.prompts import ChatStyle, Style
from intfast.records import Problem

_REFLECT = """\
Below are a problem, a reference solution, and an earlier solution of yours that came out wrong.

<problem>
{problem}
</problem>

<reference>
{reference}
</reference>

<attempt>
{attempt}
</attempt>

Compare the two and find out where your solution goes astray. Then write a complete solution \
that is right, step by step and in your own way of writing, keeping what was good in your first \
one. Write it for a reader who has seen neither text, and close with the final answer."""

_HINT = """\
{problem}

Here is the beginning of a correct solution, broken off at some point:

<reference>
{beginning}
</reference>

Read it closely, then go on from exactly where it ends, without repeating it, up to the final \
answer."""


_FIRST_STEP = """\
{problem}

Write only the first step of a solution. It need not reach the answer."""


def first_step(style: Style, problem: Problem) -> list[int]:
    """The request for the initial step alone (UPFT); in the compact style the bare problem."""
    if not isinstance(style, ChatStyle):
        return style.solve(problem)
    return style.ask(_FIRST_STEP.format(problem=style.question(problem)))


def reflect(style: Style, problem: Problem, attempt: str) -> list[int]:
    """The request to rewrite a whole wrong attempt, given the reference."""
    assert problem.reference is not None
    if not isinstance(style, ChatStyle):
        return style.ask(
            f"<rewrite> {problem.problem} <sol> {attempt} <ref> {problem.reference} <out>"
        )
    return style.ask(
        _REFLECT.format(
            problem=style.quote(style.question(problem)),
            reference=style.quote(problem.reference),
            attempt=style.quote(attempt),
        )
    )


def rationalise(style: Style, problem: Problem) -> list[int]:
    """The request to solve the problem with the reference in view, no attempt being shown."""
    # The compact base model knows no request with a reference alone: the attempt is left empty.
    return style.guided(problem) or reflect(style, problem, "")


def hint(style: Style, problem: Problem, beginning: str) -> list[int]:
    """The problem with the beginning of its reference, to be continued from there."""
    if not isinstance(style, ChatStyle):
        # The language has no hints. After a reference's beginning the model goes on in its own
        # dialect, and solves more than after the same words in the <tutor> or <rewrite> forms.
        return style.ask(f"<solve> {problem.problem} {beginning}")
    question, beginning = style.question(problem), style.quote(beginning)
    return style.ask(_HINT.format(problem=question, beginning=beginning))


def append_hint(style: Style, problem: Problem, beginning: str) -> list[int]:
    """The problem with the beginning of its solution as a part of it, not to be continued."""
    if not isinstance(style, ChatStyle):
        return hint(style, problem, beginning)
    text = style.quote(beginning)
    return style.ask(f"{style.question(problem)}\n\n## Hint: partial solution\n\n{text}")
