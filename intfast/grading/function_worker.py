"""The child process of function.py: one scoring function, called with texts that nobody has read.

Run as a script, never imported. A JSON line of [row, text] pairs comes in; a JSON list of outcomes
goes out for every call. The function is loaded before the limits hold; from then on it may read
files and compute. A text is not run: `eval` and `exec` end the process where they name anything.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import traceback
from numbers import Real
from pathlib import Path

from intfast import adapters
from intfast.grading.answers import extract
from intfast.grading.reasons import Reason
from intfast.grading.worker import forbid_side_effects, limit_cpu, set_limits

MAX_WORDS = 3000
"""Characters of a traceback that are passed on: its end."""
NUMBERS = {"Integer", "Float", "Rational", "Symbol", "sympy"}
"""Names that evaluated arithmetic may use: sympy's atoms, and what its parser begins with."""
# They evaluate texts of their own, when a module is imported.
_DEFINES = (collections.__file__, dataclasses.__file__)


def outcome(value: object) -> object:
    """A number, None, or [reason, words]."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch"):
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, Real):
        words = f"expected a number, True, False or None, got {type(value).__name__}"
        return [Reason.WRONG_TYPE, words]
    value = float(value)
    return value if math.isfinite(value) else [Reason.NOT_FINITE, f"it returned {value}"]


def called(function, is_batch: bool, jobs: list) -> list:
    """The outcomes of one call; of a batch that fails, those of its texts one by one."""
    problems, texts = zip(*jobs, strict=True)
    try:
        if not is_batch:
            return [outcome(function(problems[0], texts[0]))]
        values = function(list(problems), list(texts))
        if isinstance(values, (list, tuple)) and len(values) == len(jobs):
            return [outcome(value) for value in values]
        what = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values)
        found = [Reason.WRONG_TYPE, f"expected a list of {len(jobs)} numbers, got {what}"]
    except MemoryError:
        os._exit(1)
    # SystemExit and KeyboardInterrupt too: the process is not the function's.
    except BaseException:
        found = [Reason.RAISED, traceback.format_exc(limit=-20)[-MAX_WORDS:]]
    if len(jobs) == 1:
        return [found]
    return [called(function, is_batch, [job])[0] for job in jobs]


def runs_text(event: str, args: tuple) -> bool:
    """Whether a text is run as a program; arithmetic with numbers alone is none."""
    if event != "exec" or args[0].co_filename != "<string>":
        return False
    if sys._getframe(2).f_code.co_filename in _DEFINES:
        return False
    code = args[0]
    return bool(set(code.co_names) - NUMBERS) or any(hasattr(c, "co_code") for c in code.co_consts)


def sources() -> dict[str, str]:
    """Name -> digest of the modules from the folder that the command was started in, and the
    versions of the libraries that adapters serve."""
    home = Path.cwd()
    found = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        own = file.is_relative_to(home) and "site-packages" not in file.parts
        if own and name.partition(".")[0] not in ("intfast", "__main__"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
    for package in (adapters.GYM, adapters.VERIFIERS, adapters.TRL):
        if package.replace("-", "_") in sys.modules:
            from importlib import metadata

            found[package] = metadata.version(package)
    return found


def main() -> None:
    """Arguments: CPU seconds for one call, bytes of memory beside what the import took, the name of
    the function, grade.mode."""
    cpu_s, memory_bytes = map(int, sys.argv[1:3])
    name, mode = sys.argv[3:]
    verdicts, jobs = os.fdopen(os.dup(1), "wb", 0), os.fdopen(os.dup(0), "rb")
    null_fd = os.open(os.devnull, os.O_RDWR)
    # What the function prints, or would read, is not ours.
    for fd in (0, 1):
        os.dup2(null_fd, fd)

    def say(value: object) -> None:
        verdicts.write(json.dumps(value).encode() + b"\n")

    try:
        function, is_batch = adapters.scorer(name, lambda text: extract(text, mode))
    except BaseException as error:
        at = traceback.format_exc()[-MAX_WORDS:]
        words = str(error) if isinstance(error, (ValueError, RuntimeError)) else at
        say({"error": words, "folder": os.getcwd()})
        return
    os.dup2(null_fd, 2)
    sys.dont_write_bytecode = True
    found = sources()
    with open("/proc/self/statm") if sys.platform == "linux" else open(os.devnull) as statm:
        resident = int((statm.read().split() or "00")[1]) * os.sysconf("SC_PAGESIZE")
    set_limits(memory_bytes + resident)
    forbid_side_effects(runs_text, say)
    say({"is_batch": is_batch, "sources": found})
    for line in jobs:
        given = json.loads(line)
        for call in [given] if is_batch else [[job] for job in given]:
            limit_cpu(cpu_s)
            say(called(function, is_batch, call))


if __name__ == "__main__":
    logging.raiseExceptions = False
    main()
