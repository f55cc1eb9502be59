"""Bring home what minutes on a machine with one GPU and no network can tell.

python -m benchmarks.gpu first [budget=565] [device=cpu] [steps=a,b] [out=DIR] [work=DIR]
python -m benchmarks.gpu second [budget=170] ...   what `first` has no time for, while it is warm
python -m benchmarks.gpu stage DEST [pack=PATH] [python=3.12]   make the folder that travels

first    value first: versions, the loss head (on the first rung of the ladder that is right), tests
         and whole runs side by side, then figures, one at a time
second   vLLM with sleep, a step without checkpointing, more kernels, the whole quickstart, memcheck
budget   seconds for everything; a step that would not fit is left out
device   cpu: every step small, so that the session itself can be tried
steps    only these, by name
out      what comes back: summary.txt, log.txt, rows of figures, runs.tar.gz ($OUT, else gpu-out)
stage    from a checkout: the project, wheels that a bare machine lacks, a packed vLLM if given.
         There: cd DEST && python3 -m benchmarks.gpu first

The exit status is the number of steps that failed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import stage, steps
from benchmarks.gpu.session import Session

BUDGETS = {"first": 565, "second": 170}


def main(arguments: list[str]) -> int:
    """The command line."""
    command, *rest = arguments or ["--help"]
    words = dict(word.split("=", 1) for word in rest if "=" in word)
    if command == "stage":
        (folder,) = (word for word in rest if "=" not in word)
        return stage.stage(Path(folder), **words)
    if command not in BUDGETS:
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    device = words.pop("device", "cuda")
    budget = float(words.pop("budget", BUDGETS[command]))
    out = Path(words.pop("out", os.environ.get("OUT", "gpu-out")))
    work = Path(words.pop("work", f"{tempfile.gettempdir()}/intfast-gpu-{os.getuid()}-{device}"))
    names = [name for name in words.pop("steps", "").split(",") if name]
    if words:
        raise SystemExit(f"expected the words of --help, got {', '.join(words)}")
    title = f"{command}, device {device}, budget {budget:.0f} s"
    session = Session(title, budget, out, work)
    steps.run(session, command, device, names)
    session.end()
    return session.num_failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
