"""Which way the loss head takes on CUDA: the fastest rung whose kernels compile and launch there.

The first call of each kind runs a few rows. A rung that raises is left for the next one below, with
a warning and a note in the plan (`HeadPlan.describe`), so never in silence. What cannot be caught,
a kernel that hangs or faults later on the device, is passed by with the environment variable
INTFAST_HEAD, which names the rung to start from. A `path` or `tile` of the call stands as it is.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from . import chunks, plan
from .plan import Head, HeadPlan
from .tiles import FALLBACK_TILES, table_architecture

RUNGS = ("odds", "odds-no-ws", "odds-no-tma", "rows", "plain")
"""Downward: the table's tile; without warp specialisation; without the tensor memory accelerator;
fp32 logits with row kernels; torch alone."""
SWITCH = "INTFAST_HEAD"
TRIED_ROWS = 128

_settled: dict[tuple, tuple[Head, str]] = {}
"""What a kind of call runs with, and the note on why."""


def plan_call(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, head: Head
) -> tuple[HeadPlan, bool, bool]:
    """(plan, gradient of hidden wanted, gradient of weight wanted) of one call of a head op."""
    plan.check_head(hidden_TD, weight_VD, target_T, head)
    num_rows = hidden_TD.shape[0] if head.rows_R is None else head.rows_R.shape[0]
    made = plan_for(num_rows, weight_VD, head)
    enabled = torch.is_grad_enabled()
    need_weight = weight_VD.requires_grad or head.main_grad_VD is not None
    return made, enabled and hidden_TD.requires_grad, enabled and need_weight


def plan_for(num_rows: int, weight_VD: Tensor, head: Head) -> HeadPlan:
    """How a head op runs on so many rows with this weight; tries the rungs where nobody has yet."""
    wished = plan.plan_for(num_rows, weight_VD, head)
    if head.path != "auto" or head.tile is not None or wished.path == "plain":
        return wished
    start = os.environ.get(SWITCH, RUNGS[0])
    kind = (head.entropy, head.softcap is None, weight_VD.dtype, tuple(weight_VD.shape))
    key = (weight_VD.device, start, *kind)
    # There is nothing to launch on a fake tensor or while torch.compile traces.
    real = type(weight_VD) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if key not in _settled and real:
        _settled[key] = _settle(weight_VD, head, start)
    if key not in _settled:
        return wished
    chosen, note = _settled[key]
    resolved = replace(head, path=chosen.path, tile=chosen.tile)
    return replace(plan.plan_for(num_rows, weight_VD, resolved), note=note)


def rungs(weight_VD: Tensor, head: Head) -> dict[str, Head]:
    """The rungs that this weight can take, from the top."""
    found = {name: replace(head, path=name) for name in ("rows", "plain")}
    wished = plan.plan_for(1, weight_VD, head)
    if wished.path != "odds":
        return found
    kind = "softcap" if head.softcap is not None else "entropy"
    kind = "logprob" if kind == "entropy" and head.entropy == "none" else kind
    arch = table_architecture(torch.cuda.get_device_capability(weight_VD.device))
    tiles = (wished.tile, *(tiles[kind] for tiles in FALLBACK_TILES[arch]))
    odds = (replace(head, path="odds", tile=tile) for tile in tiles)
    return dict(zip(RUNGS, odds, strict=False)) | found


def _settle(weight_VD: Tensor, head: Head, start: str) -> tuple[Head, str]:
    if start not in RUNGS:
        raise ValueError(f"{SWITCH}: expected one of {', '.join(RUNGS)}, got {start!r}")
    note, failed = "" if start == RUNGS[0] else f"{SWITCH}={start}", None
    allowed = RUNGS[RUNGS.index(start) :]
    for name, rung in rungs(weight_VD, head).items():
        # Where a table has no such feature, the next rung is the same tile again.
        if name not in allowed or rung == failed:
            continue
        try:
            _try(weight_VD, rung)
            return rung, note
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if name == "plain":
                raise
            failed, said = rung, f"{type(error).__name__}: {error}".splitlines()[0]
            note = f"{note}; " * bool(note) + f"{name} failed with {said[:200]}"
            warnings.warn(
                f"loss head on {weight_VD.device}: {name} failed and the next rung is tried; it "
                f"may be slower. {said}. {SWITCH}={name} starts there at once",
                RuntimeWarning,
                stacklevel=2,
            )
    raise AssertionError("the plain rung returns or raises")


@torch.no_grad()
def _try(weight_VD: Tensor, rung: Head) -> None:
    """Compile and launch what a loss launches, with and without its gradients."""
    hidden_CD = weight_VD[:TRIED_ROWS].detach()
    num_rows = len(hidden_CD)
    target_C = torch.zeros(num_rows, dtype=torch.int64, device=weight_VD.device)
    # Of a dealt head the own rows alone: another rank may be at another rung.
    alone = replace(rung, rows_R=None, chunk_bytes=2**62, vocabulary=None)
    made = plan.plan_for(num_rows, weight_VD, alone)
    inputs = chunks.Inputs(hidden_CD, weight_VD.detach(), target_C, made)
    chunks.forward(inputs, 0, num_rows, keep=False)
    chunk = chunks.forward(inputs, 0, num_rows, keep=True)
    slope_C = torch.ones_like(chunk.logprob_C)
    gradients = chunks.Gradients(inputs, need_hidden=True, need_weight=False, main_grad_VD=None)
    entropy_slope = slope_C if rung.entropy == "gradient" else None
    gradients.add(chunk, 0, num_rows, slope_C, entropy_slope)
