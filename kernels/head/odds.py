"""The loss head of one chunk of rows by its odds: the exponential lives in the matrix product.

    u_cv = z_cv - z_ct - shift_c        z = softcap(hidden . weight) / temperature, t the target
    E_cv = exp(u_cv), 0 in the target's column
    R_c  = sum_v E_cv       K_c = sum_v E_cv u_cv       S_c = R_c + exp(-shift_c)
    logprob_c = -log1p(R_c) where shift_c = 0, else -(shift_c + log S_c)
    entropy_c = log S_c - (K_c - shift_c exp(-shift_c)) / S_c

E is kept in the inputs' type and the sums in fp32: a log-prob is exact to fp32 although no fp32
logits exist, and 1 - p keeps its relative accuracy for confident tokens. With E'_ct = -R_c the
gradient of the logits is -(dlogprob_c / S_c) E'_cv, a row scaling of what is already stored, so
both gradient products are plain matrix products.

A row whose largest u exceeds MAX_EXPONENT is done again relative to its own maximum (the shift),
on the device and without a host sync; that reads the whole weight twice for each such row.
Known limits: rows of the inputs start on 16 bytes (TMA); no gradient through the entropy.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import HeadPlan, interpreted, padded_columns
from .rescue import rereference, row_top
from .rowmath import IGNORED, MAX_EXPONENT, cap, cap_slope, finish

# A sum that holds one clamped exponential, exp(64) = 6.2e27, is at least this.
CLAMPED_SUM = tl.constexpr(6e27)


@triton.jit
def _target_logit(
    x_ptr,
    w_ptr,
    target_ptr,
    logit_ptr,
    V,
    D,
    stride_xc,
    stride_wv,
    scale,
    softcap,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, 0).to(tl.int64)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * stride_xc + inner, mask=inner < D, other=0.0)
        w = tl.load(w_ptr + column * stride_wv + inner, mask=inner < D, other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)
    logit = cap(tl.sum(acc), scale, softcap, SOFTCAP)
    # The logit of an ignored row is not used; an impossible target must show as NaN.
    logit = tl.where(known | (target == IGNORED), logit, float("nan"))
    tl.store(logit_ptr + row, logit)


@triton.jit
def _odds_matmul(
    x_ptr,
    w_ptr,
    e_ptr,
    target_ptr,
    logit_ptr,
    partial_ptr,
    num_rows,
    V,
    D,
    stride_xc,
    stride_wv,
    stride_ec,
    scale,
    softcap,
    num_programs,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    if TMA:
        x_desc = tl.make_tensor_descriptor(x_ptr, (num_rows, D), (stride_xc, 1), (BLOCK_C, BLOCK_D))
        w_desc = tl.make_tensor_descriptor(w_ptr, (V, D), (stride_wv, 1), (BLOCK_V, BLOCK_D))
        if STORE:
            e_desc = tl.make_tensor_descriptor(
                e_ptr, (num_rows, V), (stride_ec, 1), (BLOCK_C, BLOCK_V)
            )
    tiles_c = tl.cdiv(num_rows, BLOCK_C)
    tiles_v = tl.cdiv(V, BLOCK_V)
    # Row tiles vary fastest: the rows stay in L2 while each tile of the weight is read once.
    for tile in tl.range(tl.program_id(0), tiles_c * tiles_v, num_programs):
        tile_c = tile % tiles_c
        tile_v = tile // tiles_c
        rows = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
        cols = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        in_rows = rows < num_rows
        acc = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
        for k in tl.range(0, tl.cdiv(D, BLOCK_D), warp_specialize=WARP_SPECIALIZE):
            if TMA:
                x = x_desc.load([tile_c * BLOCK_C, k * BLOCK_D])
                w = w_desc.load([tile_v * BLOCK_V, k * BLOCK_D])
            else:
                inner = k * BLOCK_D + tl.arange(0, BLOCK_D)
                x_at = x_ptr + rows.to(tl.int64)[:, None] * stride_xc + inner[None, :]
                w_at = w_ptr + cols.to(tl.int64)[:, None] * stride_wv + inner[None, :]
                in_d = (inner < D)[None, :]
                x = tl.load(x_at, mask=in_rows[:, None] & in_d, other=0.0)
                w = tl.load(w_at, mask=(cols < V)[:, None] & in_d, other=0.0)
            # fp32 inputs come from the interpreter only; TF32 would be a silent loss
            acc = tl.dot(x, w.T, acc, input_precision="ieee")

        target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
        logit = tl.load(logit_ptr + rows, mask=in_rows, other=0.0)
        z = cap(acc, scale, softcap, SOFTCAP)
        u = z - logit[:, None]
        valid = (cols[None, :] < V) & (cols[None, :] != target.to(tl.int32)[:, None])
        e = tl.where(valid, tl.exp(tl.minimum(u, MAX_EXPONENT)), 0.0)
        part = partial_ptr + tile_v.to(tl.int64) * 2 * num_rows + rows
        tl.store(part, tl.sum(e, 1), mask=in_rows)
        if ENTROPY:
            tl.store(part + num_rows, tl.sum(e * u, 1), mask=in_rows)
        if STORE:
            out = (e * cap_slope(z, scale, softcap, SOFTCAP)).to(e_ptr.dtype.element_ty)
            if TMA:
                e_desc.store([tile_c * BLOCK_C, tile_v * BLOCK_V], out)
            else:
                e_at = e_ptr + rows.to(tl.int64)[:, None] * stride_ec + cols[None, :]
                tl.store(e_at, out, mask=in_rows[:, None] & (cols < V)[None, :])


@triton.jit
def _finish_rows(
    e_ptr,
    target_ptr,
    stats_ptr,
    partial_ptr,
    logprob_ptr,
    entropy_ptr,
    num_rows,
    tiles_v,
    stride_ec,
    scale,
    softcap,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = rows < num_rows
    r = tl.zeros((BLOCK_C,), tl.float32)
    k = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, tiles_v, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        mask = (part < tiles_v)[:, None] & in_rows[None, :]
        at = partial_ptr + part.to(tl.int64)[:, None] * 2 * num_rows + rows[None, :]
        r += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        if ENTROPY:
            k += tl.sum(tl.load(at + num_rows, mask=mask, other=0.0), 0)
    target = tl.load(target_ptr + rows, mask=in_rows, other=IGNORED)
    live = target != IGNORED
    # A negative shift asks `rereference` for this row.
    shift = tl.where(live & (r >= CLAMPED_SUM), -1.0, 0.0)
    logit = tl.load(stats_ptr + rows, mask=in_rows, other=0.0)
    tl.store(stats_ptr + num_rows + rows, shift, mask=in_rows)
    tl.store(stats_ptr + 2 * num_rows + rows, r, mask=in_rows)
    tl.store(stats_ptr + 3 * num_rows + rows, k, mask=in_rows)
    logprob, entropy = finish(tl.maximum(shift, 0.0), r, k, live)
    tl.store(logprob_ptr + rows, logprob, mask=in_rows)
    tl.store(entropy_ptr + rows, entropy, mask=in_rows)
    if STORE:
        own = -r * cap_slope(logit, scale, softcap, SOFTCAP)
        e_at = e_ptr + rows.to(tl.int64) * stride_ec + tl.maximum(target, 0)
        tl.store(e_at, own.to(e_ptr.dtype.element_ty), mask=in_rows & live)


def chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, plan: HeadPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_C, entropy_C, stats_4C, kept_CV); stats are target logit, shift, R and K in fp32.

    kept_CV is E' with `keep`, else empty; its rows are padded to 16 bytes.
    """
    made = Launch(hidden_CD, weight_VD, target_C, plan, keep)
    made.target_logits()
    made.products()
    shape = (1 / plan.temperature, plan.softcap)
    _finish_rows[(triton.cdiv(made.num_rows, 32),)](
        made.kept, target_C, made.stats_4C, made.partial, made.logprob_C, made.entropy_C,
        made.num_rows, len(made.partial), made.kept.stride(0), *shape,
        BLOCK_C=32, BLOCK_P=32, STORE=keep, ENTROPY=made.entropy, SOFTCAP=made.capped,
    )  # fmt: skip
    made.rereference()
    return made.logprob_C, made.entropy_C, made.stats_4C, made.kept_CV


class Launch:
    """The buffers of a chunk, and its launches."""

    def __init__(
        self, hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, plan: HeadPlan, keep: bool
    ) -> None:
        self.inputs, self.plan, self.keep = (hidden_CD, weight_VD, target_C), plan, keep
        self.num_rows, self.vocabulary = len(hidden_CD), len(weight_VD)
        self.strides = (hidden_CD.stride(0), weight_VD.stride(0))
        fp32 = {"dtype": torch.float32, "device": hidden_CD.device}
        self.logprob_C, self.entropy_C = (torch.empty(self.num_rows, **fp32) for _ in range(2))
        self.stats_4C = torch.empty(4, self.num_rows, **fp32)
        tiles_v = triton.cdiv(self.vocabulary, plan.tile.block_v)
        self.partial = torch.empty(tiles_v, 2, self.num_rows, **fp32)
        """R and K of each tile of the vocabulary."""
        self.kept = hidden_CD.new_empty(
            self.num_rows if keep else 0, padded_columns(self.vocabulary)
        )
        self.entropy, self.capped = plan.entropy != "none", plan.softcap > 0

    @property
    def kept_CV(self) -> Tensor:
        """E', without its padding."""
        return self.kept[:, : self.vocabulary] if self.keep else self.kept.new_empty(0)

    def target_logits(self) -> None:
        """Into the first row of the statistics."""
        width, plan = self.inputs[0].shape[1], self.plan
        _target_logit[(self.num_rows,)](
            *self.inputs, self.stats_4C, self.vocabulary, width, *self.strides,
            1 / plan.temperature, plan.softcap,
            BLOCK_D=min(1024, triton.next_power_of_2(width)), SOFTCAP=self.capped,
        )  # fmt: skip

    def products(self) -> None:
        """E and the partial sums, of the target logits."""
        (hidden_CD, weight_VD, target_C), plan, tile = self.inputs, self.plan, self.plan.tile
        tiles = triton.cdiv(self.num_rows, tile.block_c) * len(self.partial)
        programs = _num_programs(hidden_CD, tiles)
        _with_scratch(
            hidden_CD.device,
            lambda: _odds_matmul[(programs,)](
                hidden_CD, weight_VD, self.kept, target_C, self.stats_4C, self.partial,
                self.num_rows, self.vocabulary, hidden_CD.shape[1], *self.strides,
                self.kept.stride(0), 1 / plan.temperature, plan.softcap, programs,
                BLOCK_C=tile.block_c, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d,
                STORE=self.keep, ENTROPY=self.entropy, SOFTCAP=self.capped, TMA=tile.tma,
                WARP_SPECIALIZE=tile.warp_specialize,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            ),
        )  # fmt: skip

    def row_tops(self) -> Tensor:
        """(C,) the own largest logit of rows with a negative shift; -inf of others."""
        hidden_CD, weight_VD, _ = self.inputs
        top_C = torch.full_like(self.logprob_C, float("-inf"))
        row_top[(self.num_rows,)](
            hidden_CD, weight_VD, self.stats_4C, top_C, self.num_rows, self.vocabulary,
            hidden_CD.shape[1], *self.strides, 1 / self.plan.temperature, self.plan.softcap,
            BLOCK_V=64, BLOCK_D=64, SOFTCAP=self.capped, num_warps=8,
        )  # fmt: skip
        return top_C

    def rereference(self, top_C: Tensor | None = None) -> None:
        """Rows with a negative shift again, by their largest logits, or those of a dealt head."""
        hidden_CD, weight_VD, target_C = self.inputs
        rereference[(self.num_rows,)](
            hidden_CD, weight_VD, self.kept, target_C, self.stats_4C,
            self.stats_4C if top_C is None else top_C, self.logprob_C, self.entropy_C,
            self.num_rows, self.vocabulary, hidden_CD.shape[1], *self.strides,
            self.kept.stride(0), 1 / self.plan.temperature, self.plan.softcap,
            BLOCK_V=64, BLOCK_D=64, STORE=self.keep, SOFTCAP=self.capped,
            # Eight warps spill under Triton 3.6 on sm_100.
            DEALT=top_C is not None, num_warps=4,
        )  # fmt: skip


def chunk_gradient(
    kept_CV: Tensor, stats_4C: Tensor, dlogprob_C: Tensor, plan: HeadPlan
) -> tuple[Tensor, Tensor]:
    """(left_CV, scale_C) with d loss / d raw logits = scale_C * left_CV."""
    _, shift_C, r_C, _ = stats_4C.unbind(0)
    return kept_CV, -dlogprob_C / ((r_C + torch.exp(-shift_C)) * plan.temperature)


def _num_programs(hidden_CD: Tensor, num_tiles: int) -> int:
    if not hidden_CD.is_cuda:
        return min(3, num_tiles)
    return min(torch.cuda.get_device_properties(hidden_CD.device).multi_processor_count, num_tiles)


def _with_scratch(device: torch.device, launch) -> None:
    """Run a launch whose tensor descriptors live in scratch memory, which the caller allots."""
    if interpreted():
        launch()
        return

    def run() -> None:
        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        launch()

    # The allocator is a context variable: a copied context leaves the host program's alone.
    contextvars.copy_context().run(run)
