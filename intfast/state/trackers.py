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
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from intfast import ranks
from intfast.config import Config
from intfast.labels import Weights
from intfast.state.files import write_atomic
from intfast.state.metrics import Metrics, Row
from intfast.state.runfolder import RunFolder

PROJECT = "intfast"
"""In wandb and trackio; the run has the name of its folder there."""
CLOSE_S = 60.0
"""Seconds that a tracker has at the end of a run to send what it still holds."""


class TensorBoard:
    """Scalars `stage/name` in tensorboard/ of the run folder."""

    def __init__(self, path: Path, config: Config, identity: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path / "tensorboard"))
        self.close = self.writer.close

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)
        self.writer.flush()


class Hosted:
    """A wandb or trackio run, which a continued run continues.

    Every row carries the step of its stage as a number; wandb takes it for the horizontal axis.
    """

    def __init__(self, package: str, path: Path, config: Config, identity: str) -> None:
        name = path.resolve().name
        own: dict[str, str] = {"name": f"{name}-{identity}"}
        if package == "wandb":
            own = {"name": name, "id": identity, "dir": str(path)}
        init = importlib.import_module(package).init
        settings = msgspec.to_builtins(config)
        self.run = init(project=PROJECT, resume="allow", config=settings, **own)
        self.close = self.run.finish
        self.axes: set[str] | None = set() if package == "wandb" else None

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        if self.axes is not None and stage not in self.axes:
            self.axes.add(stage)
            self.run.define_metric(f"{stage}/step", hidden=True)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/step": step} | {f"{stage}/{k}": v for k, v in values.items()})


OPENERS: dict[str, Callable[[Path, Config, str], TensorBoard | Hosted]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Hosted, "wandb"),
    "trackio": partial(Hosted, "trackio"),
}
"""Name -> what opens it for a run folder, its config, and a name that no other folder has."""


def require(names: Sequence[str]) -> None:
    """Raise ValueError, with the line that installs them, where packages of trackers are absent."""
    # A folder wandb/ of logs in the working directory looks like a package without a file.
    missing = [n for n in names if not getattr(importlib.util.find_spec(n), "origin", None)]
    if missing:
        raise ValueError(
            f"metrics.trackers needs {' and '.join(missing)}, which is not installed; "
            f"pip install {' '.join(missing)}, or take it out of metrics.trackers"
        )


@contextmanager
def attached(config: Config, folder: RunFolder, metrics: Metrics) -> Iterator[None]:
    """The rows of `metrics` also go to the trackers of the config while inside."""
    names = config.metrics.trackers if ranks.now().is_main else []
    # Drawn once and kept in the folder, so that a continued run has it.
    identity = folder.path / "tracker_id"
    if names and not identity.exists():
        with ranks.alone():
            write_atomic(identity, uuid.uuid4().hex[:12].encode())
    known = identity.read_bytes() if names else b"0" * 12
    if not re.fullmatch(rb"[0-9a-f]{12}", known):
        raise ValueError(f"{identity} is damaged; delete it: trackers then begin a new run")
    about = (folder.path, config, known.decode())
    feeds = [Feed(name, partial(OPENERS[name], *about), metrics.say) for name in names]
    metrics.listeners += [feed.put for feed in feeds]
    try:
        yield
    finally:
        for feed in feeds:
            metrics.listeners.remove(feed.put)
            feed.close()


class Feed:
    """Carries rows to one tracker on a thread, until the tracker fails."""

    def __init__(
        self, name: str, opened: Callable[[], TensorBoard | Hosted], say: Callable[[str], None]
    ) -> None:
        self.name, self.opened, self.say = name, opened, say
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
            sink = self.opened()
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
    stage, step = row["stage"], row["step"]
    if "of" in row:
        stage = f"{stage}/{Weights.parse(row['of']).stage}"
    found = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
    return stage, step, {name: value for name, value in found.items() if math.isfinite(value)}
