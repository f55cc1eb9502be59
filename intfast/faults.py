"""Where an update first met a number that is not finite: found out only after it was refused."""

from __future__ import annotations

import torch

from intfast import forward
from intfast.batch import Packed
from intfast.model.optim import Optimizer
from intfast.run import Run


def first_non_finite(
    run: Run,
    optimizer: Optimizer,
    packed: Packed,
    divisor: float,
    loss_of: forward.LossOf,
) -> str:
    """The stage, the micro-batch and its first bad tensor, by computing the update once more.

    The update itself looks at one number, the gradient norm; this runs only when that is not
    finite, changes no weight, and leaves no gradient.
    """
    stage = run.holds.removesuffix(" in training")
    for index, batch in enumerate(packed.batches):
        batch = batch.to(run.device)
        hidden_ND = forward.hidden_states(run.decoder, batch, run.device)
        loss_sum, _ = loss_of(hidden_ND, batch, index)
        bad = "the hidden states" if not _finite(hidden_ND) else ""
        bad = bad or ("the loss" if not _finite(loss_sum) else "")
        if not bad:
            (loss_sum / divisor).backward()
            name = optimizer.non_finite_gradient()
            bad = f"the gradient of {name}" if name else ""
            optimizer.zero_grad()
        if bad:
            return f"{stage}: {bad} of micro-batch {index + 1} of {len(packed.batches)}"
    return (
        f"{stage}: nothing when the {len(packed.batches)} micro-batches were computed again one by "
        "one: their sum overflows, or the hardware is at fault"
    )


def _finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())
