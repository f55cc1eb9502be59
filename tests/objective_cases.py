"""Every objective, streams that reach all of its branches, and its loss as its paper states it."""

import torch

from intfast.kernels.objectives import (
    Cispo,
    Corrected,
    CrossEntropy,
    Either,
    EntropyBonus,
    Kl,
    PolicyClip,
    Reinforce,
    ScaledK3,
    SequenceClip,
    Streams,
    Sum,
    TrustRegion,
)

SEQUENCES = 3


def streams_for(logprob_T, seed=1):
    made = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(len(logprob_T), generator=made).to(logprob_T)

    T = len(logprob_T)
    sequence_T = torch.arange(T, device=logprob_T.device) * SEQUENCES // T
    sampler_T = logprob_T + 0.5 * noise()
    sampler_T[2] = float("nan")
    goal_T = torch.where(
        torch.arange(T, device=logprob_T.device) % 3 == 1, logprob_T + 1.5, torch.nan
    )
    return Streams(
        weight_T=noise().abs() + 0.1,
        advantage_T=noise(),
        old_T=logprob_T + 0.4 * noise(),
        reference_T=logprob_T + 0.4 * noise(),
        sampler_T=sampler_T,
        sequence_T=sequence_T,
        goal_T=goal_T,
    )


def plain(objective, logprob, entropy, s):
    """The loss per token as its paper states it; constants are detached, autograd does the rest."""
    if isinstance(objective, Sum):
        return sum(plain(part, logprob, entropy, s) for part in objective.parts)
    if isinstance(objective, Either):
        gap = logprob - s.goal_T.nan_to_num()
        return torch.where(s.goal_T.isnan(), plain(objective.inner, logprob, entropy, s), gap**2)
    if isinstance(objective, CrossEntropy):
        return -logprob
    if isinstance(objective, EntropyBonus):
        return -objective.coefficient * entropy
    if isinstance(objective, Corrected):
        log_weight = torch.where(s.sampler_T.isnan(), 0, s.old_T - s.sampler_T)
        if objective.level != "token":
            member = torch.nn.functional.one_hot(s.sequence_T, SEQUENCES).to(logprob)
            member = member * (s.weight_T != 0)[:, None]
            total = log_weight @ member
            if objective.level == "sequence-mean":
                total = total / member.sum(0)
            log_weight = total[s.sequence_T]
        weight = log_weight.exp()
        if objective.mode == "mask":
            weight = weight * ((weight >= objective.low) & (weight <= objective.high))
        else:
            weight = weight.clamp(objective.low, objective.high)
        return weight * plain(objective.inner, logprob, entropy, s)
    if isinstance(objective, Kl):
        d = s.reference_T - logprob
        return (
            objective.coefficient
            * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[objective.kind]
        )
    if isinstance(objective, ScaledK3):
        d = s.reference_T - logprob
        return objective.coefficient * (logprob - s.old_T).exp() * (d.exp() - d - 1)
    A = s.advantage_T
    if isinstance(objective, Reinforce):
        return -A * logprob
    ratio = (logprob - s.old_T).exp()
    if isinstance(objective, TrustRegion):
        moved = logprob.exp() - s.old_T.exp()
        kept = torch.where(A > 0, moved <= objective.high, moved >= -objective.low)
        return -torch.where(kept, ratio * A, 0) + objective.kl * ratio.log() ** 2
    if isinstance(objective, Cispo):
        return -ratio.detach().clamp(objective.low, objective.high) * A * logprob
    if isinstance(objective, SequenceClip):
        member = torch.nn.functional.one_hot(s.sequence_T, SEQUENCES).to(logprob)
        member = member * (s.weight_T != 0)[:, None]
        ratio = (((logprob - s.old_T) @ member) / member.sum(0)).exp()[s.sequence_T]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - objective.low, 1 + objective.high) * A)
    if getattr(objective, "dual", None) is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, objective.dual * A), surrogate)
    return -surrogate


OBJECTIVES = [
    CrossEntropy(),
    Reinforce(),
    PolicyClip(0.2, 0.3),
    PolicyClip(0.1, 0.28, dual=1.4),
    Cispo(0.7, 1.2),
    Kl(0.3, "k1"),
    Kl(0.3, "k2"),
    Kl(0.3, "k3"),
    EntropyBonus(0.2),
    Corrected(PolicyClip(), high=1.3, low=0.8),
    Corrected(PolicyClip(), high=1.3, low=0.8, mode="mask"),
    Corrected(Reinforce(), high=4.0, level="sequence", num_sequences=SEQUENCES),
    Corrected(Reinforce(), high=1.1, level="sequence-mean", num_sequences=SEQUENCES),
    Sum((PolicyClip(), Kl(0.1, "k3"), EntropyBonus(0.05))),
    SequenceClip(SEQUENCES, 0.1, 0.1),
    SequenceClip(SEQUENCES, 0.02, 0.02, dual=1.05),
    ScaledK3(0.3),
    TrustRegion(0.05, 0.05, 0.1),
    Either(Sum((PolicyClip(), Kl(0.1, "k3"), EntropyBonus(0.05)))),
]
