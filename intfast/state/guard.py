"""The process that watches the watchdog, for code that holds the interpreter against its thread.

python guard.py PARENT LIMIT_S TICK_S, with a pipe as standard input on which the watchdog writes at
every tick; it imports nothing of the package. A timer inside the process could not tell time in
which it was stopped from time in which it was stuck.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path


def main(parent: int, limit_s: float, tick_s: float) -> None:
    """Ends the parent with SIGABRT, whose handler prints the stacks, or itself with the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    silent_s, before = 0.0, time.monotonic()
    while os.getppid() == parent:
        ready, _, _ = select.select([0], [], [], tick_s)
        before, slept_s = time.monotonic(), time.monotonic() - before
        if ready and not os.read(0, 4096):
            return
        silent_s = 0.0 if ready else silent_s + running_s(slept_s, tick_s) * (not stopped(parent))
        if silent_s > limit_s:
            text = f"error: no thread could run for {silent_s:.0f} s; the same command continues\n"
            os.write(2, text.encode())
            os.kill(parent, signal.SIGABRT)
            return


def running_s(slept_s: float, tick_s: float) -> float:
    """How much of a wait for one tick counts: who overslept was stopped, or its machine was."""
    return slept_s if slept_s < 2 * tick_s else tick_s


def stopped(process: int) -> bool:
    """Whether a process is stopped by a signal or a debugger; False where nobody can tell."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # no /proc here
        return False
    return state in "Tt"


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
