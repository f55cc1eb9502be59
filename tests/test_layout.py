"""The rules of the house that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted([*(ROOT / "intfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
LAYERS = [
    ["records", "settings", "arms", "answers", "safe_text", "kernels", "files", "interrupt", "oom"],
    ["problem_settings", "metrics_settings", "engine_settings"],
    [
        "config",
        "rollout",
        "evaluate",
        "sources",
        "grade_worker",
        "verdict",
        "tensorfile",
        "watchdog",
    ],
    [
        "config_io",
        "data",
        "grade",
        "leak",
        "prompts",
        "credit",
        "batch",
        "model",
        "model_folder",
        "optim",
        "waves",
    ],
    ["runfolder", "solve", "grade_watch", "regrade", "weights", "sharing", "loss", "adapters"],
    [
        "checkpoint",
        "metrics",
        "intervene",
        "process_credit",
        "engines",
        "forward",
        "limits",
        "identity",
        "memory",
    ],
    ["trackers"],
    ["parts"],
    ["parity", "faults"],
    ["stages", "plan", "course", "token_logprobs"],
    ["guided", "summary"],
    ["learn", "sft_data"],
    ["analysis", "report_data"],
    ["report_browser"],
    ["report"],
    ["train", "compare_table"],
    ["ablate", "compare"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 120 if any("jit" in ast.unparse(d) for d in node.decorator_list) else 60
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines"


def test_imports_point_down_the_house():
    upward = []
    for path in (ROOT / "intfast").glob("*.py"):
        if path.stem == "__init__":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module == "intfast":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("intfast."):
                names = [node.module.split(".")[1]]
            else:
                continue
            upward += [(path.stem, n) for n in names if RANK.get(n, -1) > RANK[path.stem]]
    assert upward == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = python(
        "import intfast, intfast.config_io, intfast.train, sys;"
        "heavy = ('torch', 'vllm', 'triton', 'transformers', 'numpy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert heavy == "[]"


def test_the_trainer_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import intfast.learn, intfast.engines.native"
    assert python(code) == ""


def test_the_kernels_folder_hides_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    where = python(
        "import intfast.train, sys; m = sys.modules.get('kernels');"
        "print(m is None or 'site-packages' in str(m.__file__))"
    )
    assert where == "True"


def test_no_pickle_and_no_remote_code():
    for path in CODE:
        text = path.read_text()
        assert "import pickle" not in text and "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
