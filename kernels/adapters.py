"""The ops inside other trainers. Each function names the hook it is made for; none is applied by
importing this module, and no other trainer is imported before one of its functions runs.

    Hugging Face Trainer   fuse_causal_lm(model)
    TRL GRPOTrainer        class Trainer(GRPOTrainer): _compute_loss = trl_compute_loss
    verl policy losses     register_policy_loss("intfast")(verl_policy_loss)
    verl fused head        in verl.utils.kernel.linear_cross_entropy:
                           linear_cross_entropy = verl_logprob
    torchtitan             loss=titan_loss().Config() in a trainer config
    prime-rl               [trainer.loss] type = "custom",
                           import_path = "intfast.kernels.adapters.prime_rl_loss"

Versions they were written against: transformers 5.23, TRL 1.16, verl 0.9.1, torchtitan 0.3,
prime-rl 0.8. Heads sharded over devices are refused: the ops need the whole weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .head.plan import IGNORE
from .linear_logprob import linear_logprob
from .linear_objective import linear_objective
from .objectives import (
    Cispo,
    Kl,
    Objective,
    PolicyClip,
    ScaledK3,
    SequenceClip,
    Streams,
    Sum,
    TrustRegion,
)
from .span_cross_entropy import span_cross_entropy


def token_loss(objective: Objective, logprob_T: Tensor, streams: Streams) -> Tensor:
    """(T,) losses of an objective on log-probs that another head made; differentiable, unweighted.

    0 where the weight is 0. For trainers that hand over log-probs; where hidden states exist,
    `linear_objective` costs less.
    """
    live_T = streams.weight_T != 0
    # where() and not a product: what a dead token holds must reach nothing
    logprob_T = torch.where(live_T, logprob_T, 0)
    terms = objective(logprob_T.detach(), None, streams)
    slope_T = torch.where(live_T, terms.dlogprob_T, 0)
    return torch.where(live_T, terms.loss_T, 0) + slope_T * (logprob_T - logprob_T.detach())


# Hugging Face Trainer ---------------------------------------------------------------------------


def fuse_causal_lm(model: nn.Module) -> nn.Module:
    """Give a transformers causal LM a forward that makes its loss without logits; returns it.

    Without labels the forward is the old one. With labels it returns the loss alone (logits None),
    so evaluation that reads logits needs `prediction_loss_only=True`. The model's own logits and
    loss are compared with ours on a few tokens, once, here.

    raises  ValueError where they differ or the head has a bias
    """
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("fuse_causal_lm: expected a head without bias; do not fuse")
    softcap = getattr(model.config, "final_logit_softcapping", None)
    _expect_same_loss(model, softcap)
    stock_forward = model.forward

    @functools.wraps(stock_forward)
    def forward(*args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if labels is None and shift_labels is None:
            return stock_forward(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        kwargs.pop("return_dict", None)
        output = model.base_model(*args, **{**kwargs, "use_cache": False})
        # Looked up per call: wrappers may have replaced it.
        weight_VD = model.get_output_embeddings().weight
        loss = _labelled_loss(output.last_hidden_state, weight_VD, shift_labels, softcap=softcap)
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != IGNORE).sum()
        return CausalLMOutputWithPast(loss=loss / num_items_in_batch, logits=None)

    model.forward = forward
    return model


@torch.no_grad()
def _expect_same_loss(model: nn.Module, softcap: float | None) -> None:
    """ValueError unless the model's loss is the cross-entropy of its head on its hidden states."""
    weight_VD = model.get_output_embeddings().weight
    if weight_VD.is_meta:
        raise ValueError("fuse_causal_lm: expected weights, got a model on 'meta'; load them first")
    ids_BL = torch.arange(16, device=weight_VD.device).view(2, 8) % len(weight_VD)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        own = model(input_ids=ids_BL, labels=ids_BL)
        output = model.base_model(input_ids=ids_BL, use_cache=False)
        logit_BLV = output.last_hidden_state @ weight_VD.T
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"fuse_causal_lm: {type(model).__name__} does not give hidden states and a loss for "
            f"input_ids and labels alone ({type(error).__name__}: {error}); do not fuse"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if softcap:
        logit_BLV = softcap * torch.tanh(logit_BLV / softcap)
    size = own.logits.float().norm()
    apart = ((own.logits.float() - logit_BLV.float()).norm() / size).item()
    # Two products of the same factors: of TF32 in fp32, and of a rounding of each logit.
    allowed = 2e-3 if weight_VD.dtype == torch.float32 else 2e-2
    if not apart <= allowed:
        raise ValueError(
            f"fuse_causal_lm: expected logits that are hidden states times the head, got a "
            f"difference of {apart:.1%} in {type(model).__name__}: it scales its logits, or "
            "changes its hidden states, after the base model (logit_scale, logits_scaling, "
            "lm_head_multiplier); do not fuse"
        )
    found = nn.functional.cross_entropy(
        own.logits[:, :-1].float().flatten(0, 1), ids_BL[:, 1:].flatten()
    )
    if not abs(own.loss.item() - found.item()) <= 1e-5 * max(1.0, found.item()):
        raise ValueError(
            f"fuse_causal_lm: expected a loss of {found.item():.5f}, the cross-entropy of its "
            f"logits, got {own.loss.item():.5f} from {type(model).__name__}: it adds to it, as a "
            "router loss does (output_router_logits=False switches that off); do not fuse"
        )


def _labelled_loss(hidden_BLD: Tensor, weight_VD: Tensor, label_BL: Tensor, **options) -> Tensor:
    """Sum of the cross-entropy where a label is not IGNORE; waits for the device once."""
    hidden_TD, weight_VD = _head_inputs(hidden_BLD, weight_VD)
    target_T = label_BL.reshape(-1).to(hidden_TD.device)
    live_T = target_T != IGNORE
    return span_cross_entropy(
        hidden_TD, weight_VD, target_T, live_T.float(), rows_R=live_T.nonzero()[:, 0], **options
    )


def _head_inputs(hidden_BLD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Flat hidden states and the weight, in the type that autocast would give the head."""
    if hasattr(weight_VD, "placements"):
        raise ValueError("head: expected a whole weight, got a DTensor; keep the head unsharded")
    hidden_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
    device, dtype = hidden_TD.device.type, hidden_TD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return hidden_TD.to(dtype), weight_VD.to(dtype)


# TRL --------------------------------------------------------------------------------------------


def trl_compute_loss(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """`GRPOTrainer._compute_loss` by `linear_objective`: 6TDV and no logits. Logs the entropy only.

    inputs  TRL's own; loss types grpo, bnpo, dr_grpo, dapo, cispo and luspo
    raises  ValueError on an option of TRL that has no counterpart here
    """
    _check_trl(trainer)
    answer_BL, mask_BL = inputs["completion_ids"], inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], answer_BL], 1)
    attention = torch.cat([inputs["prompt_mask"], mask_BL], 1)
    mask_BL = mask_BL * inputs.get("tool_mask", 1)
    bare = trainer.accelerator.unwrap_model(model)
    output = bare.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
    hidden_BLD = output.last_hidden_state[:, -answer_BL.shape[1] - 1 : -1]
    hidden_TD, weight_VD = _head_inputs(hidden_BLD, bare.get_output_embeddings().weight)
    advantage_BL = inputs["advantages"].reshape(len(answer_BL), -1)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        # The clipped objectives are homogeneous in the advantage; the KL term is not corrected.
        advantage_BL = advantage_BL * inputs["importance_sampling_ratio"]
    if trainer.importance_sampling_level == "sequence" and advantage_BL.shape[1] != 1:
        raise ValueError(
            "trl_compute_loss: expected one advantage and one correction per sequence at sequence "
            f"level, got {tuple(advantage_BL.shape)}; use a sequence mode of the correction"
        )
    old_BL, reference_BL = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
    sequence_BL = torch.arange(len(answer_BL), device=answer_BL.device)[:, None]
    streams = Streams(
        weight_T=(mask_BL * _trl_weights(trainer, mask_BL, inputs)).reshape(-1),
        advantage_T=advantage_BL.expand(answer_BL.shape).reshape(-1),
        old_T=None if old_BL is None else old_BL.reshape(-1),
        reference_T=None if reference_BL is None else reference_BL.reshape(-1),
        sequence_T=sequence_BL.expand(answer_BL.shape).reshape(-1),
    )
    output = linear_objective(
        hidden_TD, weight_VD, answer_BL.reshape(-1), _trl_objective(trainer, len(answer_BL)),
        streams, rows_R=mask_BL.reshape(-1).nonzero()[:, 0], temperature=trainer.temperature,
    )  # fmt: skip
    mode = "train" if trainer.model.training else "eval"
    entropy = output.entropy_T.sum() / mask_BL.sum().clamp(min=1)
    trainer._metrics[mode]["entropy"].append(trainer.accelerator.gather(entropy).nanmean().item())
    return output.loss


def _check_trl(trainer: Any) -> None:
    sequence = trainer.importance_sampling_level == "sequence"
    blockers = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type in ("sapo", "vespo"),
        "loss_type='cispo' at sequence level": sequence and trainer.loss_type == "cispo",
        f"delta={trainer.args.delta} at sequence level": sequence
        and trainer.args.delta is not None,
        f"use_bias_correction_kl=True with beta={trainer.beta} at sequence level": sequence
        and trainer.beta != 0 and trainer.args.use_bias_correction_kl,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "an entropy bonus": trainer._entropy_bonus_enabled,
        "a router loss": trainer.aux_loss_enabled,
    }  # fmt: skip
    blocking = [reason for reason, blocks in blockers.items() if blocks]
    if blocking:
        raise ValueError(f"trl_compute_loss: unsupported: {', '.join(blocking)}; switch it off")


def _trl_objective(trainer: Any, num_sequences: int) -> Objective:
    low, high = trainer.epsilon_low, trainer.epsilon_high
    if trainer.loss_type == "cispo":
        # TRL bounds the ratio itself, and only from above.
        policy = Cispo(0.0, high)
    elif trainer.importance_sampling_level == "sequence":
        policy = SequenceClip(num_sequences, low, high)
    else:
        policy = PolicyClip(low, high, trainer.args.delta)
    if trainer.beta == 0:
        return policy
    corrected = trainer.args.use_bias_correction_kl
    return Sum((policy, ScaledK3(trainer.beta) if corrected else Kl(trainer.beta, "k3")))


def _trl_weights(trainer: Any, mask_BL: Tensor, inputs: dict[str, Tensor]) -> Tensor | float:
    """What TRL's loss types multiply each token by; a loss type is nothing else."""
    training, kind, num_sequences = trainer.model.training, trainer.loss_type, len(mask_BL)
    steps = trainer.current_gradient_accumulation_steps if training else 1.0
    if kind in ("dapo", "cispo"):
        total = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return 1 / (total * steps / trainer.args.steps_per_generation if training else total)
    if kind == "grpo":
        return 1 / (mask_BL.sum(1, keepdim=True).clamp(min=1.0) * num_sequences * steps)
    if kind == "bnpo":
        return 1 / (mask_BL.sum().clamp(min=1.0) * steps)
    if kind == "dr_grpo":
        return 1 / (num_sequences * trainer.max_completion_length * steps)
    assert kind == "luspo", kind
    return 1 / (num_sequences * steps)


# verl -------------------------------------------------------------------------------------------


def verl_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clip with dual clip behind verl's policy-loss signature; all tensors (B, L)."""
    from verl.trainer.ppo.core_algos import agg_loss

    low, high = config.clip_ratio_low, config.clip_ratio_high
    objective = PolicyClip(
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
        config.get("clip_ratio_c", 3.0),
    )
    live_T = response_mask.reshape(-1) != 0
    flat = [value.reshape(-1) for value in (response_mask, advantages, old_log_prob)]
    loss_BL = token_loss(objective, log_prob.reshape(-1), Streams(*flat)).view_as(log_prob)
    if rollout_is_weights is not None:
        loss_BL = loss_BL * rollout_is_weights
    loss = agg_loss(loss_BL, response_mask, loss_agg_mode, **config.global_batch_info)
    with torch.no_grad():
        change_T = (log_prob - old_log_prob).reshape(-1)[live_T]
        ratio_T, advantage_T = change_T.exp(), flat[1][live_T]
        clipped_T = torch.where(
            advantage_T > 0, ratio_T > 1 + objective.high, ratio_T < 1 - objective.low
        ) & (advantage_T != 0)
    return loss, {
        "actor/pg_clipfrac": clipped_T.float().mean().item(),
        "actor/ppo_kl": -change_T.mean().item(),
    }


def verl_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), (tokens,) each, behind the signature of verl's fused head."""
    if reduction != "none" or dist_process_group is not None:
        raise ValueError(
            f"verl_logprob: expected reduction 'none' and no process group, got {reduction!r} and "
            f"{dist_process_group}; use verl's own head"
        )
    hidden_TD, weight_VD = _head_inputs(hidden, weight)
    return linear_logprob(
        hidden_TD, weight_VD, labels.reshape(-1).long(), temperature=temperature,
        entropy="gradient",
    )  # fmt: skip


# torchtitan -------------------------------------------------------------------------------------


@functools.cache
def titan_loss() -> type:
    """A torchtitan loss on hidden states: the sum over labels divided by the global token count.

    A subclass of ChunkedLossWrapper, because that is how torchtitan knows to leave out the head.
    """
    from torchtitan.components.loss import ChunkedLossWrapper

    class SpanLoss(ChunkedLossWrapper):
        @dataclass(kw_only=True, slots=True)
        class Config(ChunkedLossWrapper.Config):
            pass

        def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
            if loss_inputs:
                raise ValueError(f"titan_loss: expected no other inputs, got {sorted(loss_inputs)}")
            loss = _labelled_loss(pred, self.lm_head.weight, labels)
            return loss if global_valid_tokens is None else loss / global_valid_tokens, {}

    return SpanLoss


# prime-rl ---------------------------------------------------------------------------------------


def prime_rl_loss(
    inputs: Any,
    *,
    low: float = 0.2,
    high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> Any:
    """prime-rl's custom loss: `LossInputs` of a sample to `LossOutputs`, a sum over tokens."""
    from prime_rl.trainer.rl.loss import LossOutputs

    weight_T = inputs.loss_mask.float()
    if inputs.loss_weights is not None:
        weight_T = weight_T * inputs.loss_weights
    streams = Streams(weight_T, adv_tau * inputs.advantages, inputs.inference_logprobs)
    loss_T = token_loss(TrustRegion(low, high, kl_tau), inputs.trainer_logprobs, streams)
    return LossOutputs((weight_T * loss_T).sum(), {})
