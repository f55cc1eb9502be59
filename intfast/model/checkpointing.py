"""What of a layer is kept for the backward pass, and what is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

Checkpointing = bool | Literal["selective"]
"""False keeps everything, True the layer's input alone, "selective" also what is dear to make."""

PRODUCTS = {"aten::mm", "aten::addmm"}
ATTENTION = ("aten::_scaled_dot_product", "torch_attn::_varlen_attn")


def wrapped(layer: nn.Module, checkpointing: Checkpointing) -> Callable[..., Tensor]:
    """The layer, with gradients of the same bits in all three ways on the CPU."""
    if not checkpointing or not torch.is_grad_enabled():
        return layer
    contexts = noop_context_fn
    if checkpointing == "selective":
        # Without a norm the last product joins the stream: no gradient needs it, and nothing
        # computes it again.
        is_normed = isinstance(getattr(layer.norms[3], "weight", None), nn.Parameter)
        policy = partial(_policy, 0 if is_normed else layer.mlp.down_proj.in_features)
        contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)


def _policy(last_width: int, context: Any, operator: Any, *args: Any, **_: Any) -> CheckpointPolicy:
    name = operator._schema.name
    product = name in PRODUCTS and args[-2].shape[-1] != last_width
    if product or name.startswith(ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
