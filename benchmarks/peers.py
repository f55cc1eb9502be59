"""The other implementations, each behind one of four signatures, imported only when asked for.

    cross-entropy  (hidden_ND, weight_VD, target_N) -> sum of -log-prob over targets != IGNORE
    log-prob       (hidden_ND, weight_VD, target_N) -> (logprob_N, entropy_N or None)
    policy         (hidden_ND, weight_VD, target_N, advantage_N, old_N, weight_N) -> weighted sum
    advantages     (rewards_N, group size, tokens of each sample, weight_T) -> advantage_T

They are called with the options that their own trainers use, and differentiated by autograd.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intfast.kernels.head.plan import IGNORE

CLIP = 0.2


@dataclass(frozen=True)
class Peer:
    """One implementation and what it needs."""

    name: str
    load: Callable[[], Callable]
    """Imports the package and returns the function; may fail where the package is broken."""
    module: str = "torch"
    install: str = ""
    gpu_only: bool = False

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.install}"
        if self.gpu_only and not device.startswith("cuda"):
            return "needs a CUDA device"
        if self.name.startswith("F.") and not hasattr(F, "linear_cross_entropy"):
            return f"needs torch >= 2.13, got {torch.__version__}"
        return None


def _eager_cross_entropy() -> Callable:
    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        logits = F.linear(hidden_ND, weight_VD).float()
        return F.cross_entropy(logits, target_N, ignore_index=IGNORE, reduction="sum")

    return step


def _eager_logprob() -> Callable:
    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.linear(hidden_ND, weight_VD).float().log_softmax(-1)
        return logp.gather(1, target_N.clamp(min=0)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    return step


def _torch_linear_cross_entropy() -> Callable:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()

    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden_ND, weight_VD, target_N, ignore_index=IGNORE, reduction="sum", options=options
        )

    return step


def _liger(accum_dtype: torch.dtype | None) -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=accum_dtype)
    return lambda hidden_ND, weight_VD, target_N: loss(weight_VD, hidden_ND, target_N)


def _cut_cross_entropy() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="sum")

    return step


def _quack() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="sum")

    return step


def _trl() -> Callable:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        # TRL compacts before the call; a row without loss gets a valid target here.
        outputs = ChunkedLogProbFunction.apply(
            hidden_ND, weight_VD, None, target_N.clamp(min=0), 1.0, CHUNK, None, 1.0, ("entropy",)
        )
        return outputs[0], outputs[1]

    return step


def _verl_torch() -> Callable:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head = FusedLinearForPPO()

    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        return head(hidden_ND, weight_VD, target_N.clamp(min=0))

    return step


def _verl_triton() -> Callable:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_ND, weight_VD, target_N.clamp(min=0), 1.0, "none", None)

    return step


def _liger_grpo() -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP
    )

    def step(hidden_ND, weight_VD, target_N, advantage_N, old_N, weight_N):
        # One sequence per token run of 1,024, as a padded batch would have; the rest in one.
        length = 1024 if len(target_N) % 1024 == 0 else len(target_N)
        shape = (-1, length)
        mask_BL = (weight_N != 0).view(shape)
        value, _ = loss(
            hidden_ND.view(-1, length, hidden_ND.shape[1]), weight_VD,
            target_N.clamp(min=0).view(shape), mask_BL, advantage_N.view(shape)[:, 0],
            old_per_token_logps=old_N.view(shape),
        )  # fmt: skip
        return value * mask_BL.sum()

    return step


def _eager_advantages() -> Callable:
    # The way of trainers with groups of one size: reshape, then one gather for the tokens.
    def step(rewards_N: Tensor, group: int, num_tokens: int, weight_T: Tensor) -> Tensor:
        reward_PG = rewards_N.view(-1, group)
        spread_P1 = reward_PG.std(1, keepdim=True)
        advantage_N = ((reward_PG - reward_PG.mean(1, keepdim=True)) / (spread_P1 + 1e-4)).view(-1)
        return advantage_N[:, None].expand(-1, num_tokens).reshape(-1) * weight_T

    return step


def cross_entropy_from(load_logprob: Callable[[], Callable]) -> Callable[[], Callable]:
    """The loss of a peer that gives log-probs."""

    def load() -> Callable:
        logprob = load_logprob()

        def step(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
            value_N = logprob(hidden_ND, weight_VD, target_N)[0]
            return -torch.where(target_N != IGNORE, value_N, 0).sum()

        return step

    return load


def policy_from(load_logprob: Callable[[], Callable]) -> Callable[[], Callable]:
    """The clipped policy loss in plain torch on a peer's log-probs, as trainers write it."""

    def load() -> Callable:
        logprob = load_logprob()

        def step(hidden_ND, weight_VD, target_N, advantage_N, old_N, weight_N):
            ratio_N = (logprob(hidden_ND, weight_VD, target_N)[0] - old_N).exp()
            clipped_N = ratio_N.clamp(1 - CLIP, 1 + CLIP) * advantage_N
            return -(weight_N * torch.minimum(ratio_N * advantage_N, clipped_N)).sum()

        return step

    return load


def compiled(load: Callable[[], Callable]) -> Callable[[], Callable]:
    """The same under torch.compile."""
    return lambda: torch.compile(load())


_TRL = {"module": "trl", "install": "pip install 'trl==1.16.*'"}
_VERL = {"module": "verl", "install": "pip install 'verl==0.9.*'"}
LIGER = {"module": "liger_kernel", "install": "pip install liger-kernel", "gpu_only": True}
_CCE = {"module": "cut_cross_entropy", "install": "pip install cut-cross-entropy", "gpu_only": True}
_QUACK = {"module": "quack", "install": "pip install quack-kernels", "gpu_only": True}

# What needs no package, then the rest.
LOGPROB = (
    Peer("eager", _eager_logprob),
    Peer("torch.compile", compiled(_eager_logprob)),
    Peer("TRL", _trl, **_TRL),
    Peer("verl torch", _verl_torch, **_VERL),
    Peer("verl Triton", _verl_triton, gpu_only=True, **_VERL),
)
CROSS_ENTROPY = (
    Peer("eager", _eager_cross_entropy),
    Peer("torch.compile", compiled(_eager_cross_entropy)),
    Peer("F.linear_cross_entropy", _torch_linear_cross_entropy),
    Peer("Liger", lambda: _liger(None), **LIGER),
    Peer("Liger fp32", lambda: _liger(torch.float32), **LIGER),
    Peer("CCE", _cut_cross_entropy, **_CCE),
    Peer("QuACK", _quack, **_QUACK),
    *(
        Peer(p.name, cross_entropy_from(p.load), p.module, p.install, p.gpu_only)
        for p in LOGPROB[2:]
    ),
)
POLICY = (
    Peer("eager", policy_from(_eager_logprob)),
    Peer("torch.compile", compiled(policy_from(_eager_logprob))),
    *(Peer(p.name, policy_from(p.load), p.module, p.install, p.gpu_only) for p in LOGPROB[2:]),
    Peer("Liger GRPO", _liger_grpo, **{**LIGER, "gpu_only": False}),
)
ADVANTAGES = (
    Peer("eager", _eager_advantages),
    Peer("torch.compile", compiled(_eager_advantages)),
)
