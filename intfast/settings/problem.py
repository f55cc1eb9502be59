"""Settings of what goes in: problem files, prompts, grading; embedded in the tree of config.py."""

from __future__ import annotations

from typing import Literal

from msgspec import field

from intfast.settings.numerics import Settings, at_least


class DataConfig(Settings):
    """Problems with answers and reference solutions."""

    train: str | None = None
    """Training problems: .jsonl, .json, .parquet, a dataset folder, or a hub name."""
    test: str | None = None
    """Held-out problems; absent: no evaluation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Your column names where ours do not fit: {problem = "question_text"}."""
    train_limit: int | None = None
    """Use only the first so many training problems."""
    test_limit: int | None = None
    """Use only the first so many test problems."""

    def check(self) -> list[str]:
        return at_least(self, train_limit=1, test_limit=1)


class PromptConfig(Settings):
    """What the model is asked, and how its text is cut into steps."""

    style: Literal["chat", "compact"] = "chat"
    """"chat": the two-turn conversation for instruct models; "compact": the quickstart's."""
    instruction: str = ""
    """Text added to every problem in the chat style, for example how to box the answer."""
    separator: str = "\n\n"
    """What ends a step. Steps keep their separator, so they join to the attempt byte for byte."""

    def check(self) -> list[str]:
        return (
            [] if self.separator else ["separator must not be empty; the paper's is a blank line"]
        )


class GradeConfig(Settings):
    """How the answer is found in a text and compared."""

    mode: str = "boxed"
    """"boxed": the last \\boxed{} (else after "Answer:"), as mathematics; "stated": the same
    (else after "answer is"), for models that box nothing; "tail:WORD": the text after the last
    WORD, compared as text."""
    workers: int = 2
    """Processes for answers that need a computer-algebra comparison."""
    timeout_s: float = 10.0
    """Seconds after which such a process is killed and the answer counted as unscored."""
    max_unscored: float = 0.5
    """Share of the latest 256 answers that may be unscored; above it the run stops. 1: never."""

    def check(self) -> list[str]:
        errors = at_least(self, workers=1)
        if not self.timeout_s > 0:
            errors.append(f"timeout_s must be > 0, got {self.timeout_s}; use 10")
        if not 0 <= self.max_unscored <= 1:
            errors.append(f"max_unscored must be in [0, 1], got {self.max_unscored}; use 0.5")
        if self.mode not in ("boxed", "stated") and not (
            self.mode.startswith("tail:") and self.mode.removeprefix("tail:")
        ):
            errors.append(f'mode must be "boxed", "stated" or "tail:WORD", got "{self.mode}"')
        return errors
