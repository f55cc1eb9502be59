"""The folder that travels: the project's HEAD, wheels that a bare machine lacks, a packed vLLM."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu.session import ROOT

# What torch, Triton, transformers and pytest do not bring, and the trainer imports; then the peers.
WHEELS = (
    "msgspec>=0.19", "math-verify==0.9.0", "latex2sympy2_extended==1.11.0",
    "antlr4-python3-runtime==4.13.2", "liger-kernel>=0.8.5", "cut-cross-entropy>=25.1",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
LIMIT = 64 * 2**20
"""Bytes that a machine takes, in all."""


def stage(destination: Path, pack: str = "", python: str = "3.12") -> int:
    """Fill a new folder; 0, or 1 when it is too large to travel.

    pack    a folder or an archive with an install.sh that takes a folder, for vLLM
    python  the version there
    raises  SystemExit when the folder is in use or the checkout has no history
    """
    if destination.exists() and any(destination.iterdir()):
        raise SystemExit(f"{destination}: expected a new or empty folder")
    destination.mkdir(parents=True, exist_ok=True)
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        _output("git", "-C", str(ROOT), "archive", "-o", archive.name, "HEAD")
        with tarfile.open(archive.name) as opened:
            opened.extractall(destination, filter="data")
    # Rows and figures of earlier days have no part in a run.
    shutil.rmtree(destination / "benchmarks" / "results")
    (destination / "benchmarks" / "commit.txt").write_text(commit + "\n")  # harness.STAGED
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    _output(
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
        "--python-version", python, "--implementation", "cp", *platforms,
        "-d", str(destination / "wheels"), *WHEELS,
    )  # fmt: skip
    if pack:
        _copy_pack(Path(pack), destination / "vllm")
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    print(f"{destination}: commit {commit}, {size / 2**20:.1f} MiB")
    print(f"there: cd {destination.name} && python3 -m benchmarks.gpu first")
    if size > LIMIT:
        print(f"TOO LARGE: at most {LIMIT / 2**20:.0f} MiB travel", file=sys.stderr)
        return 1
    return 0


def _copy_pack(pack: Path, target: Path) -> None:
    if pack.is_dir():
        shutil.copytree(pack, target)
    else:
        shutil.unpack_archive(pack, target, filter="data")
    # An archive may hold the folder instead of what is in it.
    if not (target / "install.sh").exists():
        found = list(target.glob("*/install.sh"))
        if len(found) != 1:
            raise SystemExit(f"pack={pack}: expected a folder with install.sh, found none")
        for path in found[0].parent.iterdir():
            path.rename(target / path.name)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-400:]}")
    return done.stdout.strip()
