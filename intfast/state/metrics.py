"""One JSONL row a step, one console line, one progress bar a long phase, seconds per phase."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from intfast import ranks
from intfast.safe_text import shown
from intfast.state import interrupt, oom
from intfast.state.journal import Journal

Row = dict[str, Any]
PLAIN_EVERY_S = 30.0
"""Seconds between progress lines where there is no terminal."""
PLAIN_WIDTH = 120
"""Columns of the tables where there is no terminal to ask."""


def make_console() -> Console:
    """A console as wide as its terminal, or COLUMNS, or wide enough for the tables in a log.

    Of several ranks only the first prints.
    """
    console = Console(quiet=not ranks.now().is_main)
    if not (console.is_terminal or "COLUMNS" in os.environ):
        console.width = PLAIN_WIDTH
    return console


def say(console: Console, text: object) -> None:
    """Print a text as it is, but for hidden characters and secrets; brackets are not markup."""
    console.print(shown(text), markup=False, highlight=False, soft_wrap=True)


class Metrics:
    """The metrics journal of a run and its console.

    Phases add up seconds until the next row, which carries them as `seconds_<phase>`; so the rows
    of a run, summed, say where its time went, across interruptions too.
    """

    def __init__(
        self, journal: Journal[Row], console: Console | None = None, last_write: float | None = None
    ) -> None:
        """last_write: of the process that this one continues, in Unix seconds."""
        self.journal = journal
        self._last_write = last_write
        self.console = console or make_console()
        self.listeners: list[Callable[[Row], None]] = []
        """Called with every row after it is on the disk; they must not raise or wait."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._carried: list[Callable[[], Row]] = []

    def carry(self, take: Callable[[], Row]) -> None:
        """Let every row hold what `take` returns when it is written."""
        self._carried.append(take)

    def row(self, stage: str, step: int, values: Row, line: str = "") -> None:
        """Write one row; print `line` where given."""
        seconds = {f"seconds_{name}": round(value, 3) for name, value in self._seconds.items()}
        self._seconds.clear()
        carried = {key: value for take in self._carried for key, value in take().items()}
        self.aside(stage, step, values | carried | seconds | self._restart())
        if line:
            self.say(line)

    def aside(self, stage: str, step: int, values: Row) -> None:
        """Write one row alone; of another stage than the one to which the seconds belong."""
        row = {"stage": stage, "step": step} | values
        self.journal.append([row])
        for listener in self.listeners:
            listener(row)

    def _restart(self) -> Row:
        """In the first row of a continued run: what the interruption cost until this row."""
        if self._last_write is None:
            return {}
        start_s = round(interrupt.seconds_up(), 3)
        write_s = round(time.time() - self._last_write, 3)
        self._last_write = None
        self.say(
            f"continued: first new result {start_s:.1f} s after this start, "
            f"{write_s:.1f} s after the last write of the process before"
        )
        return {"since_start_s": start_s, "since_last_write_s": write_s}

    def rows(self, stage: str) -> list[Row]:
        """The rows of a stage so far."""
        return [row for row in self.journal if row["stage"] == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop rows of steps that an interrupted run did, but did not save."""
        kept = [r for r in self.journal if r["stage"] != stage or r["step"] <= step]
        if len(kept) < len(self.journal):
            self.journal.replace(kept)

    def seconds(self) -> dict[str, dict[str, float]]:
        """Stage -> phase -> seconds, over all rows."""
        return seconds(self.journal)

    def say(self, text: str) -> None:
        """Print one line, see the function `say`."""
        say(self.console, text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside under `name`."""
        start = time.perf_counter()
        try:
            with oom.explained(name), interrupt.phase(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def progress(self, title: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
        """A bar over `total` samples, if that is known; `advance(num_finished, num_tokens)` adds.

        Without a terminal: a line at most every PLAIN_EVERY_S seconds.
        """
        bar = None
        if self.console.is_terminal:
            rate = TextColumn("{task.fields[rate]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate)
            bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        finished = tokens = 0
        start = last = time.perf_counter()
        with bar or nullcontext():
            task = bar and bar.add_task(title, total=total, rate="")

            def advance(num_finished: int, num_tokens: int) -> None:
                nonlocal finished, tokens, last
                interrupt.beat()
                finished, tokens = finished + num_finished, tokens + num_tokens
                now = time.perf_counter()
                unit = " tokens/s" if tokens else "/s"
                rate = f"{(tokens or finished) / max(1e-9, now - start):,.0f}{unit}"
                if bar:
                    bar.update(task, advance=num_finished, rate=rate)
                elif now - last >= PLAIN_EVERY_S:
                    last = now
                    self.say(f"{title}: {finished}{f'/{total}' if total else ''}, {rate}")

            yield advance


def seconds(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Stage -> phase -> seconds, over these rows."""
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds_"):
                total[row["stage"]][name.removeprefix("seconds_")] += value
    return {stage: dict(phases) for stage, phases in total.items()}
