"""A whole run: the pipeline, and then everything that is said of what it left."""

from __future__ import annotations

import time
from typing import Any

from intfast import pipeline
from intfast.collect import Found
from intfast.config import Config
from intfast.run import Run, open_run
from intfast.state.metrics import make_console
from intfast.study import analysis, report, summary, token_logprobs


def train(config: Config, console: Any = None) -> dict[str, Any]:
    """All stages of a config, then `finish`; returns the content of summary.json."""
    start = time.perf_counter()
    with open_run(config, console or make_console()) as run:
        found = pipeline.train(run)
        return finish(run, found, start)


def finish(run: Run, found: Found, start: float) -> dict[str, Any]:
    """Tables, likelihoods and the page of a run whose stages are done; returns the summary.

    Only reads weights and records: no result of the run depends on it.
    start: of the work, by time.perf_counter
    """
    if found.interventions:
        summary.say_intervention(run, found)
    if run.config.sft.epochs:
        token_logprobs.write(run, found.supervised, found.examples)
    analysis.write(run, found, found.supervised)
    result = summary.write(run, found, time.perf_counter() - start)
    page = report.write([run.folder.path], run.folder.path / "report.html")
    run.metrics.say(f"to read it, open {page}")
    return result
