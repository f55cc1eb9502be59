"""A step of AdamW on fp32 masters that also clips and writes the narrow weights: 30 bytes each.

    mean   = beta1 mean + (1 - beta1) g,   square = beta2 square + (1 - beta2) g²,   g = scale grad
    master = (1 - lr decay) master - lr / (1 - beta1^t) mean / (sqrt(square / (1 - beta2^t)) + eps)

Read once: gradient, master, mean, square (16 bytes). Written once: the last three and the 16-bit
weight (14). torch's fused step behind a clip and before a copy moves 42.

Two ways to keep less, together 22 bytes moved and 6 kept in place of 12. A master that is split is
the bf16 weight and, in int16, what is to be added to its bits shifted up: exactly the fp32 number.
The weight is then the master rounded to nearest, and from half way away from zero: of the fp32
numbers that round to an even bf16 there are 65,537, one more than 16 bits can name. Moments in
bf16: means round to nearest; squares, of which a step changes a 1,000th, less than half a last
place, round up or down by chance, so that they move in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw

from .head.plan import expect
from .launch import Path, jit, takes_triton, tl

HALF = 1 << 15
"""Half of the last place of a bf16 number, in the bits of an fp32 one."""
MIX = (0x9E3779B9, 0x7FEB352D, 0x846CA68B)
"""Factors of a hash of 32 bits: of the step, then lowbias32's (Chris Wellons, 2018)."""


@jit
def _adamw_of_a_tensor(
    master_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    narrow_ptr,
    N,
    grad_scale,
    keep,
    beta1,
    beta2,
    rest1,
    rest2,
    rate,
    root,
    eps,
    salt,
    first,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    SPLIT: tl.constexpr,
    SHORT: tl.constexpr,
    HALF: tl.constexpr,
    MIX1: tl.constexpr,
    MIX2: tl.constexpr,
):
    # int64: the head of a large model has more elements than int32 counts bytes.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * grad_scale
    mean = tl.load(mean_ptr + at, mask=inside, other=0)
    square = tl.load(square_ptr + at, mask=inside, other=0)
    master = tl.load(master_ptr + at, mask=inside, other=0)
    # 16 bits come as integers: what they are is decided here and not by a cast.
    if SPLIT:
        high = tl.load(narrow_ptr + at, mask=inside, other=0).to(tl.int32)
        master = ((high << 16) + master.to(tl.int32)).to(tl.float32, bitcast=True)
    if SHORT:
        mean = (mean.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        square = (square.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    mean = beta1 * mean + rest1 * grad
    square = beta2 * square + rest2 * grad * grad
    master = keep * master - rate * mean / (tl.sqrt(square) / root + eps)
    if SHORT:
        chance = (at + first).to(tl.uint32) ^ salt.to(tl.uint32)
        chance = (chance ^ (chance >> 16)) * MIX1
        chance = (chance ^ (chance >> 15)) * MIX2
        chance = ((chance ^ (chance >> 16)) & 0xFFFF).to(tl.int32)
        mean = ((mean.to(tl.int32, bitcast=True) + HALF) >> 16).to(tl.int16)
        square = ((square.to(tl.int32, bitcast=True) + chance) >> 16).to(tl.int16)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        tl.store(narrow_ptr + at, ((bits + HALF) >> 16).to(tl.int16), mask=inside)
        master = bits.to(tl.int16)
    tl.store(master_ptr + at, master, mask=inside)
    if NARROW:
        tl.store(narrow_ptr + at, master.to(narrow_ptr.dtype.element_ty), mask=inside)


@torch.no_grad()
def adamw(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    narrow: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    part: int = 0,
    path: Path = "auto",
) -> None:
    """One step on every tensor, in place.

    masters        contiguous fp32 (fp64 on the plain path), any shapes; or int16: with `narrow`,
                   which is bf16 then, the masters as `split` writes them
    grads          as the masters, of split ones fp32; the plain path leaves them scaled
    means          moving averages of gradients; `squares` of their squares; as wide as gradients,
                   or bf16
    narrow         fp16 or bf16 tensors that the masters are rounded to, None where there is none
    step           1, 2, ...: the number of this step, for the bias corrections
    grad_scale     of every gradient: what clipping leaves of it
    part           which of equal parts of a parameter each of these is: chance goes by the place
    path           "plain" is torch's fused step; "triton" one launch a tensor; "auto" is "triton"
                   on CUDA
    raises         ValueError on a shape, dtype, device, stride or name that does not fit
    source         Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019
    """
    _check(step, masters, grads, means, squares, narrow)
    if not masters:
        return
    how = {"step": step, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    columns = (masters, grads, means, squares, narrow)
    if takes_triton(path, masters[0], (torch.float32, torch.int16)):
        _triton(columns, grad_scale=grad_scale, part=part, **how)
    elif all(x.dtype == g.dtype for x, g in zip([*masters, *means], [*grads] * 2, strict=True)):
        _plain(columns, grad_scale=grad_scale, **how)
    else:
        # One by one: what is wide is there for one tensor at a time.
        for tensors in zip(*columns, strict=True):
            _short(tensors, grad_scale=grad_scale, part=part, **how)


def _check(step, masters, grads, means, squares, narrow) -> None:
    if step < 1:
        raise ValueError(f"step: expected the number of this step, 1 or more, got {step}")
    lists = {"grads": grads, "means": means, "squares": squares, "narrow": narrow}
    for name, tensors in lists.items():
        if len(tensors) != len(masters):
            raise ValueError(f"{name}: expected {len(masters)}, as masters, got {len(tensors)}")
        for master, tensor in zip(masters, tensors, strict=True):
            is_split = master.dtype == torch.int16
            dtype = torch.float32 if is_split else master.dtype
            if name == "narrow":
                dtype = torch.bfloat16 if is_split else getattr(tensor, "dtype", None)
            elif name != "grads" and tensor.dtype == torch.bfloat16:
                dtype = torch.bfloat16
            if tensor is not None:
                expect(name, tensor, master.shape, dtype, master.device)
            elif is_split:
                raise ValueError("narrow: expected the bf16 weight of a split master, got None")
    for mean, square in zip(means, squares, strict=True):
        expect("squares", square, mean.shape, mean.dtype, mean.device)


def joined(narrow: Tensor, low: Tensor) -> Tensor:
    """The fp32 masters, new, of bf16 weights and what `split` left beside them."""
    return ((narrow.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(master: Tensor, narrow: Tensor, low: Tensor) -> None:
    """Write fp32 masters as bf16 weights `narrow` and int16 `low`, in place."""
    bits = master.view(torch.int32)
    low.copy_(bits)
    narrow.view(torch.int16).copy_((bits + HALF) >> 16)


def _short(tensors, *, part, **how) -> None:
    """The plain step of a tensor that is split, or has bf16 moments."""
    master, grad, mean, square, narrow = tensors
    is_split, is_short = master.dtype == torch.int16, mean.dtype == torch.bfloat16
    wide = joined(narrow, master) if is_split else master
    wide_mean, wide_square = mean.float(), square.float()
    rest = None if is_split else narrow
    _plain(([wide], [grad], [wide_mean], [wide_square], [rest]), **how)
    if is_split:
        split(wide, narrow, master)
    if is_short:
        bits = wide_square.view(torch.int32)
        bits += _chance(bits.shape, how["step"], part * bits.numel(), bits.device)
        mean.copy_(wide_mean)
        square.view(torch.int16).copy_(bits >> 16)


def _chance(shape: torch.Size, step: int, first: int, device: torch.device) -> Tensor:
    """Numbers below 65,536, int32, that follow from the step and the place in a parameter."""
    words = torch.arange(first, first + shape.numel(), device=device)
    words = (words ^ _salt(step)) & 0xFFFFFFFF
    # In 64 bits, which wrap: the lower 32 are what they would be alone.
    for shift, factor in zip((16, 15), MIX[1:], strict=True):
        words = ((words ^ (words >> shift)) * factor) & 0xFFFFFFFF
    return ((words ^ (words >> 16)) & 0xFFFF).int().view(shape)


def _salt(step: int) -> int:
    # Odd: Triton compiles numbers that 16 divides, or that need 64 bits, apart.
    return step * MIX[0] & 0x7FFFFFFF | 1


def _plain(columns, *, step, lr, betas, eps, weight_decay, grad_scale) -> None:
    masters, grads, means, squares, narrow = columns
    if grad_scale != 1.0:
        torch._foreach_mul_(list(grads), grad_scale)
    fused = all(master.device.type in ("cpu", "cuda") for master in masters)
    device = masters[0].device if fused else "cpu"
    # torch counts a step up in each of these.
    before = [torch.full((), step - 1.0, device=device) for _ in masters]
    _torch_adamw(
        list(masters), list(grads), list(means), list(squares), [], before,
        fused=fused, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1],
        lr=lr, weight_decay=weight_decay, eps=eps,
    )  # fmt: skip
    written = [(n, m) for n, m in zip(narrow, masters, strict=True) if n is not None]
    if written:
        torch._foreach_copy_([n for n, _ in written], [m for _, m in written])


def _triton(columns, *, step, lr, betas, eps, weight_decay, grad_scale, part) -> None:
    for tensors in zip(*columns, strict=True):
        if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
            raise ValueError("masters: expected contiguous memory, got a strided view")
        master, grad, mean, square, narrow = tensors
        is_split, is_short = master.dtype == torch.int16, mean.dtype == torch.bfloat16
        if is_short:
            mean, square = mean.view(torch.int16), square.view(torch.int16)
        if is_split:
            narrow = narrow.view(torch.int16)
        if master.numel():
            block = 2048 if master.is_cuda else 64
            _adamw_of_a_tensor[(-(-master.numel() // block),)](
                master, grad, mean, square, master if narrow is None else narrow, master.numel(),
                grad_scale, 1 - lr * weight_decay, *betas, 1 - betas[0], 1 - betas[1],
                lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step), eps,
                _salt(step), part * master.numel(),
                BLOCK=block, NARROW=narrow is not None and not is_split, SPLIT=is_split,
                SHORT=is_short, HALF=HALF, MIX1=MIX[1], MIX2=MIX[2], num_warps=8,
            )  # fmt: skip
