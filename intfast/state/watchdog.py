"""The watchdog: a run without a sign of life for too long says where it is stuck, and ends."""

from __future__ import annotations

import faulthandler
import os
import threading
from pathlib import Path

from intfast import ranks
from intfast.state import interrupt

EXIT_STUCK = 124
"""Exit code; 1 where not even the watchdog's thread could run and its timer in C ended it all."""
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
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.limit_s:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self.path.unlink(missing_ok=True)

    def _watch(self) -> None:
        tick_s = min(TICK_S, self.limit_s / 4)
        while True:
            phase, silent_s = interrupt.last_sign()
            text = f"no progress for {silent_s:.0f} s in phase {phase!r}"
            if silent_s > self.limit_s:
                text = (
                    f"{ranks.now().name}error: {text} (watchdog_s = {self.limit_s:g}); the stacks "
                    f"are in {self.path}. The same command continues this run; raise watchdog_s "
                    "when the phase is slow, not stuck\n"
                )
                try:
                    faulthandler.cancel_dump_traceback_later()
                    self._write(text)
                    faulthandler.dump_traceback(self._file)
                    os.write(2, text.encode())
                    faulthandler.dump_traceback(2)
                finally:  # nothing is cleaned up: any of it may be stuck
                    os._exit(EXIT_STUCK)
            self._write(text + "\n")
            # For C code that never gives this thread a turn: a timer that needs none, re-armed as
            # long as there is one. It can only exit with 1.
            faulthandler.dump_traceback_later(self.limit_s + 2 * tick_s, exit=True, file=2)
            if self._done.wait(tick_s):
                return

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()
