"""What decides the last bits of sums on a CPU. Needs only torch."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

CODE_PATHS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that choose other code."""


def processor() -> dict[str, str]:
    """Its name, torch's vector code, the matrix library, and the variables that are set."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    library = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "model": named.group(1) if named else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_library": f"MKL {library.group(1)}" if library else blas[1] if blas else "unknown",
        **{name: os.environ[name] for name in CODE_PATHS if name in os.environ},
    }
