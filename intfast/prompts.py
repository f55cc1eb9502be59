"""What the model is asked (solve, guided solve, verify + intervene) and how its reply is read.

Two styles share one interface. `ChatStyle` is the two-turn conversation for instruction-tuned
models, whose words are in words.py. `CompactStyle` is the word-level dialect of the quickstart
task. A reply is parsed strictly: what it does not say is not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Protocol

from intfast import verdict, words
from intfast.config import PromptConfig
from intfast.records import Problem
from intfast.template import Template, end_ids
from intfast.tokens import cut as cut
from intfast.tokens import decode as decode
from intfast.tokens import encode as encode
from intfast.verdict import Verdict


class Style(Protocol):
    """The questions of one prompt style, as token ids, and the reading of its replies."""

    # An answer ends with these ids and with nothing else: stop texts would need decoding.
    stop_ids: tuple[int, ...]
    """Token ids that end an answer; the first is the one to train."""
    lead: str
    """White space that stands between a prompt and a solution."""

    def solve(self, problem: Problem) -> list[int]:
        """The bare problem, up to where the answer begins."""

    def split(self, text: str) -> list[str]:
        """The steps of an attempt; they must join to it byte for byte."""

    def guided(self, problem: Problem) -> list[int] | None:
        """The request to solve along the reference; None where the style has no such turn."""

    def verify(self, problem: Problem, steps: Sequence[str], guided: str) -> list[int]:
        """The request to find the first wrong step and write its replacement."""

    def read(self, reply: str, steps: Sequence[str]) -> Verdict:
        """The verdict of a reply on an attempt with these steps."""

    def ask(self, text: str) -> list[int]:
        """Any other request, up to where the reply begins."""


def style_of(config: PromptConfig, tokenizer: Any, now: datetime | None = None) -> Style:
    """The prompt style that the config names, on a transformers tokenizer.

    now: what a template with a date is told, runfolder.prompt_time; None: the time it is.
    """
    if config.style == "compact":
        return CompactStyle(config, tokenizer)
    return ChatStyle(config, tokenizer, now)


# --- steps -----------------------------------------------------------------------------------


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a text, each with the separators that follow it: they join to the text.

    Example: split_steps("a\\n\\nb", "\\n\\n") == ["a\\n\\n", "b"]. "re:..." is a pattern.
    """
    steps: list[str] = []
    blank = 0
    # Byte for byte, so that a cut between steps is a cut of the text.
    if separator.startswith("re:"):
        ends = [match.end() for match in re.finditer(separator[3:], text, re.MULTILINE)]
        pieces = [text[a:b] for a, b in pairwise([0, *ends, len(text)]) if a < b]
    else:
        pieces = re.findall(rf".*?(?:{re.escape(separator)})+|.+$", text, flags=re.DOTALL)
    for end, piece in enumerate(pieces, 1):
        # What is blank belongs to the step behind it.
        if piece.strip() or end == len(pieces):
            steps.append("".join(pieces[blank:end]))
            blank = end
    return steps


# --- the chat style ----------------------------------------------------------------------------


class ChatStyle:
    """The two-turn conversation, rendered with the model's own chat template."""

    def __init__(self, config: PromptConfig, tokenizer: Any, now: datetime | None = None) -> None:
        self.config = config
        self.template = Template(config, tokenizer, now or datetime.now(UTC))
        self.stop_ids, self.lead = self.template.stop_ids, self.template.lead
        self.words = words.read(config.domain)
        self._control_tokens = verdict.control_tokens(tokenizer, unflagged=True)

    def solve(self, problem: Problem) -> list[int]:
        return self.ask(self.question(problem))

    def split(self, text: str) -> list[str]:
        return split_steps(text, self.config.separator)

    def guided(self, problem: Problem) -> list[int] | None:
        return self.ask(self._guided_turn(problem))

    def verify(self, problem: Problem, steps: Sequence[str], guided: str) -> list[int]:
        # The attempt is quoted inside our tags: it must not close them, nor bring its own.
        quoted = [self.quote(step.strip("\n")) for step in steps]
        numbered = "\n\n".join(f"[Substep {k}]\n{step}" for k, step in enumerate(quoted, 1))
        # The verifier is told the answer so that it can keep it out of the step; the leak gate
        # looks whether it did.
        answer = f", which is {self.quote(problem.answer)}" if problem.answer else ""
        ask = words.VERIFY.format(
            attempt=numbered, answer=answer, mark=self.mark(steps), words=self.words
        )
        if not guided:
            return self.ask(f"{self._guided_turn(problem)}\n\n{ask}")
        # The guided solution stands as the model's own earlier turn, as in the paper.
        turns = [("user", self._guided_turn(problem)), ("assistant", guided), ("user", ask)]
        return self.template.render(turns)

    def read(self, reply: str, steps: Sequence[str]) -> Verdict:
        found = verdict.read(reply, self.mark(steps), len(steps), self._control_tokens)
        if found.reason:
            return found
        separator, content = self.config.separator, found.content
        # A pattern says where a step ends, not what to write there.
        separator = "\n" if separator.startswith("re:") else separator
        if not self.config.separator.strip("\n"):
            # As in the paper: every line of the replacement becomes a step of its own.
            content = separator.join(filter(None, map(str.strip, content.split("\n"))))
        return Verdict(location=found.location, content=content + separator)

    def mark(self, steps: Sequence[str]) -> str:
        """What the tags of the verification of these steps carry, and the steps do not."""
        return verdict.mark_of("".join(steps))

    def ask(self, text: str) -> list[int]:
        return self.template.render([("user", text)])

    def quote(self, text: str) -> str:
        """A text of others, which can neither close our tags nor speak in control tokens."""
        return verdict.neutralise(verdict.break_tokens(text, self._control_tokens))

    def question(self, problem: Problem) -> str:
        """The problem with the instruction, where it has none of its own."""
        instruction = self.config.instruction
        if not instruction or instruction in problem.problem:
            return problem.problem
        return f"{problem.problem}\n\n{instruction}"

    def _guided_turn(self, problem: Problem) -> str:
        assert problem.reference is not None
        problem, reference = self.quote(problem.problem), self.quote(problem.reference)
        return words.GUIDED.format(problem=problem, reference=reference, words=self.words)


# --- the compact style -------------------------------------------------------------------------


# What separates the parts of a compact prompt; an attempt must not bring its own.
_CONTROL_WORD = re.compile(r"<\w++>")


class CompactStyle:
    """The word-level dialect of the quickstart task: benchmarks/quickstart_task/task.py."""

    def __init__(self, config: PromptConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.stop_ids = end_ids(tokenizer)
        self.lead = " "

    def solve(self, problem: Problem) -> list[int]:
        return self.ask(f"<solve> {problem.problem}")

    def split(self, text: str) -> list[str]:
        return split_steps(text, self.config.separator)

    def guided(self, problem: Problem) -> list[int] | None:
        return None

    def verify(self, problem: Problem, steps: Sequence[str], guided: str) -> list[int]:
        attempt = _CONTROL_WORD.sub("", "".join(steps)).strip()
        text = f"<check> {problem.problem} <sol> {attempt} <ref> {problem.reference} <out>"
        return self.ask(text)

    def read(self, reply: str, steps: Sequence[str]) -> Verdict:
        """Walk the reply along the attempt's own steps, four words each.

        `name value reference-value ok` for an agreeing step, `... bad <fix> STEP` at the first
        difference, `<none>` after the last; anything else is "unparsed".
        """
        end = self.config.separator.strip()
        words = reply.split()
        # A last piece that was cut off before its end is no step to be judged.
        walked = [step.split() for step in steps if step.rstrip().endswith(end)]
        for location, step in enumerate(walked, 1):
            row = words[4 * location - 4 : 4 * location]
            if len(row) < 4 or len(step) < 3 or row[:2] != [step[0], step[-2]]:
                return Verdict(reason="unparsed")
            if row[3] != ("ok" if row[2] == row[1] else "bad"):
                return Verdict(reason="unparsed")
            if row[3] == "bad":
                rest = words[4 * location :]
                fix = rest[1:]
                well_formed = (
                    rest[:1] == ["<fix>"]
                    and fix[:1] == [step[0]]
                    and fix.count(end) == 1
                    and fix[-1] == end
                )
                if not well_formed:
                    return Verdict(reason="unparsed")
                if any(map(_CONTROL_WORD.fullmatch, fix)):
                    return Verdict(location=location, reason="unsafe_text")
                return Verdict(location=location, content=" " + " ".join(fix))
        return Verdict(reason="no_error" if words[4 * len(walked) :] == ["<none>"] else "unparsed")

    def ask(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
