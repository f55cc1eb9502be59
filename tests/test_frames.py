"""How deep the work lies: the trainer's own frames between the command and its products."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRACED = r"""
import runpy, sys
import torch
import torch.nn.functional as F
from intfast.kernels.head import plain

ROOT, run = sys.argv[1:]
found = {}

def own_frames():
    frame, names = sys._getframe(2), []
    while frame:
        path = frame.f_code.co_filename
        if path.startswith((ROOT + "/intfast", ROOT + "/kernels")):
            names.append(f"{path[len(ROOT) + 1:]}:{frame.f_code.co_name}")
        frame = frame.f_back
    return names[::-1]

def watched(function, name):
    def call(*arguments, **options):
        if torch.is_grad_enabled() or name == "head":
            frames = own_frames()
            if any(frame.startswith("intfast/update.py:update") for frame in frames):
                found.setdefault(name, frames)
        return function(*arguments, **options)
    return call

F.linear = watched(F.linear, "matrix product")
plain.chunk = watched(plain.chunk, "head")
sys.argv = ["intfast.train", f"{ROOT}/configs/quickstart_short.toml", f"run={run}"]
paths = {"data.train": "train.jsonl", "data.test": "test.jsonl", "model.path": "base"}
sys.argv += [f"{key}={ROOT}/configs/quickstart/{name}" for key, name in paths.items()]
sys.argv += ["rl.steps=0", "rl.from_base=false", "attempts.samples=2", "intervene.continuations=2"]
sys.argv += ["evaluate.samples=1", "evaluate.ks=[1]", "intervene.baselines=false"]
try:
    runpy.run_module("intfast.train", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
for name, frames in found.items():
    print(f"FRAMES {name}: {len(frames)}: {' > '.join(frames)}")
"""


def test_few_frames_lie_between_the_command_and_the_products(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRACED, str(ROOT), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FRAMES")]
    depth = {line.split(": ")[0][7:]: int(line.split(": ")[1]) for line in lines}
    # The head's own frame is not among those that led to it.
    depth["head"] += 1
    assert depth["matrix product"] <= 8 and depth["head"] <= 11, "\n".join(lines)
