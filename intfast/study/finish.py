"""A whole run: the pipeline, and then everything that is said of what it left."""

from __future__ import annotations

import time
from typing import Any

from intfast import pipeline
from intfast.collect import Found
from intfast.config import Config
from intfast.run import Parts, build
from intfast.state.metrics import make_console
from intfast.study import analysis, report, summary, token_logprobs


def run(config: Config, console: Any = None) -> dict[str, Any]:
    """All stages of a config, then `finish`; returns the content of summary.json."""
    start = time.perf_counter()
    with build(config, console or make_console()) as parts:
        found = pipeline.train(parts)
        return finish(parts, found, start)


def finish(parts: Parts, found: Found, start: float) -> dict[str, Any]:
    """Tables, likelihoods and the page of a run whose stages are done; returns the summary.

    Only reads weights and records: no result of the run depends on it.
    start: of the work, by time.perf_counter
    """
    if found.interventions:
        summary.say_intervention(parts, found)
    if parts.config.sft.epochs:
        token_logprobs.write(parts, found.supervised, found.examples)
    analysis.write(parts, found, found.supervised)
    result = summary.write(parts, found, time.perf_counter() - start)
    page = report.write([parts.folder.path], parts.folder.path / "report.html")
    parts.metrics.say(f"to read it, open {page}")
    return result
