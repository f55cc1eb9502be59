"""Intervention Training and outcome-reward RL. Importing this loads neither torch nor vLLM."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:
    # Python is about to run a module of ours: no traceback for a Ctrl-C during its imports.
    from intfast.state import interrupt

    interrupt.take_over(is_early=True)
