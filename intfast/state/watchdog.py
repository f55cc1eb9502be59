"""The watchdog: a run without a sign of life for too long says where it is stuck, and ends.

Time in which the process could not run (Ctrl-Z, a paused container, a sleeping laptop) is no lack
of progress: only the watchdog's own ticks count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from intfast import ranks
from intfast.state import guard, interrupt

EXIT_STUCK = 124
"""Exit code; 134 (SIGABRT) where the watchdog's thread could not run and the guard ended it."""
TICK_S = 10.0


class Watchdog:
    """Watches `interrupt.last_sign` while inside; `limit_s` = 0 switches it off.

    `path` says when the last sign came; it keeps the phase and the stacks of a run that was stuck.
    """

    def __init__(self, limit_s: float, path: Path) -> None:
        # Every rank watches itself.
        number = ranks.now().rank or ""
        self.limit_s, self.path = limit_s, path.with_stem(f"{path.stem}{number}")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.limit_s:
            interrupt.beat()
            self._file = self.path.open("w")
            self._tick_s = min(TICK_S, self.limit_s / 4)
            words = [os.getpid(), self.limit_s + 2 * self._tick_s, self._tick_s]
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
            )
            # What the guard's signal makes of this process: its stacks on stderr, and its end.
            self._enabled = faulthandler.is_enabled()
            if not self._enabled:
                faulthandler.enable(2)
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.limit_s:
            self._done.set()
            self._thread.join()
            self._guard.communicate()
            if not self._enabled:
                faulthandler.disable()
            self._file.close()
            self.path.unlink(missing_ok=True)

    def _watch(self) -> None:
        counted_s, before = 0.0, time.monotonic()
        while True:
            phase, silent_s = interrupt.last_sign()
            before, slept_s = time.monotonic(), time.monotonic() - before
            counted_s += guard.running_s(slept_s, self._tick_s)
            silent_s = counted_s = min(silent_s, counted_s)
            text = f"no progress for {silent_s:.0f} s in phase {phase!r}"
            if silent_s > self.limit_s:
                text = (
                    f"{ranks.now().name}error: {text} (watchdog_s = {self.limit_s:g}); the stacks "
                    f"are in {self.path}. The same command continues this run; raise watchdog_s "
                    "when the phase is slow, not stuck\n"
                )
                try:
                    self._write(text)
                    faulthandler.dump_traceback(self._file)
                    os.write(2, text.encode())
                    faulthandler.dump_traceback(2)
                finally:  # nothing is cleaned up: any of it may be stuck
                    os._exit(EXIT_STUCK)
            self._write(text + "\n")
            # A guard that somebody killed is missed by nobody but code that never yields.
            with contextlib.suppress(OSError):
                self._guard.stdin.write(b".")
            if self._done.wait(self._tick_s):
                return

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()
