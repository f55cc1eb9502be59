"""What the ops share before anything is launched: options, checks, and the plan of a call.

Every choice is made from shapes, types and the device, once, and can be printed
(`HeadPlan.describe`); on CUDA `ladder.py` tries it first. Nothing is chosen by timing; a caller who
has measured a better tile gives it through the option `tile`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from .tiles import INTERPRETER_TILE, ODDS_TILES, Tile, table_architecture

IGNORE = -100
"""The target of a row that carries no loss."""

NAMESPACE = __package__.removesuffix(".head").replace(".", "_")
"""Of the registered operators: the folder's own name, so that a copy of it can load beside it."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

HeadPath = Literal["auto", "plain", "odds", "rows"]
Entropy = Literal["none", "value", "gradient"]

# One chunk of 4,096 rows at the largest common vocabulary, 151,936, in bf16.
DEFAULT_CHUNK_BYTES = 1_250_000_000
_ROW_MULTIPLE = 128
# Terms that a product on the CPU sums at once.
TERMS = 4096


class Vocabulary(NamedTuple):
    """The rows of the head that this process has, where several have the vocabulary together."""

    first: int
    """The token of the first row."""
    share: int
    """Rows that sizes follow from, on all alike; the last may have fewer."""
    size: int
    """Tokens of all."""
    ranks: Any
    """Who has the others: tp_sum(tensor) and tp_max(tensor) over all, in place; tp_summing(tensor),
    which returns what to call for the end."""


class HeadOptions(TypedDict, total=False):
    """Keyword options of the ops on the loss head; the defaults are in `Head`.

    temperature   the logits are divided by it, > 0
    softcap       z -> softcap * tanh(z / softcap) before the temperature; None for none
    rows_R        (R,) int64 on the inputs' device, without repeats: the only rows that enter a
                  matrix product. The host knows them from the collator, so nothing is synced
    main_grad_VD  (V, D) fp32, contiguous: the weight's gradient is added to it and autograd
                  gets none; gives the weight a gradient even where requires_grad is False
    chunk_bytes   bound of the (rows, V) buffer, in bytes; one row is the least
    entropy       "none" skips the entropy, "value" has no gradient through it, "gradient" has
    path          "plain" is torch alone, on any device; Triton has "odds" (bf16; exponential inside
                  the matrix product) and "rows" (fp32 logits from cuBLAS, row kernels); "auto" is
                  "plain" but on CUDA, and there what fits the type, the shape and the device
    tile          a launch configuration for "odds" instead of the table's
    vocabulary    the rows that the weight has, of a head dealt to several processes: all call with
                  the same hidden states and get the same outputs and gradients of them
    """

    temperature: float
    softcap: float | None
    rows_R: Tensor | None
    main_grad_VD: Tensor | None
    chunk_bytes: int
    entropy: Entropy
    path: HeadPath
    tile: Tile | None
    vocabulary: Vocabulary | None


@dataclass(frozen=True)
class Head:
    """`HeadOptions` with their defaults."""

    temperature: float = 1.0
    softcap: float | None = None
    rows_R: Tensor | None = None
    main_grad_VD: Tensor | None = None
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    entropy: Entropy = "value"
    path: HeadPath = "auto"
    tile: Tile | None = None
    vocabulary: Vocabulary | None = None

    def num_tokens(self, weight_VD: Tensor) -> int:
        """The vocabulary of the whole head."""
        return len(weight_VD) if self.vocabulary is None else self.vocabulary.size


def head_of(options: HeadOptions) -> Head:
    """The options of a call; TypeError on one that does not exist says which ones do."""
    known = HeadOptions.__annotations__
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    return Head(**options)


@dataclass(frozen=True)
class HeadPlan:
    """How one call runs: plain values only, fixed before the first launch."""

    path: Literal["plain", "odds", "rows"]
    temperature: float
    softcap: float
    """0 for none."""
    entropy: Entropy
    tile: Tile | None
    chunk_rows: int = 1
    note: str = ""
    """Why it is not the first choice for this device, where it is not."""
    vocabulary: Vocabulary | None = None

    def chunks(self, num_rows: int) -> list[tuple[int, int]]:
        """(start, end) of each chunk of rows."""
        starts = range(0, num_rows, self.chunk_rows)
        return [(start, min(start + self.chunk_rows, num_rows)) for start in starts]

    @property
    def recipe(self) -> str:
        """The plan of one chunk as a word per value, as the operators take it; see `read_recipe`.

        Example: "odds 1.0 0.0 none 128 256 64 4 3 1 1".
        """
        tile = "" if self.tile is None else self.tile.words
        return f"{self.path} {self.temperature!r} {self.softcap!r} {self.entropy} {tile}"

    def describe(self) -> str:
        """One line for the run's records."""
        tile = "" if self.tile is None else f", {self.tile}"
        text = f"{self.path}, at most {self.chunk_rows} rows at once, entropy {self.entropy}{tile}"
        return f"{text} ({self.note})" if self.note else text


@functools.lru_cache(maxsize=64)
def read_recipe(recipe: str) -> HeadPlan:
    """The plan that has this `HeadPlan.recipe`, but for the size of the chunks."""
    path, temperature, softcap, entropy, *tile = recipe.split()
    sizes, flags = map(int, tile[:5]), (word == "1" for word in tile[5:])
    made = Tile(*sizes, *flags) if tile else None
    return HeadPlan(path, float(temperature), float(softcap), entropy, made)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def plan_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, head: Head) -> HeadPlan:
    """Check the inputs of a head op and fix how it runs; ValueError says what to change."""
    check_head(hidden_TD, weight_VD, target_T, head)
    num_rows = hidden_TD.shape[0] if head.rows_R is None else head.rows_R.shape[0]
    return plan_for(num_rows, weight_VD, head)


def plan_for(num_rows: int, weight_VD: Tensor, head: Head) -> HeadPlan:
    """How a head op would run on so many rows with this weight, without a call."""
    path = _resolve_path(weight_VD, head)
    # Of a dealt head the share, or the last rank would make other chunks and wait for ever.
    share = len(weight_VD) if head.vocabulary is None else head.vocabulary.share
    chunk_rows = max(1, head.chunk_bytes // _bytes_per_row(path, weight_VD, share))
    if chunk_rows < num_rows:
        num_chunks = -(-num_rows // chunk_rows)
        even = -(-num_rows // num_chunks)
        aligned = -(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE
        chunk_rows = aligned if aligned <= chunk_rows else even
    tile = _resolve_tile(path, weight_VD, head)
    softcap = 0.0 if head.softcap is None else float(head.softcap)
    chunk_rows = min(chunk_rows, num_rows or 1)
    return HeadPlan(
        path, float(head.temperature), softcap, head.entropy, tile, chunk_rows,
        vocabulary=head.vocabulary,
    )  # fmt: skip


def check_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, head: Head) -> None:
    """Refuse inputs that would not compute what they seem to say."""
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"expected hidden (T, D) and weight (V, D), got {tuple(hidden_TD.shape)} and "
            f"{tuple(weight_VD.shape)}; flatten the batch, do not transpose the weight"
        )
    if hidden_TD.dtype != weight_VD.dtype or not hidden_TD.is_floating_point():
        raise ValueError(
            f"expected hidden and weight of one floating type, got {hidden_TD.dtype} and "
            f"{weight_VD.dtype}; cast one of them"
        )
    expect("target", target_T, hidden_TD.shape[:1], torch.int64, hidden_TD.device)
    if weight_VD.device != hidden_TD.device:
        raise ValueError(f"weight: expected on {hidden_TD.device}, got {weight_VD.device}; move it")
    if weight_VD.shape[0] == 0:
        raise ValueError("weight: expected at least one vocabulary row, got (0, D)")
    if head.rows_R is not None:
        expect("rows_R", head.rows_R, head.rows_R.shape[:1], torch.int64, hidden_TD.device)
    if head.main_grad_VD is not None:
        fp64 = weight_VD.dtype == torch.float64
        wanted = torch.float64 if fp64 else torch.float32
        expect("main_grad_VD", head.main_grad_VD, weight_VD.shape, wanted, weight_VD.device)
        if not head.main_grad_VD.is_contiguous():
            raise ValueError("main_grad_VD: expected contiguous memory, got a strided view")
    if not head.temperature > 0:
        raise ValueError(
            f"temperature: expected > 0, got {head.temperature}; greedy samples have no log-probs, "
            "sample with a temperature to train on them"
        )
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap: expected > 0 or None, got {head.softcap}")
    if head.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected >= 1, got {head.chunk_bytes}")
    if head.entropy not in ("none", "value", "gradient"):
        raise ValueError(f"entropy: expected 'none', 'value' or 'gradient', got {head.entropy!r}")
    _check_targets(target_T, head.num_tokens(weight_VD))


def expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """ValueError unless `tensor` has this shape, dtype and device."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {tuple(shape)} {dtype} on {device}, got {tuple(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}; cast or move it"
        )


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at for nothing.

    A look at a CUDA tensor would wait for the device, and there is nothing to see in a fake tensor
    or while torch.compile traces.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling()


def _check_targets(target_T: Tensor, vocabulary: int) -> None:
    # Where they cannot be looked at, a bad target gives a NaN row.
    if not readable(target_T):
        return
    bad = (target_T != IGNORE) & ((target_T < 0) | (target_T >= vocabulary))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"target: expected {IGNORE} or 0..{vocabulary - 1}, got {int(target_T[row])} in row "
            f"{row}; check that the tokenizer fits the model"
        )


def needs_triton(path: str, device: torch.device) -> None:
    """ValueError where Triton cannot run on `device`, RuntimeError where it is not installed."""
    if not HAS_TRITON:
        raise RuntimeError(f"path={path!r}: needs the package triton; install it, or path='plain'")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"path={path!r}: expected CUDA tensors, got {device.type}; move them, use "
            "path='auto', or set TRITON_INTERPRET=1 before the import to debug on the CPU"
        )


def _resolve_path(weight_VD: Tensor, head: Head) -> str:
    if head.path not in get_args(HeadPath):
        raise ValueError(f"path: expected one of {get_args(HeadPath)}, got {head.path!r}")
    if head.path == "plain" or (head.path == "auto" and not weight_VD.is_cuda):
        return "plain"
    needs_triton(head.path, weight_VD.device)
    if weight_VD.dtype == torch.float64:
        raise ValueError(
            f"path={head.path!r}: expected fp32, bf16 or fp16, got fp64; use path='plain'"
        )
    # Exponentials relative to the target overflow fp16.
    blockers = {
        "fp16 inputs": weight_VD.dtype == torch.float16,
        "a gradient through the entropy": head.entropy == "gradient",
    }
    if weight_VD.is_cuda:
        blockers["fp32 inputs on a GPU"] = weight_VD.dtype == torch.float32
        blockers["rows that are no multiple of 16 bytes"] = not _tma_aligned(weight_VD)
        blockers["this device"] = torch.cuda.get_device_capability(weight_VD.device)[0] < 8
    blocking = [reason for reason, blocks in blockers.items() if blocks]
    if head.path == "odds" and blocking:
        raise ValueError(f"path='odds': not made for {' or '.join(blocking)}; use path='rows'")
    if head.path == "auto":
        return "rows" if blocking else "odds"
    return head.path


def _tma_aligned(weight_VD: Tensor) -> bool:
    # The hidden states are copied where they are not; the weight is too large for that.
    return weight_VD.shape[1] % 8 == 0 and weight_VD.is_contiguous()


def _resolve_tile(path: str, weight_VD: Tensor, head: Head) -> Tile | None:
    if path != "odds":
        if head.tile is not None:
            raise ValueError(f"tile: expected only with path 'odds', got path {path!r}")
        return None
    if head.tile is not None:
        return head.tile
    if not weight_VD.is_cuda:
        return INTERPRETER_TILE
    arch = table_architecture(torch.cuda.get_device_capability(weight_VD.device))
    if head.softcap is not None:
        return ODDS_TILES[arch]["softcap"]
    return ODDS_TILES[arch]["logprob" if head.entropy == "none" else "entropy"]


def padded_columns(vocabulary: int) -> int:
    """Columns of a (rows, V) buffer whose rows start on 16 bytes in every type."""
    return -(-vocabulary // 8) * 8


def _bytes_per_row(path: str, weight_VD: Tensor, vocabulary: int) -> int:
    size = weight_VD.element_size()
    if path == "odds":
        return padded_columns(vocabulary) * size
    if path == "rows":
        # fp32 logits, and their gradient in the inputs' type where it cannot overwrite them
        return vocabulary * (4 if size == 4 else 4 + size)
    # The plain path keeps the exponents beside their exponentials, and upcasts.
    return vocabulary * 2 * max(size, 4)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with an unrounded result: fp32 for bf16 and fp16, else the inputs' type."""
    if left.dtype in (torch.float32, torch.float64):
        if left.is_cuda:
            return left @ right
        # For few rows or columns a CPU's library adds term after term, 20 times as inexact over a
        # vocabulary as in blocks. The blocks are made here, whatever the library is.
        out = left[:, :TERMS] @ right[:TERMS]
        for start in range(TERMS, left.shape[1], TERMS):
            part = slice(start, start + TERMS)
            out += left[:, part] @ right[part]
        return out
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def accumulate(out: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> None:
    """`out += left @ right`, or `out =` it: one matrix product that accumulates in fp32 or more."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=0 if overwrite else 1)
    elif left.is_cuda:
        beta = 0 if overwrite else 1
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, out=out)
    else:
        # The factors may be wider than what they add up to: only the result is rounded.
        dtype = torch.promote_types(out.dtype, torch.promote_types(left.dtype, torch.float32))
        made = left.to(dtype) @ right.to(dtype)
        out.copy_(made if overwrite else made.add_(out))
