"""The device of a run and the kernels of its layers: chosen, or refused, before any work."""

from __future__ import annotations

import re
from importlib import metadata, util
from typing import NamedTuple

import torch
from torch.nn.attention import activate_flash_attention_impl

from intfast import ranks
from intfast.config import Config

LEAST_CAPABILITY = (8, 0)
"""bfloat16 matrix products and the packed attention begin with Ampere."""
LIGER_VERSIONS = ((0, 8, 5), (0, 9))
"""From the first, below the second: what the calls in model/ were written against."""


class Kernels(NamedTuple):
    """What `model.kernels` came to, and why."""

    name: str
    reason: str


def pick_device(config: Config) -> torch.device:
    """The device of the model. Raises RuntimeError where CUDA is wanted and cannot be used.

    "auto" passes a machine without CUDA over, but not one whose driver or card is too old: to train
    on its CPU in silence is not what was meant.
    """
    wanted = config.model.device
    if wanted == "cpu":
        return torch.device("cpu")
    fault, is_there = _cuda_fault()
    if fault and (wanted == "cuda" or is_there):
        raise RuntimeError(f'model.device = "{wanted}": {fault}, or use model.device=cpu')
    here = ranks.launched()
    if fault or here.world == 1:
        return torch.device("cpu" if fault else "cuda")
    if here.neighbours > (num := torch.cuda.device_count()):
        raise RuntimeError(
            f"{here.neighbours} ranks on this machine, but {num} GPUs are visible (CUDA_VISIBLE_"
            f"DEVICES?); show as many, or start with --nproc-per-node {num}"
        )
    return torch.device("cuda", here.local)


def _cuda_fault() -> tuple[str, bool]:
    """(Why CUDA cannot be used and what to change, or ""; whether a card is there all the same)."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= LEAST_CAPABILITY:
            return "", True
        found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {found}, the least is {least}; take another", True
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it", False
    try:
        torch.cuda.init()
        said = "No CUDA GPUs"
    except (RuntimeError, AssertionError) as error:
        said = str(error)
    if "no NVIDIA driver" in said:
        return "this machine has no NVIDIA driver; install one", False
    if "No CUDA GPUs" in said:
        return "the NVIDIA driver shows no card (CUDA_VISIBLE_DEVICES?); let it show one", False
    if "too old" in said:
        # 11040 is CUDA 11.4.
        number = int(re.search(r"found version (\d+)|$", said)[1] or 0)
        found, needed = f"{number // 1000}.{number % 1000 // 10}", torch.version.cuda
        return f"the NVIDIA driver is for CUDA {found}, too old for {needed}; install a newer", True
    return f"CUDA does not start ({said.splitlines()[0]}); repair it", True


def pick_kernels(wanted: str, device: str) -> Kernels:
    """The kernels for `model.kernels` on "cpu" or "cuda"; imports none of them.

    Raises RuntimeError when Liger is wanted and not usable.
    """
    if wanted not in ("auto", "liger"):
        return Kernels(wanted, f'model.kernels = "{wanted}"')
    low, high = (".".join(map(str, bound)) for bound in LIGER_VERSIONS)
    fault = "the model is on the CPU" if device == "cpu" else ""
    if not fault:
        try:
            version = metadata.version("liger-kernel")
            numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
            if not LIGER_VERSIONS[0] <= numbers < LIGER_VERSIONS[1]:
                fault = f"liger-kernel {version} is installed, supported are {low} to below {high}"
        except metadata.PackageNotFoundError:
            fault = "liger-kernel is not installed"
    if wanted == "auto":
        reason = fault or f"liger-kernel {version} is installed"
        return Kernels("torch" if fault else "liger", reason)
    if fault:
        raise RuntimeError(
            f"model.kernels = \"liger\": {fault}; pip install -e '.[cuda]', or use "
            "model.kernels=torch"
        )
    return Kernels("liger", 'model.kernels = "liger"')


def use_flash_attention(device: str) -> str:
    """Let torch's packed attention be FlashAttention 3 on Hopper, where its wheel is installed.

    What attention is now, in words; "" on a CPU. Raises what the wheel raises where it does not
    load: it was installed to be used.
    """
    if device == "cpu":
        return ""
    name = "flash_attn_interface"
    if torch.cuda.get_device_capability() != (9, 0):
        return "FlashAttention 2: 3 is for Hopper"
    if util.find_spec(name) is None:
        return f"FlashAttention 2: {name} is not installed"
    activate_flash_attention_impl("FA3")
    return f"FlashAttention 3: {name} is installed"
