"""Compile every Triton kernel in every static configuration ahead of time; no GPU needed.

    python -m benchmarks.compile_check [--arch 90] [--json FILE]

Another Triton than the installed one, from `pip install --no-deps --target FOLDER triton==3.6.0`:

    PYTHONPATH=FOLDER python -m benchmarks.compile_check

Under each product of the tile table stand the candidates of `head/autotune.py` (tile, stages).
Fails (exit status 1) on register spills or any other use of the stack, on shared memory over the
architecture's limit, on missing tensor-core instructions, and where a tile claims warp
specialisation that the compiler left out without a word. Registers and stack come from the
cuobjdump inside the Triton wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from intfast.kernels import adamw, add_gradient, add_rms_norm, group_advantages, norm_rope, swiglu
from intfast.kernels.head import odds, rescue, rows
from intfast.kernels.head.autotune import candidates
from intfast.kernels.head.tiles import FALLBACK_TILES, ODDS_TILES, SHARED_LIMIT_BYTES, Tile

TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

# By parameter name: pointers and strides are multiples of 16 in every launch that allocates, and
# widths such as D are in every model; V is not.
TYPES = {
    "target_ptr": "*i64",
    "offset_ptr": "*i64",
    "token_offset_ptr": "*i64",
    "count_ptr": "*i64",
    "x_ptr": "*bf16",
    "w_ptr": "*bf16",
    "e_ptr": "*bf16",
    "out_ptr": "*bf16",
    **dict.fromkeys(("delta_ptr", "stream_ptr", "normed_ptr", "gate_up_ptr", "both_ptr"), "*bf16"),
    **dict.fromkeys(("cos_ptr", "sin_ptr", "query_weight_ptr", "key_weight_ptr"), "*bf16"),
    **dict.fromkeys(("dnormed_ptr", "dstream_ptr", "dx_ptr", "dout_ptr", "dgate_up_ptr"), "*bf16"),
    **dict.fromkeys(("dquery_ptr", "dkey_ptr", "dvalue_ptr", "dqkv_ptr"), "*bf16"),
    "scale": "fp32",
    "softcap": "fp32",
    "eps": "fp32",
    "narrow_ptr": "*bf16",
    **dict.fromkeys(("grad_scale", "keep", "beta1", "beta2", "rest1", "rest2", "rate"), "fp32"),
    "root": "fp32",
    "right_above": "fp32",
    "V": "i32",
    "D": "i32",
    "N": "i32",
    "T": "i32",
    "num_rows": "i32",
    "tiles_v": "i32",
    "num_programs": "i32",
    **dict.fromkeys(("width", "rows_each", "H", "J", "salt", "first"), "i32"),
}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    name: str
    kernel: triton.runtime.JITFunction
    constants: dict
    num_warps: int = 4
    num_stages: int = 3
    tile: Tile | None = None
    types: dict = field(default_factory=dict)
    """Of arguments that are others here than in TYPES."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    arch: int
    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    specialized: bool
    seconds: float
    faults: list[str]


def cases(arch: int) -> list[Case]:
    """Every configuration that `kernels/` can launch on `arch`."""
    found = []
    for kind, own in ODDS_TILES[arch].items():
        lower = (tiles[kind] for tiles in FALLBACK_TILES[arch])
        for tile in dict.fromkeys([*candidates(arch, kind), *lower]):
            for store in (True, False):
                found.append(_matmul(kind, tile, store, tile == own))
    finish = {"BLOCK_C": 32, "BLOCK_P": 32, "STORE": True, "ENTROPY": True, "SOFTCAP": True}
    redo = {"BLOCK_V": 64, "BLOCK_D": 64, "STORE": True, "SOFTCAP": True}
    row = {"BLOCK_V": 4096, "SOFTCAP": True}
    groups = {"BLOCK_N": 128, "BLOCK_T": 1024, "SCALE": 3, "LEAVE_ONE_OUT": True, "TOKENS": True}
    step = {"BLOCK": 2048, "NARROW": False, "SPLIT": False, "SHORT": False}
    step |= {"HALF": adamw.HALF, "MIX1": adamw.MIX[1], "MIX2": adamw.MIX[2]}
    short = {**step, "SPLIT": True, "SHORT": True}
    halves = dict.fromkeys(("master_ptr", "narrow_ptr", "mean_ptr", "square_ptr"), "*i16")
    dealt = {True: " of a dealt head", False: ""}
    top = {"BLOCK_V": 64, "BLOCK_D": 64, "SOFTCAP": True}
    return [
        *found,
        Case("row_top", rescue.row_top, top, num_warps=8),
        Case("target_logit", odds._target_logit, {"BLOCK_D": 1024, "SOFTCAP": True}),
        Case("finish_rows", odds._finish_rows, finish),
        *(
            Case(f"{name}{said}", kernel, {**constants, "DEALT": is_dealt}, num_warps=warps)
            for name, kernel, constants, warps in (
                ("rereference", rescue.rereference, redo, 4),
                ("row_statistics", rows._row_statistics, row, 8),
            )
            for is_dealt, said in dealt.items()
        ),
        Case("row_gradient", rows._row_gradient, {**row, "ENTROPY": True}, num_warps=8),
        Case("group_advantages", group_advantages._advantages_of_a_group, groups, 8),
        *_layer(),
        Case("adamw", adamw._adamw_of_a_tensor, {**step, "NARROW": True}, 8),
        Case("adamw short", adamw._adamw_of_a_tensor, short, 8, types=halves),
        Case("add_gradient", add_gradient._add_a_block, {"BLOCK": 2048, "FRESH": False}, 8),
    ]


def _layer() -> list[Case]:
    """The elementwise ops of a layer: widths of small and of the largest models."""
    found = []
    for width in (64, 2560, add_rms_norm.MAX_WIDTH):
        launch = {**add_rms_norm._launch(width), "ADD": True}
        warps = launch.pop("num_warps")
        for name in ("_add_and_normalise", "_gradients"):
            label = f"add_rms_norm{name} {width}"
            found.append(Case(label, getattr(add_rms_norm, name), launch, warps))
    for size, norm in ((128, True), (128, False), (80, True), (256, True)):
        launch = norm_rope._blocks(size, norm)
        warps = launch.pop("num_warps")
        for name in ("_forward_of_a_token", "_gradients_of_tokens"):
            label = f"norm_rope{name[:9]} {size}{' norm' if norm else ''}"
            found.append(Case(label, getattr(norm_rope, name), launch, warps))
    for name in ("_gate", "_gate_gradient"):
        found.append(Case(f"swiglu{name}", getattr(swiglu, name), {"BLOCK": 2048}))
    return found


def _matmul(kind: str, tile: Tile, store: bool, in_table: bool) -> Case:
    constants = {
        "BLOCK_C": tile.block_c,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "STORE": store,
        "ENTROPY": kind != "logprob",
        "SOFTCAP": kind == "softcap",
        "TMA": tile.tma,
        "WARP_SPECIALIZE": tile.warp_specialize,
    }
    name = f"odds_matmul {kind} {'keep' if store else 'no-grad'}"
    if not in_table:
        sizes = f"{tile.block_c}x{tile.block_v}x{tile.block_d}, {tile.num_stages}"
        name = f"  {sizes} {'keep' if store else 'no-grad'}"
    return Case(name, odds._odds_matmul, constants, tile.num_warps, tile.num_stages, tile)


def check(case: Case, arch: int) -> Row:
    """Compile one case and hold it against the limits."""
    start = time.perf_counter()
    signature, aligned = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        default = "i64" if name.startswith("stride") else "*fp32"
        kind = "constexpr" if name in case.constants else (TYPES | case.types).get(name, default)
        signature[name] = kind
        if kind.startswith("*") or name.startswith("stride") or name == "D":
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, local = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    specialized = "ttg.warp_specialize" in compiled.asm["ttgir"]
    faults = []
    if stack or local:
        faults.append(f"{max(stack, local)} bytes of stack: registers spill")
    if shared > SHARED_LIMIT_BYTES[arch]:
        faults.append(f"shared memory {shared} > {SHARED_LIMIT_BYTES[arch]}: cannot launch")
    if case.tile is not None:
        if TENSOR_CORE[arch] not in compiled.asm["ptx"]:
            faults.append(f"no {TENSOR_CORE[arch]}")
        if case.tile.warp_specialize and not specialized:
            faults.append("not warp specialised")
        if case.tile.tma and "cp.async.bulk.tensor" not in compiled.asm["ptx"]:
            faults.append("no TMA copies")
        if not case.tile.tma and "cp.async.cg" not in compiled.asm["ptx"]:
            faults.append("no asynchronous copies: the loop is not pipelined")
    seconds = time.perf_counter() - start
    warps = compiled.metadata.num_warps
    return Row(arch, case.name, registers, stack, shared, warps, specialized, seconds, faults)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) of the only kernel of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a line of resources, got {text!r}")
    return tuple(int(value) for value in found.groups())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_check", description=__doc__)
    parser.add_argument("--arch", type=int, choices=sorted(ODDS_TILES), action="append")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}")
    print(f"{'arch':>5} {'kernel':<30} {'regs':>4} {'stack':>5} {'shared':>7} {'warps':>5}  notes")
    rows = []
    for arch in args.arch or sorted(ODDS_TILES):
        for case in cases(arch):
            row = check(case, arch)
            rows.append(row)
            notes = "; ".join(row.faults) or ("specialised" if row.specialized else "")
            print(
                f"sm_{arch:<3} {row.name:<29} {row.registers:>4} {row.stack_bytes:>5} "
                f"{row.shared_bytes:>7} {row.num_warps:>5}  {notes}",
                flush=True,
            )
    if args.json:
        record = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    failed = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} configurations, {failed} failed, {sum(r.seconds for r in rows):.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
