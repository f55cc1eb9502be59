"""The trainer's forward over packed batches: the one that the losses differentiate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intfast import loss
from intfast.batch import Batch, Packed
from intfast.model.decoder import Decoder, PackedAttention

LossOf = Callable[[Tensor, Batch, int], tuple[Tensor, loss.Stats]]
"""(hidden_ND, batch, its place in the update) -> (loss sum, statistics)."""


def hidden_states(decoder: Decoder, batch: Batch, device: torch.device) -> Tensor:
    """hidden_ND of the rows of a packed batch that carry loss; the last layer skips the others."""
    attend = PackedAttention(batch.lengths, device)
    return decoder(batch.token_ids_T, batch.position_ids_T, attend, last_only=batch.rows_N)


@torch.no_grad()
def logprobs(
    decoder: Decoder, packed: Packed, device: torch.device, temperature: float
) -> list[Tensor]:
    """logprob_N (fp32) of the targets of every micro-batch, without gradient."""
    found = []
    for batch in packed.batches:
        batch = batch.to(device)
        hidden_ND = hidden_states(decoder, batch, device)
        found.append(loss.row_logprob(hidden_ND, decoder.head_weight_VD, batch, temperature))
    return found
