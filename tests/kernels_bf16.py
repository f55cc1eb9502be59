"""bf16 and fp16 in Triton's interpreter: a check that it computes as a device does, and a repair.

Triton code may be tested in a type only where `interpreter_rounds` holds for it. As of Triton 3.6
and 3.9 that is fp16: for bf16, casts from fp32 cut off instead of rounding, and `tl.dot` multiplies
raw bit patterns (triton-lang/triton issue 11584). `repair` gives both to torch; the check then
holds bit for bit, and fails when a later Triton moves what is repaired.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _round_trip(wide_ptr, narrow_ptr, back_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(narrow_ptr + at, tl.load(wide_ptr + at).to(narrow_ptr.dtype.element_ty))
    tl.store(back_ptr + at, tl.load(narrow_ptr + at).to(tl.float32))


@triton.jit
def _dot(left_ptr, right_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    out = tl.zeros((N, N), tl.float32)
    out = tl.dot(tl.load(left_ptr + at), tl.load(right_ptr + at).T, out)
    tl.store(out_ptr + at, out)


def interpreter_rounds(dtype: torch.dtype) -> bool:
    """Whether casts are bit for bit those of torch, and a product is that of the upcast factors."""
    made = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=made, dtype=torch.int64)
    wide = bits.to(torch.int32).view(torch.float32)
    step = torch.finfo(dtype).eps
    ties = 1 + step * (torch.arange(64) + 0.5)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-39, 3e-8])
    wide[: len(ties)], wide[64 : 64 + len(special)] = ties, special
    narrow, back = torch.empty_like(wide, dtype=dtype), torch.empty_like(wide)
    _round_trip[(1,)](wide, narrow, back, BLOCK=len(wide))
    left = torch.randn(16, 16, generator=made).to(dtype)
    right = torch.randn(16, 16, generator=made).to(dtype)
    out = torch.empty(16, 16)
    _dot[(1,)](left, right, out, N=16)
    exact = left.double() @ right.double().T
    return (
        torch.equal(narrow.nan_to_num(7), wide.to(dtype).nan_to_num(7))
        and torch.equal(narrow.isnan(), wide.isnan())
        and torch.equal(back.nan_to_num(7), wide.to(dtype).float().nan_to_num(7))
        and float((out - exact).abs().max()) < 1e-5
    )


def repair(monkeypatch) -> None:
    """Let the interpreter's bf16 casts and products round as a device does."""
    stock_convert = interpreter._convert_float
    stock_dot = interpreter.InterpreterBuilder.create_dot

    def convert(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(data, np.float32)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return stock_convert(data, source, target, mode)

    def dot(self, left, right, out, *rest):
        if left.dtype.scalar == tl.bfloat16:
            left, right = (self.cast_impl(x, tl.float32) for x in (left, right))
        return stock_dot(self, left, right, out, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
