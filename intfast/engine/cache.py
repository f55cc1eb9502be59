"""The key/value cache of the native engine, and attention that reads and writes it.

A row belongs to one sample; slot t of a row holds position t, so the slots that one step reads
are one contiguous slice per row and key/value head. R is rows, W slots per row, B rows of a step,
L slots read in a step, G query heads per key/value head.

On the CPU in fp32 nothing here depends on what else is in the batch, to the last bit: calls have
few shapes (model/fixed.py), and invariance.py finds those in which a row gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from intfast.model import fixed
from intfast.model.attention import under_a_mask
from intfast.model.decoder import Architecture, PackedAttention
from intfast.model.fixed import BLOCK, Shapes


def round_up(number: int, block: int) -> int:
    """The smallest multiple of `block` that is >= number."""
    return -(-number // block) * block


def bytes_per_slot(config: Architecture, dtype: torch.dtype) -> int:
    """Bytes that one position of one sample takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of all layers for `num_rows` samples of at most `width` tokens."""

    def __init__(self, config: Architecture, num_rows: int, width: int, storage: Tensor) -> None:
        """storage: flat, at least num_rows * width slots, finite everywhere."""
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        shape = (config.num_layers, 2, num_rows, self.kv_heads, width, self.head_dim)
        self.slots = storage[: math.prod(shape)].view(shape)
        self.num_rows, self.width = num_rows, width
        # Per layer and kind: (R * J * W, K) to write and (R * J, W, K) to read.
        self.write = [list(layer) for layer in self.slots.flatten(2, 4)]
        self.read = [list(layer) for layer in self.slots.flatten(2, 3)]

    def copy(self, source: Sequence[int], target: Sequence[int], num_slots: int) -> None:
        """Copy the first slots of some rows to others; no target may be a source."""
        device = self.slots.device
        source_R = torch.tensor(source, device=device)
        target_R = torch.tensor(target, device=device)
        for layer in self.slots[..., :num_slots, :]:
            for kind in layer:
                kind.index_copy_(0, target_R, kind.index_select(0, source_R))


class Prefill:
    """`attend` for prompts of one padded width: attention within each, keys and values kept.

    Tokens are laid out as (prompts, width); the padding comes after every real token, which
    never sees it, and its slots are overwritten before they are read.
    """

    def __init__(self, cache: KVCache, width: int, rows: list[int], prompts: list[int]) -> None:
        """rows: the cache rows to fill; prompts: which prompt each of them gets."""
        device = cache.slots.device
        self.cache, self.width = cache, width
        self.num_prompts = max(prompts) + 1
        self.rows = torch.tensor(rows, device=device)
        self.prompts = torch.tensor(prompts, device=device)
        self.inside = PackedAttention([width] * self.num_prompts, device)

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """See decoder.Attend."""
        shape = (self.num_prompts, self.width)
        for kind, new in enumerate((key_TJK, value_TJK)):
            new = new.unflatten(0, shape).transpose(1, 2).index_select(0, self.prompts)
            slots = self.cache.slots[layer, kind, :, :, : self.width]
            slots.index_copy_(0, self.rows, new)
        return self.inside(layer, query_THK, key_TJK, value_TJK, window)


class Step:
    """`attend` for one new token in each of the first rows of the cache."""

    def __init__(self, cache: KVCache, position_B: Tensor, last: int, shapes: Shapes) -> None:
        """position_B: where each row's token stands; last: the largest of them."""
        self.cache, self.num_slots = cache, max(BLOCK, round_up(last + 1, shapes.slots))
        self.shapes = shapes
        self.position_B = position_B
        heads = torch.arange(len(position_B) * cache.kv_heads, device=position_B.device)
        self.slot = heads * cache.width + position_B.repeat_interleave(cache.kv_heads)
        self.scale = cache.head_dim**-0.5
        self.exact = cache.slots.dtype in (torch.float32, torch.float64)
        self._masks: dict[int | None, Tensor] = {}

    def __call__(
        self, layer: int, query_THK: Tensor, key_TJK: Tensor, value_TJK: Tensor, window: int | None
    ) -> Tensor:
        """See decoder.Attend. Tokens beyond the cache's rows are padding: they get zeros."""
        cache, num_rows = self.cache, len(self.position_B)
        batch = num_rows * cache.kv_heads
        new = (key_TJK, value_TJK)
        for slots, x in zip(cache.write[layer], new, strict=True):
            slots.index_copy_(0, self.slot, x[:num_rows].reshape(batch, -1))
        query = query_THK[:num_rows].reshape(batch, -1, cache.head_dim)
        key, value = (x[:batch, : self.num_slots] for x in cache.read[layer])
        attention = self._exact if self.exact else self._fused
        out_BHK = attention(query, key, value, self._mask(window)).view(
            num_rows, -1, cache.head_dim
        )
        padding = len(query_THK) - num_rows
        return F.pad(out_BHK, (0, 0, 0, 0, 0, padding)) if padding else out_BHK

    def _exact(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        operands, shapes = (query, key, value, mask), self.shapes
        return fixed.attention_of_rows(
            operands, self.cache.kv_heads, self.scale, shapes.chunk, shapes.rows
        )

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        # bf16 scores would cost 1e-2 nat: this kernel keeps them in fp32.
        with under_a_mask():
            return F.scaled_dot_product_attention(
                query[:, None], key[:, None], value[:, None], mask[:, None]
            )

    def _mask(self, window: int | None) -> Tensor:
        """(B * J, 1, L): 0 for the slots that a row sees, -inf for the others."""
        if window not in self._masks:
            slot_L = torch.arange(self.num_slots, device=self.position_B.device)
            position = self.position_B[:, None]
            unseen = slot_L > position
            if window is not None:
                unseen |= slot_L <= position - window
            mask_BL = torch.zeros(unseen.shape, dtype=self.cache.slots.dtype, device=slot_L.device)
            mask_BL.masked_fill_(unseen, -math.inf)
            self._masks[window] = mask_BL.repeat_interleave(self.cache.kv_heads, 0)[:, None]
        return self._masks[window]
