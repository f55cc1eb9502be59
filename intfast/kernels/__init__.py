"""Triton ops. In a checkout the files live in the top-level folder kernels/."""

from pathlib import Path

_ROOT = Path(__file__).parents[2]
if (_ROOT / "pyproject.toml").is_file():
    __path__.append(str(_ROOT / "kernels"))
