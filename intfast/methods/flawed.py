"""RL from flawed beginnings (after arXiv 2512.17079): some answers start with a wrong step.

The rollout has to notice the error and recover; the beginning is prompt and carries no loss. The
paper's errors are written by a stronger model; these are real ones: an attempt of the model's own
up to and including the step that InT's verification found wrong. The prompt is the bare problem
in both halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from msgspec import Meta

from intfast import config, intervene
from intfast.batch import shuffled
from intfast.engine.protocol import derive_seed
from intfast.methods.method import Method, needs
from intfast.records import Attempt, Intervention
from intfast.sample import Start


class Flawed(Method):
    """A share of the problems starts behind a beginning that holds an error."""

    class Settings(config.Settings):
        """The paper's share."""

        share: Annotated[float, Meta(ge=0, le=1)] = 0.5

    made: list[Start] | None = None

    @staticmethod
    def rules(config: config.Config, own: Any) -> Iterator[tuple[str, bool, str]]:
        """It sets the beginnings itself."""
        yield from needs(config, "flawed")

    def tasks(self, tasks: list[Start], step: int) -> list[Start]:
        """The same starts in every step; which are flawed is decided by the seed."""
        if self.made is None:
            flaws = self._flaws({task.problem.id for task in tasks})
            order = shuffled(len(tasks), derive_seed(self.run.config.seed, "flawed"))
            able = [place for place in order if tasks[place].problem.id in flaws]
            self.made = list(tasks)
            for place in able[: round(self.own.share * len(tasks))]:
                ids = flaws[tasks[place].problem.id]
                self.made[place] = tasks[place]._replace(answer_ids=ids)
            said = (
                f"{self.stage}: {len(able[: round(self.own.share * len(tasks))])} of {len(tasks)}"
            )
            self.run.metrics.say(f"{said} problems start with a flawed beginning")
        return self.made

    def _flaws(self, ids: set[str]) -> dict[str, list[int]]:
        """Problem id -> the first located error that fits: an attempt through its wrong step."""
        run, found = self.run, {}
        attempts = {
            (record.problem_id, record.sample): record
            for record in run.folder.journal("attempts", Attempt)
            if record.problem_id in ids and record.grade == "wrong"
        }
        for record in run.folder.journal("interventions", Intervention):
            attempt = attempts.get((record.problem_id, record.attempt))
            located = record.gate in intervene.REACHED_CONTINUATION and attempt is not None
            if located and record.problem_id not in found:
                flaw = intervene.answer_so_far(run.sampler, attempt, record, "error")
                length = len(attempt.prompt_ids) + len(flaw)
                if run.sampler.fits(length, run.config.rl.sampling):
                    found[record.problem_id] = flaw
        return found
