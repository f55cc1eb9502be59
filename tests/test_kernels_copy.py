"""The folder kernels/, copied under another name, runs every op without the rest of the house."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels_common import HAS_TRITON

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kernels").rglob("*.py"))
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "intfast":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
"""
RUN = """
import torch
import torch.nn.functional as F
from taken_home import truth
from taken_home.group_advantages import TokenLayout, group_advantages
from taken_home.linear_logprob import linear_logprob
from taken_home.linear_objective import linear_objective
from taken_home.objectives import PolicyClip, Streams
from taken_home.span_cross_entropy import span_cross_entropy
from taken_home.add_rms_norm import add_rms_norm
from taken_home.norm_rope import HeadNorms, norm_rope
from taken_home.swiglu import swiglu

torch.manual_seed(0)
hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
target, ones = torch.arange(9) * 4, torch.ones(9)
want = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
want_grads = torch.autograd.grad(want, (hidden, weight))
wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
exact_loss = F.cross_entropy(wide[0] @ wide[1].T, target, reduction="sum")
exact_grads = torch.autograd.grad(exact_loss, wide)
# As in bounds.py: four times what eager is off, and the roundings of a sum over 40 words.
ALLOWED = [
    4 * (eager - exact).abs().max() + 5 * 40**0.5 * 2.0**-24 * exact.abs().max()
    for eager, exact in zip(want_grads, exact_grads)
]
old = -F.cross_entropy(hidden @ weight.T, target, reduction="none").detach()
for path in PATHS:
    losses = (
        span_cross_entropy(hidden, weight, target, [(0, 9)], path=path),
        -linear_logprob(hidden, weight, target, path=path)[0].sum(),
        # a ratio of 1 and an advantage of 1: the gradient of maximum likelihood
        linear_objective(
            hidden, weight, target, PolicyClip(), Streams(ones, ones, old), path=path
        ).loss,
    )
    torch.testing.assert_close(losses[0], want)
    torch.testing.assert_close(losses[1], want)
    for loss in losses:
        got = torch.autograd.grad(loss, (hidden, weight))
        for value, exact, allowed in zip(got, exact_grads, ALLOWED):
            assert (value - exact).abs().max() <= allowed, (value - exact).abs().max() / allowed
rewards, offsets = torch.tensor([1.0, 0, 0, 1, 1]), torch.tensor([0, 3, 5])
layout = TokenLayout(torch.tensor([0, 2, 4, 5, 9, 9]), torch.ones(9))
exact = truth.group_advantages(rewards.double(), offsets).float()
for path in GROUP_PATHS:
    got = group_advantages(rewards, offsets, layout, path=path)
    torch.testing.assert_close(got.advantage_N, exact)
    torch.testing.assert_close(got.advantage_T, exact[[0, 0, 1, 1, 2, 3, 3, 3, 3]])
angle = torch.linspace(0, 3, 12).view(3, 1, 4)
cos, sin = (x.repeat(1, 1, 2) for x in (angle.cos(), angle.sin()))
qkv, wide = torch.randn(3, 6, 8), torch.randn(3, 8)
for path in GROUP_PATHS:
    for op, *arguments in (
        ("add_rms_norm", hidden[:3].detach(), wide, weight[0].detach(), 1e-6),
        ("norm_rope", qkv, 2, cos, sin, HeadNorms(wide[0], wide[1], 1e-6)),
        ("swiglu", wide),
    ):
        found, wanted = (f(*arguments, **k) for f, k in (
            (globals()[op], {"path": path}), (getattr(truth, op), {})
        ))
        for x, y in zip(found, wanted):
            torch.testing.assert_close(x, y)
assert not any(name.partition(".")[0] == "intfast" for name in sys.modules)
print("ran")
"""
BOTH = """
import torch
import intfast.kernels.group_advantages as ours, taken_home.group_advantages as theirs
import intfast.kernels.linear_logprob as our_head, taken_home.linear_logprob as their_head

rewards, offsets = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 3])
pair = [op.group_advantages(rewards, offsets).advantage_N for op in (ours, theirs)]
assert torch.equal(*pair) and ours._group_advantages is not theirs._group_advantages
hidden, weight, target = torch.randn(3, 8), torch.randn(9, 8), torch.arange(3)
assert torch.equal(*(op.linear_logprob(hidden, weight, target)[0] for op in (our_head, their_head)))
assert hasattr(torch.ops.intfast_kernels, "head_chunk")
assert hasattr(torch.ops.taken_home, "head_chunk")
print("both")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", folder / "taken_home", ignore=ignored)
    return folder


def python(code, folder, *more):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, *more)))}
    # The interpreter does without a device, also where there is one.
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_op_runs_from_a_copy_without_intfast(folder):
    paths = ["plain", *(["odds", "rows"] if HAS_TRITON else [])]
    group_paths = ["plain", *(["triton"] if HAS_TRITON else [])]
    code = f"{HIDE}\nPATHS, GROUP_PATHS = {paths}, {group_paths}\n{RUN}"
    assert python(code, folder) == "ran"


def test_the_plain_path_needs_no_triton(folder):
    code = f"{HIDE}\nsys.modules['triton'] = None\nPATHS = GROUP_PATHS = ['plain']\n{RUN}"
    assert python(code, folder) == "ran"
    calls = {
        "rows": "linear_logprob(hidden, weight, target, path='rows')",
        "triton": "group_advantages(rewards, offsets, path='triton')",
        "triton'": "swiglu(wide, path='triton')",
    }
    for path, call in calls.items():
        path = path.rstrip("'")
        refused = f"try:\n    {call}\nexcept RuntimeError as error:\n    print(error)"
        assert f"path='{path}': needs the package triton" in python(f"{code}\n{refused}", folder)


def test_both_copies_load_in_one_process(folder):
    assert python(BOTH, folder, ROOT) == "both"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_kernels_import_only_torch_triton_and_themselves(path):
    known = {"torch", "triton", *sys.stdlib_module_names}
    # Each function of the adapters imports the trainer that it serves.
    body = ast.parse(path.read_text()).body if path.stem == "adapters" else None
    for node in body or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= known
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in known
