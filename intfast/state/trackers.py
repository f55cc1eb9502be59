"""Optional sinks for the rows of metrics.jsonl: TensorBoard, wandb, trackio.

JSONL is the truth, a tracker a copy: each is fed by a thread, so that one that fails or hangs
cannot stop a run. It is named once on the console and gets no more rows. Packages are imported only
when asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from intfast.config import Config
from intfast.labels import Weights
from intfast.state.files import write_atomic
from intfast.state.metrics import Metrics, Row
from intfast.state.runfolder import RunFolder

PROJECT = "intfast"
"""In wandb and trackio; the run has the name of its folder there."""
CLOSE_S = 60.0
"""Seconds that a tracker has at the end of a run to send what it still holds."""


class About(NamedTuple):
    """What a tracker is told of the run; `identity` is a name that no other run folder has."""

    path: Path
    config: Config
    identity: str


class TensorBoard:
    """Scalars `stage/name` in tensorboard/ of the run folder."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(about.path / "tensorboard"))
        self.close = self.writer.close

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)
        self.writer.flush()


class Hosted:
    """A wandb or trackio run, which a continued run continues.

    Every row carries the step of its stage as a number; wandb takes it for the horizontal axis.
    """

    def __init__(self, package: str, about: About) -> None:
        name = about.path.resolve().name
        own = {"name": f"{name}-{about.identity}"}
        if package == "wandb":
            own = {"name": name, "id": about.identity, "dir": str(about.path)}
        config = msgspec.to_builtins(about.config)
        init = importlib.import_module(package).init
        self.run = init(project=PROJECT, resume="allow", config=config, **own)
        self.close = self.run.finish
        self.has_axes = package == "wandb"
        self.stages: set[str] = set()

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        if self.has_axes and stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/step", hidden=True)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/step": step} | {f"{stage}/{k}": v for k, v in values.items()})


OPENERS: dict[str, Callable[[About], TensorBoard | Hosted]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda about: Hosted("wandb", about),
    "trackio": lambda about: Hosted("trackio", about),
}


def require(names: Sequence[str]) -> None:
    """Raise ValueError, with the line that installs them, where packages of trackers are absent."""

    def is_there(name: str) -> bool:
        spec = importlib.util.find_spec(name)
        # A folder wandb/ of logs in the working directory looks like a package without a file.
        return spec is not None and spec.origin is not None

    if missing := [name for name in names if not is_there(name)]:
        raise ValueError(
            f"metrics.trackers needs {' and '.join(missing)}, which is not installed; "
            f"pip install {' '.join(missing)}, or take it out of metrics.trackers"
        )


@contextmanager
def attached(config: Config, folder: RunFolder, metrics: Metrics) -> Iterator[None]:
    """The rows of `metrics` also go to the trackers of the config while inside."""
    names = config.metrics.trackers
    about = About(folder.path, config, _identity(folder.path) if names else "")
    feeds = [Feed(name, about, metrics.say) for name in names]
    metrics.listeners += [feed.put for feed in feeds]
    try:
        yield
    finally:
        for feed in feeds:
            metrics.listeners.remove(feed.put)
            feed.close()


class Feed:
    """Carries rows to one tracker on a thread, until the tracker fails."""

    def __init__(self, name: str, about: About, say: Callable[[str], None]) -> None:
        self.name, self.about, self.say = name, about, say
        self.is_alive = True
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        # A daemon: a tracker that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Hand over a row; never waits."""
        if self.is_alive:
            self._rows.put(row)

    def close(self) -> None:
        """Wait until all rows are sent, for at most CLOSE_S seconds."""
        self._rows.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._drop(f"not finished {CLOSE_S:.0f} s after the run")

    def _work(self) -> None:
        # The contract of a tracker: whatever its library raises, the run goes on.
        try:
            sink = OPENERS[self.name](self.about)
            while (row := self._rows.get()) is not None:
                sink.log(*numbers(row))
            sink.close()
        except (Exception, SystemExit) as error:
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        self.is_alive = False
        self.say(
            f"WARNING: tracker {self.name} failed and is dropped ({why}); "
            "the run goes on, and metrics.jsonl has every row"
        )


def numbers(row: Row) -> tuple[str, int, dict[str, float]]:
    """(stage, step, finite numbers) of a row; evaluations have the weights in their stage.

    Example: {"stage": "evaluate", "step": 20, "of": "int_rl@20", "accuracy": 0.5} is
    ("evaluate/int_rl", 20, {"accuracy": 0.5}).
    """
    stage = row["stage"]
    if "of" in row:
        stage = f"{stage}/{Weights.parse(row['of']).stage}"
    values = {
        name: float(value)
        for name, value in row.items()
        if name not in ("stage", "step") and isinstance(value, int | float) and math.isfinite(value)
    }
    return stage, row["step"], values


def _identity(folder: Path) -> str:
    """The identity of a run folder: drawn once and kept in it, so that a continued run has it."""
    path = folder / "tracker_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()
