"""What every command of this package does around its work: stops, errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from intfast.safe_text import shown
from intfast.state import interrupt, oom


def exit_code(work: Callable[[], object], continues: str) -> int:
    """Do the work with stop requests handled; returns the exit code that train.USAGE lists.

    continues: what to tell about going on, behind "stopped by SIGTERM; "
    """
    try:
        with interrupt.handling(), oom.explained("load"):
            work()
    except ValueError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 1
    except interrupt.Stopped as stopped:
        print(shown(f"{stopped}; {continues}"), file=sys.stderr)
        return stopped.exit_code
    return 0
