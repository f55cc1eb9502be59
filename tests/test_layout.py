"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted([*(ROOT / "intfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
LAYERS = [
    "records settings evidence.arms grading.answers grading.worker method.verdict trust.safe_text",
    "kernels trust.files trust.interrupt trust.processor fixed",
    "trust.oom trust.command trust.tensorfile trust.watchdog trust.model_folder",
    "config rollout evaluate sources architecture",
    "config_io data grade method.leak method.waves prompts credit batch model optim",
    "runfolder solve grading.watch grading.regrade weights loss adapters",
    "checkpoint metrics intervene method.process_credit engines forward",
    "memory engines.start trust.limits trust.identity",
    "trackers",
    "parts",
    "trust.parity trust.faults",
    "stages plan course evidence.token_logprobs",
    "method.guided summary",
    "learn method.sft_data",
    "evidence.analysis evidence.page_data evidence.compare_table",
    "evidence.browser evidence.compare_page evidence.repeats",
    "report",
    "train",
    "ablate compare quickstart",
]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


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


def room(module: str) -> str:
    """The entry of LAYERS that a dotted name below `intfast` belongs to: a file or a package."""
    first, _, rest = module.partition(".")
    inner = f"{first}.{rest.partition('.')[0]}"
    return inner if inner in RANK else first


def test_imports_point_down_the_house():
    upward = []
    for path in (ROOT / "intfast").rglob("*.py"):
        own = room(".".join(path.relative_to(ROOT / "intfast").with_suffix("").parts))
        if path.stem == "__init__":
            continue
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("intfast"):
                continue
            inside = node.module.removeprefix("intfast").removeprefix(".")
            names = [".".join(filter(None, (inside, alias.name))) for alias in node.names]
            upward += [(own, name) for name in names if RANK[room(name)] > RANK[own]]
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
