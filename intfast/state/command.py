"""What every command of this package does around its work: stops, errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from intfast.safe_text import shown
from intfast.state import interrupt, oom


class Outcome:
    """How the work of a command ended."""

    code = 0
    """The exit code, as `python -m intfast.train --help` lists them."""


@contextmanager
def outcome(continues: str) -> Iterator[Outcome]:
    """Handle requests to stop while inside, and turn what is raised into a message and a code.

    continues: what to tell about going on, behind "stopped by SIGTERM; "
    """
    ended = Outcome()
    try:
        with interrupt.handling(), oom.explained("load"):
            yield ended
    except ValueError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        ended.code = 2
    except RuntimeError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        ended.code = 1
    except interrupt.Stopped as stopped:
        print(shown(f"{stopped}; {continues}"), file=sys.stderr)
        ended.code = stopped.exit_code
