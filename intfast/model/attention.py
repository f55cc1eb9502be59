"""Causal attention of the trainer, within each of the sequences of a packed batch.

S sequences of a block, L their padded length, P padded rows; other shapes as in records.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as backends
from torch.nn.attention.varlen import varlen_attn

# Grouped heads always worked; torch 2.12 began to ask for a word.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Attend(Protocol):
    """Attention of one layer: the only thing in which packed and cached forward differ."""

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """Causal attention output (T, H, K), scaled by 1/sqrt(K); query and key are rotated.

        window: how many tokens a token sees, itself included; None for all before it
        """


@contextmanager
def under_a_mask() -> Iterator[None]:
    """Attention without cuDNN, which torch prefers on Hopper and which masks must not reach.

    It plans anew for every shape, so for each 16 slots of a decode step, and has given NaN
    gradients and failed plans under masks. vLLM switches it off for the whole process.
    """
    before = backends.cudnn_sdp_enabled()
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(before)


def is_packable(query_THK: Tensor) -> bool:
    """Whether CUDA's variable-length kernel takes these heads."""
    size = query_THK.shape[-1]
    narrow = query_THK.dtype in (torch.bfloat16, torch.float16)
    return query_THK.is_cuda and narrow and size % 8 == 0 and size <= 256


class _Reorder(torch.autograd.Function):
    """x[index], with a gather as its gradient too: adding at an index is slow on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, holes: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, holes)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, holes = ctx.saved_tensors
        return grad.index_select(0, inverse).index_fill_(0, holes, 0), None, None, None


class _Padding(NamedTuple):
    """Sequences of similar length share a block (S, L); rows of all blocks end to end."""

    blocks: list[tuple[int, int]]
    into_P: Tensor
    out_T: Tensor
    holes: Tensor
    """The padded rows; their gradient is zero."""


class PackedAttention:
    """Causal attention within each of the packed sequences, which never see each other.

    What `is_packable` goes to CUDA's variable-length kernel. Otherwise sequences are padded on the
    right inside attention only: padding comes after every real query, which is causal.
    """

    # A sequence shares a block with a longest one that it fills to this part.
    FILL = 0.75

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """lengths: tokens of each sequence, in packed order, each >= 1."""
        self.lengths = [int(n) for n in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: expected numbers >= 1, at least one, got {self.lengths}")
        self.num_tokens, self.longest = sum(self.lengths), max(self.lengths)
        self.device = torch.device(device)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """See Attend."""
        if len(query_THK) != self.num_tokens:
            raise ValueError(
                f"attention: lengths sum to {self.num_tokens}, got {len(query_THK)} tokens"
            )
        qkv = (query_THK, key_TJK, value_TJK)
        if is_packable(query_THK):
            left = -1 if window is None else window - 1
            starts, longest = self._starts, self.longest
            around = (starts, starts, longest, longest)
            return varlen_attn(*qkv, *around, window_size=(left, 0), **_GROUPED)
        if min(self.lengths) == self.longest:
            return self._block(*qkv, (len(self.lengths), self.longest), window)
        blocks, into_P, out_T, holes = self._padding
        padded = [_Reorder.apply(x, into_P, out_T, holes[:0]) for x in qkv]
        sizes = [count * width for count, width in blocks]
        parts = zip(*(x.split(sizes) for x in padded), blocks, strict=True)
        out_PHK = torch.cat([self._block(*part, window) for part in parts])
        return _Reorder.apply(out_PHK, out_T, into_P, holes)

    @cached_property
    def _starts(self) -> Tensor:
        starts = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        # For the kernel of CUDA alone; from pinned memory the host does not wait for the copy.
        return starts.pin_memory().to(self.device, non_blocking=True)

    @cached_property
    def _padding(self) -> _Padding:
        blocks: list[tuple[int, int]] = []
        order = sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])
        for s in order:
            if not blocks or self.lengths[s] < self.FILL * blocks[-1][1]:
                blocks.append((0, self.lengths[s]))
            blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1])
        counts, widths = torch.tensor(blocks).T
        width_S = widths.repeat_interleave(counts)
        length_S = torch.tensor(self.lengths)
        row_P = torch.arange(int(width_S.sum()))
        first_P = (width_S.cumsum(0) - width_S).repeat_interleave(width_S)
        sequence_P = torch.tensor(order).repeat_interleave(width_S)
        last_P = length_S[sequence_P] - 1
        # Padding repeats the sequence's own last token: nothing of another gets in.
        into_P = (row_P - first_P).minimum(last_P) + (length_S.cumsum(0) - length_S)[sequence_P]
        real_P = row_P - first_P <= last_P
        out_T = torch.empty(self.num_tokens, dtype=torch.int64)
        out_T[into_P[real_P]] = row_P[real_P]
        return _Padding(blocks, *(x.to(self.device) for x in (into_P, out_T, row_P[~real_P])))

    def _block(
        self, query: Tensor, key: Tensor, value: Tensor, size: tuple[int, int], window: int | None
    ) -> Tensor:
        q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in (query, key, value))
        grouped = not q.is_cuda
        if not grouped:
            # No kernel takes grouped heads in fp32, and without one all scores are held at once.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mask = None if window is None or window >= size[1] else self._mask(size[1], window)
        with under_a_mask():
            out_SHLK = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        return out_SHLK.transpose(1, 2).flatten(0, 1)

    def _mask(self, length: int, window: int) -> Tensor:
        if (length, window) not in self._masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.device)
            self._masks[length, window] = seen.tril().triu(1 - window)
        return self._masks[length, window]
