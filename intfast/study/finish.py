"""A whole run: the pipeline, and then everything that is said of what it left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from intfast import pipeline, ranks
from intfast.collect import Found
from intfast.config import Config
from intfast.run import Run, open_run
from intfast.study import analysis, report, summary


def train(config: Config, console: Any = None) -> dict[str, Any]:
    """All stages of a config, then `finish`; returns the content of summary.json."""
    with open_run(config, console) as run, page_of_failure(run):
        return finish(run, pipeline.train(run))


@contextmanager
def page_of_failure(run: Run) -> Iterator[None]:
    """Write the page also where the work inside fails: why it did can be read from it."""
    try:
        yield
    except (ValueError, RuntimeError):
        if not ranks.now().is_main:
            raise
        try:
            with ranks.alone():
                page = report.write([run.folder.path], run.folder.path / "report.html")
            run.metrics.say(f"the run failed; what it did is in {page}")
        except Exception as second:  # said, and never in place of what went wrong first
            run.metrics.say(f"the run failed, and its page could not be written: {second!r}")
        raise


def finish(run: Run, found: Found) -> dict[str, Any]:
    """Tables, likelihoods and the page of a run whose stages are done; returns the summary.

    Only reads weights and records: no result of the run depends on it. Of several ranks the first
    does it alone.
    """
    return ranks.now().first(lambda: _finish(run, found), model=True)


def _finish(run: Run, found: Found) -> dict[str, Any]:
    if found.interventions:
        summary.say_intervention(run, found)
    if run.config.sft.epochs:
        analysis.write_tokens(run, found.supervised, found.examples)
    analysis.write(run, found, found.supervised)
    result = summary.write(run, found, time.perf_counter() - run.opened)
    page = report.write([run.folder.path], run.folder.path / "report.html")
    run.metrics.say(f"to read it, open {page}")
    return result
