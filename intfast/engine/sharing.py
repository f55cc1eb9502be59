"""One copy of the weights: the decoder's parameters are the tensors that another module reads.

The other module is the inference engine's model, which has loaded the checkpoint. Its parameters
have the names and the fused shapes of ours; only its vocabulary has rows more, which stay unused.
An update in place, as every step of the optimizer is, is then seen by the engine at once.

What breaks this is replacing storage, on either side: `.to(another dtype)`, assigning `p.data` or
a new parameter, moving or freeing the engine's tensors. `Shared.update` looks for that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from intfast.model.decoder import Architecture, Decoder
from intfast.model.layer_ops import Kernels
from intfast.model.shards import VOCABULARY, Shards


class Shared:
    """Nothing to copy: checks that both sides still have the same, unmoved storage."""

    def __init__(self, decoder: Decoder, module: nn.Module) -> None:
        self._decoder, self._module = decoder, module
        self._addresses = {name: p.data_ptr() for name, p in decoder.named_parameters()}
        self.check()

    def update(self) -> None:
        """An update in place is there already."""
        self.check()

    def check(self) -> None:
        """Raises RuntimeError naming the parameters that are no longer shared."""
        broken = [
            name
            for name, ours, theirs in _pairs(self._decoder, self._module)
            if not ours.data_ptr() == theirs.data_ptr() == self._addresses[name] != 0
        ]
        if broken:
            raise RuntimeError(
                f"{len(broken)} parameters no longer share their storage with the engine, first "
                f"{', '.join(broken[:3])}; something replaced them instead of writing in place "
                "(.to(), .data =, a new Parameter), and the engine would generate with other "
                "weights; start the command again to continue from the last checkpoint"
            )


class Copied:
    """Two copies of the weights: every update is written into the engine's tensors."""

    def __init__(self, decoder: Decoder, module: nn.Module) -> None:
        self._decoder, self._module = decoder, module
        _check(decoder, module, same_dtype=False)
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One fused copy, converting the dtype where it differs."""
        pairs = list(_pairs(self._decoder, self._module))
        torch._foreach_copy_([theirs for *_, theirs in pairs], [ours.data for _, ours, _ in pairs])

    def check(self) -> None:
        """Nothing to break: tensors are looked up at every update."""


Link = Shared | Copied
"""How an update of the decoder reaches the engine: `update` follows each, with an idle device."""


def adopt(
    module: nn.Module,
    config: Architecture,
    dtype: torch.dtype,
    kernels: Kernels = "torch",
    own: Shards | None = None,
) -> Decoder:
    """A decoder whose parameters are `module`'s tensors; takes no memory for weights.

    own: what this rank holds of it, where several hold the model together
    Raises ValueError naming the tensor that cannot be shared as it is.
    """
    decoder = Decoder(config, dtype, "meta", kernels, own)
    _check(decoder, module, same_dtype=True)
    for name, _, theirs in list(_pairs(decoder, module)):
        owner, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(theirs))
    inverse, _ = config.frequencies()
    decoder._inverse_frequency = inverse.to(decoder.head_weight_VD.device)
    return decoder


def _pairs(decoder: Decoder, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, our parameter, its rows of theirs), for the tensors that the modules have now."""
    found = dict(module.named_parameters(remove_duplicate=False))
    for name, ours in decoder.named_parameters():
        theirs = found[name].data
        yield name, ours, theirs[: len(ours)] if name in VOCABULARY else theirs


def _check(decoder: Decoder, module: nn.Module, same_dtype: bool) -> None:
    """Raise ValueError unless each parameter has its tensor in `module`, and none is left over."""
    found = dict(module.named_parameters(remove_duplicate=False))
    expected = dict(decoder.named_parameters())
    second_head = {"lm_head.weight"} if decoder.config.tied else set()
    faults = [f"{name}: missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name}: unknown" for name in sorted(found.keys() - expected.keys() - second_head)]
    for name in second_head & found.keys():
        if found[name].data_ptr() != found[VOCABULARY[0]].data_ptr():
            faults.append(f"{name}: not tied to the embedding")
    for name, ours, theirs in _pairs(decoder, module) if not faults else ():
        if theirs.shape != ours.shape:
            faults.append(f"{name}: shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif same_dtype and theirs.dtype != ours.dtype:
            faults.append(f"{name}: {theirs.dtype}, expected {ours.dtype}")
        elif not theirs.is_contiguous():
            faults.append(f"{name}: not contiguous")
    if faults:
        raise ValueError(
            f"the engine's weights cannot be shared: {'; '.join(faults[:5])} ({len(faults)} in "
            'all); use rollout.engine = "vllm_copy" where only the dtype differs, else "native"'
        )
