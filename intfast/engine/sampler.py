"""Drawing tokens: temperature, top-k and top-p per row, and noise that depends on nothing else.

The noise of a draw is a hash of (seed, index of the token in its completion), so a sample does
not depend on what else is in the batch. B is rows, V the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from intfast.model import fixed

# SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Tokens of a group in the search for the drawn one.
_GROUP = 128


def _signed(number: int) -> int:
    """The int64 with the same bits."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps around; shifts are logical."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(multiplier)
    return x ^ ((x >> 31) & (2**33 - 1))


def logits(hidden_BD: Tensor, weight_VD: Tensor, row_sizes: tuple[int, ...] = ()) -> Tensor:
    """Logits (B, V) in fp32: rounded to bf16 they would cost 1e-2 nat."""
    if hidden_BD.is_cuda and hidden_BD.dtype != torch.float32:
        return torch.mm(hidden_BD, weight_VD.T, out_dtype=torch.float32)
    return fixed.linear(hidden_BD.float(), weight_VD.float(), None, row_sizes)


def stream(seed_B: Tensor) -> Tensor:
    """The state from which the noise of a seed starts, int64; seeds are in [0, 2**63)."""
    return _mix(seed_B + _signed(_GOLDEN))


def uniform(stream_B: Tensor, index_B: Tensor) -> Tensor:
    """Noise in [0, 1), fp64, for token `index` of a completion (counted from 0)."""
    bits = _mix(stream_B + (index_B + 1) * _signed(_GOLDEN))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def first(logit_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(logits, tokens), both (B, count): the first tokens by logit, equal ones by id.

    What a stable sort begins with. A sort of the vocabulary costs more than a small model.
    """
    last = logit_BV.shape[1] - 1
    if count > last:
        return logit_BV.sort(dim=-1, descending=True, stable=True)
    # fp32 in the order of its bits, above the id: keys without equals. -0.0 becomes 0.0.
    bits = (logit_BV + 0.0).view(torch.int32)
    key_BV = torch.where(bits < 0, bits ^ (2**31 - 1), bits).long() << 32
    key_BV += torch.arange(last, -1, -1, device=logit_BV.device)
    token = last - (key_BV.topk(count).values & (2**32 - 1))
    return logit_BV.gather(1, token), token


def truncate(logit_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, most: int = 0) -> Tensor:
    """Logits with -inf for every token outside of top-k, then outside of top-p.

    Tokens are ordered by logit, equal ones by id. top-k keeps the first k (0: all). top-p keeps
    the shortest beginning of those whose share of their probability is >= p (1: all).
    most: the largest top-k where every row has one, else 0.
    """
    ordered, token_BV = first(logit_BV, most or logit_BV.shape[1])
    rank = torch.arange(ordered.shape[1], device=logit_BV.device)
    keep = (rank < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    prob = ordered.double().masked_fill_(~keep, -math.inf).softmax(-1)
    before = prob.cumsum(-1) - prob
    # Rounding must not drop a token where nothing is to be dropped.
    keep &= (before < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    keep = torch.zeros_like(logit_BV, dtype=torch.bool).scatter_(1, token_BV, keep)
    return logit_BV.masked_fill(~keep, -math.inf)


def draw(
    logit_BV: Tensor,
    uniform_B: Tensor,
    temperature_B: Tensor,
    limits_B: tuple[Tensor, Tensor, int] | None,
    any_greedy: bool,
) -> tuple[Tensor, Tensor]:
    """(token_B int64, logprob_B fp32): one token per row, and its log-prob as it was drawn.

    logit_BV     (B, V) fp32
    uniform_B    (B,) fp64 in [0, 1)
    temperature  (B,) fp32; 0 takes the most probable token, whose log-prob is then 0
    limits_B     (top_k, top_p) of each row, and `truncate`'s `most`; None when no row has any
    any_greedy   whether any temperature is 0
    """
    warmth_B1 = temperature_B.masked_fill(temperature_B == 0, 1.0)[:, None]
    scaled_BV = (logit_BV - logit_BV.amax(-1, keepdim=True)).div_(warmth_B1)
    if limits_B is not None:
        scaled_BV = truncate(scaled_BV, *limits_B)
    weight_BV = scaled_BV.exp_()
    token, total_B1 = _pick(weight_BV, uniform_B[:, None])
    if any_greedy:
        greedy = temperature_B[:, None] == 0
        token = torch.where(greedy, logit_BV.argmax(-1, keepdim=True), token)
    # Torch's fp32 log_softmax makes every log-prob of a large vocabulary too high by up to
    # 1e-5 nat, which sequences add up.
    logprob = (weight_BV.gather(1, token).double().log() - total_B1.log()).float()
    if any_greedy:
        logprob = logprob.masked_fill(greedy & logprob.isfinite(), 0.0)
    return token[:, 0], logprob[:, 0]


def _pick(weight_BV: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor]:
    """(token_B1, total_B1): the token at which the sum of weights passes a share of their total.

    Large vocabularies are searched by the sums of groups first: fp64 sums of all tokens would take
    several times as long.
    """
    vocabulary = weight_BV.shape[1]
    if vocabulary <= _GROUP:
        token, _, cdf_BV = _search(weight_BV, share_B1)
        return token, cdf_BV[:, -1:]
    end = vocabulary // _GROUP * _GROUP
    sums = weight_BV[:, :end].unflatten(1, (-1, _GROUP)).sum(-1)
    sums = torch.cat((sums, weight_BV[:, end:].sum(-1, keepdim=True)), -1)
    group, target, cdf = _search(sums, share_B1)
    # The share of the group that lies below the target.
    share_B1 = 1 - (cdf.gather(1, group) - target) / sums.gather(1, group)
    token = group * _GROUP + torch.arange(_GROUP, device=group.device)
    weight = weight_BV.gather(1, token.clamp(max=vocabulary - 1))
    weight.masked_fill_(token >= vocabulary, 0.0)
    index, _, _ = _search(weight, share_B1.clamp_(0, 1 - 2**-53))
    return (group * _GROUP + index).clamp_(max=vocabulary - 1), cdf[:, -1:]


def _search(weight_BN: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index_B1, target_B1, cdf_BN): where the fp64 sum of weights passes a share of the total."""
    # fp64: an fp32 cdf over many entries loses the tail.
    cdf_BN = weight_BN.cumsum(-1, dtype=torch.float64)
    target = share_B1 * cdf_BN[:, -1:]
    # The first entry above a target below the total is never one of weight 0. NaN weights give an
    # index past the end; the NaN log-prob is what the engine reports.
    index = torch.searchsorted(cdf_BN, target, right=True).clamp_(max=weight_BN.shape[1] - 1)
    return index, target, cdf_BN
