"""Looking at runs: python -m intfast.study report|compare|ablate|regrade ..."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from intfast.state.command import say

COMMANDS = {
    "report": "run folders -> one HTML page",
    "compare": "several arms from one config, in one table",
    "ablate": "the SFT stage's ablations on a finished run",
    "regrade": "stored rows, graded again",
}


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code of the command."""
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(f"intfast.study.{arguments[0]}").main(arguments[1:])
    rows = "".join(f"\n  {name:8} {what}" for name, what in COMMANDS.items())
    usage = f"usage: python -m intfast.study COMMAND ...\n{rows}\n\nCOMMAND --help explains one."
    return say(usage, 0 if {"--help", "-h"} & set(arguments) else 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
