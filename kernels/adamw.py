"""A step of AdamW on fp32 masters that also clips and writes the narrow weights: 30 bytes each.

    mean   = beta1 mean + (1 - beta1) g,   square = beta2 square + (1 - beta2) g²,   g = scale grad
    master = (1 - lr decay) master - lr / (1 - beta1^t) mean / (sqrt(square / (1 - beta2^t)) + eps)

Read once: gradient, master, mean, square (16 bytes). Written once: the last three and the 16-bit
weight (14). torch's fused step behind a clip and before a copy moves 42.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw

from .head.plan import expect
from .launch import Path, jit, takes_triton, tl


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
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
):
    # int64: the head of a large model has more elements than int32 counts bytes.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * grad_scale
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    master = tl.load(master_ptr + at, mask=inside, other=0.0)
    mean = beta1 * mean + rest1 * grad
    square = beta2 * square + rest2 * grad * grad
    master = keep * master - rate * mean / (tl.sqrt(square) / root + eps)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
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
    path: Path = "auto",
) -> None:
    """One step on every tensor, in place.

    masters        contiguous fp32 (fp64 on the plain path), any shapes
    grads          as the masters; the plain path leaves them scaled
    means          moving averages of gradients; `squares` of their squares
    narrow         fp16 or bf16 tensors that the masters are rounded to, None where there is none
    step           1, 2, ...: the number of this step, for the bias corrections
    grad_scale     of every gradient: what clipping leaves of it
    path           "plain" is torch's fused step; "triton" one launch a tensor; "auto" is "triton"
                   on CUDA
    raises         ValueError on a shape, dtype, device, stride or name that does not fit
    source         Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019
    """
    if step < 1:
        raise ValueError(f"step: expected the number of this step, 1 or more, got {step}")
    lists = {"grads": grads, "means": means, "squares": squares, "narrow": narrow}
    for name, tensors in lists.items():
        if len(tensors) != len(masters):
            raise ValueError(f"{name}: expected {len(masters)}, as masters, got {len(tensors)}")
        for master, tensor in zip(masters, tensors, strict=True):
            if tensor is not None:
                dtype = tensor.dtype if name == "narrow" else master.dtype
                expect(name, tensor, master.shape, dtype, master.device)
    if not masters:
        return
    run = _triton if takes_triton(path, masters[0], (torch.float32,)) else _plain
    run(masters, grads, means, squares, narrow, step, lr, betas, eps, weight_decay, grad_scale)


def _plain(
    masters, grads, means, squares, narrow, step, lr, betas, eps, weight_decay, grad_scale
) -> None:
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


def _triton(
    masters, grads, means, squares, narrow, step, lr, betas, eps, weight_decay, grad_scale
) -> None:
    for tensors in zip(masters, grads, means, squares, narrow, strict=True):
        master = tensors[0]
        if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
            raise ValueError("masters: expected contiguous memory, got a strided view")
        if master.numel():
            block = 2048 if master.is_cuda else 64
            _adamw_of_a_tensor[(-(-master.numel() // block),)](
                *tensors[:4], master if tensors[4] is None else tensors[4], master.numel(),
                grad_scale, 1 - lr * weight_decay, *betas, 1 - betas[0], 1 - betas[1],
                lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step), eps,
                BLOCK=block, NARROW=tensors[4] is not None, num_warps=8,
            )  # fmt: skip
