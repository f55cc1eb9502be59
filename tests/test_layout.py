"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted([*(ROOT / "intfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
FLOORS = [
    "labels records safe_text settings sources",
    "config",
    "cli evaluate verdict waves",
    "kernels prompts state",
    "grading model",
    "data engine leak",
    "batch credit sample",
    "intervene limits loss",
    "forward run",
    "course faults parity plan update",
    "collect sft",
    "methods",
    "learn rl",
    "pipeline",
    "study",
    "train compare report adapters",
]
"""From the ground up: a file or package of intfast/ imports from lower floors, or its own."""
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FLOOR = {name: rank for rank, names in enumerate(FLOORS) for name in names.split()}


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


def imported(path: Path) -> set[str]:
    """The dotted names below `intfast` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module.split(".")
            if module[0] == "intfast":
                found |= {".".join([*module[1:], alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name[8:] for a in node.names if a.name.startswith("intfast.")}
    return found - {"__version__"}


def test_imports_point_down_the_house():
    wrong = []
    for path in (ROOT / "intfast").rglob("*.py"):
        own = path.relative_to(ROOT / "intfast").with_suffix("").parts[0]
        for name in imported(path) if own != "__init__" else ():
            other = name.partition(".")[0]
            if other != own and FLOOR[other] >= FLOOR[own]:
                wrong.append((str(path.relative_to(ROOT)), name))
    assert wrong == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = python(
        "import intfast, intfast.cli, intfast.train, sys;"
        "heavy = ('torch', 'vllm', 'triton', 'transformers', 'numpy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert heavy == "[]"


def test_the_trainer_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import intfast.learn, intfast.engine.native"
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


@pytest.mark.parametrize("page", READMES, ids=lambda p: p.parent.name)
def test_links_and_files_that_a_readme_names_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in HEADING.findall(text)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    files = re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|sh|txt|toml|jsonl|md))`", text)
    homes = (ROOT, ROOT / "intfast", page.parent)
    missing = [f for f in files if not any((h / f).exists() for h in homes)]
    assert [f for f in missing if not f.startswith("runs/")] == []
