"""Steps as processes with a limit: none stops the next, and a summary is written after each.

Only Python's own library: a session starts before anything is unpacked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 15
"""With less left a step is not begun."""
KEPT_LINES = re.compile(
    r"CHECK|FIGURE|GROUP|  gate:|.*( hot | cold |times as fast|tokens per second| passed| failed)"
    r"|.*(loss head on|engine native|engine vllm)"
)
"""The lines of a step's output that the summary repeats."""
MOST_LINES = 60


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    limit: float
    """Seconds after which it is killed, with all that it started."""
    command: list[str]
    paths: tuple[Path, ...] = ()
    """Folders to import from, behind all others."""


@dataclass
class Running:
    """A step that was started."""

    step: Step
    process: subprocess.Popen
    log: Path
    begin: float
    deadline: float


class Session:
    """Starts steps while there is time, and keeps what they said.

    out/   comes back, small: summary.txt (read it first), log.txt, rows of figures, runs.tar.gz
    work/  stays: unpacked wheels, runs, Triton's cache
    """

    def __init__(self, title: str, budget: float, out: Path, work: Path) -> None:
        """budget: seconds for everything."""
        self.title, self.begin, self.budget = title, time.monotonic(), budget
        self.out, self.work = out.resolve(), work.resolve()
        self.site, self.vllm = self.work / "site", self.work / "vllm"
        self.environment: dict[str, str] = {}
        """More variables, of every step from now on."""
        self.notes: list[str] = []
        self.results: list[tuple[str, str, list[str]]] = []
        """(name, status, lines for the summary) of each step; the status is "ok" or why not."""
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - self.seconds

    @property
    def num_failed(self) -> int:
        """Steps that did not end well."""
        return sum(status != "ok" for _, status, _ in self.results)

    def note(self, text: str) -> None:
        """Say something, now and in the summary."""
        self.notes.append(f"{self.seconds:6.1f} s  {text}")
        print(self.notes[-1], flush=True)
        self._write_summary()

    def unpack(self, wheels: list[Path]) -> None:
        """Wheels into a folder that every step imports from; a wheel is an archive of it."""
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(self.site)
            except (OSError, zipfile.BadZipFile) as error:
                self.note(f"NOT UNPACKED: {wheel.name}: {error}")

    def run(self, *steps: Step) -> bool:
        """Run steps side by side, each to its end or limit; whether all of them went well."""
        started = []
        for step in steps:
            if self.left < LEAST_SECONDS:
                self.note(f"no time for {step.name}")
            else:
                started.append(self._start(step))
        ended = [self._finish(running) for running in started]
        return all(ended) and len(ended) == len(steps)

    def _start(self, step: Step) -> Running:
        log = self.work / f"{re.sub(r'[^a-z0-9]+', '_', step.name.lower())}.log"
        limit = min(step.limit, self.left - 4)
        print(f"{self.seconds:6.1f} s  .. {step.name} (at most {limit:.0f} s)", flush=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=self._common(step) | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        now = time.monotonic()
        return Running(step, process, log, now, now + limit)

    def _common(self, step: Step) -> dict[str, str]:
        paths = [str(ROOT), str(self.site), *map(str, step.paths), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            # vLLM in this process, on a machine without a network.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _finish(self, running: Running) -> bool:
        step, process = running.step, running.process
        try:
            code = process.wait(max(0.1, running.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            # SIGABRT first: the fault handler then says where it stood.
            _kill(process.pid, signal.SIGABRT)
            time.sleep(1.0)
        # Whatever the step left behind goes too.
        _kill(process.pid, signal.SIGKILL)
        process.wait()
        # Steps side by side end before they are waited for.
        ended = running.log.stat().st_mtime - time.time() + time.monotonic()
        took = max(0.0, (ended if code is not None else time.monotonic()) - running.begin)
        status = {0: "ok", None: "TIME LIMIT"}.get(code, f"exit {code}")
        lines = running.log.read_text(errors="replace").splitlines()
        kept = [line[:400] for line in lines if KEPT_LINES.match(line)][:MOST_LINES]
        kept += [] if status == "ok" else [f"| {line[:300]}" for line in lines[-14:]]
        self.results.append((step.name, status, kept))
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n===== {step.name}: {status}, {took:.1f} s: {step.command}\n")
            log.write("\n".join(_shortened(lines)) + "\n")
        self.note(f"{status:10} {step.name}, {took:.1f} s")
        return code == 0

    def _write_summary(self) -> None:
        lines = [self.title, *self.notes]
        for name, status, kept in self.results:
            lines += ["", f"== {name}: {status}", *(f"   {line}" for line in kept)]
        (self.out / "summary.txt").write_text("\n".join(lines) + "\n")

    def end(self) -> None:
        """Pack what the runs recorded, without their weights, and print the summary's end."""
        with tarfile.open(self.out / "runs.tar.gz", "w:gz") as archive:
            for path in sorted((self.work / "runs").rglob("*.json*")):
                if "checkpoints" not in path.parts and path.stat().st_size < 4 << 20:
                    archive.add(path, str(path.relative_to(self.work)))
        self.note(f"end, {self.num_failed} of {len(self.results)} steps failed")
        print("\n" + (self.out / "summary.txt").read_text()[-9000:])


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def said(command: list[str], seconds: float = 30) -> str:
    """The output of a command, or why there is none."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]}: no answer in {seconds} s"
    return (done.stdout or done.stderr).strip()


def _kill(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _shortened(lines: list[str], most: int = 4000) -> list[str]:
    half = most // 2
    return lines if len(lines) <= most else [*lines[:half], "[...]", *lines[-half:]]
