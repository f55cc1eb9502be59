"""Each adapter against the loss of the package that it is made for, values and gradients."""

import copy
import importlib.util
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import bounds
import pytest
import torch

from intfast.kernels import adapters
from intfast.kernels.head.plan import IGNORE
from intfast.kernels.objectives import PolicyClip, Streams


def needs(module: str, install: str):
    """Skip a test without a package, with the line that installs it."""
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is missing: {install}")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        # The default initialisation predicts a near uniform distribution, which hides errors.
        model.lm_head.weight.mul_(25)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_token_loss_is_differentiable_and_ignores_dead_tokens():
    logprob = (-randn(6).abs()).requires_grad_()
    old = logprob.detach() + 0.3 * randn(6, seed=1)
    advantage, weight = randn(6, seed=2), torch.tensor([1.0, 1, 0, 2, 1, 1])
    old[2] = float("nan")
    loss = adapters.token_loss(PolicyClip(), logprob, Streams(weight, advantage, old))
    (got,) = torch.autograd.grad((weight * loss).sum(), logprob)
    live = weight != 0
    ratio = (logprob - old)[live].exp()
    plain = -torch.minimum(ratio * advantage[live], ratio.clamp(0.8, 1.2) * advantage[live])
    (expected,) = torch.autograd.grad((weight[live] * plain).sum(), logprob)
    torch.testing.assert_close(loss[live], plain)
    torch.testing.assert_close(got, expected)
    assert loss[2] == 0 and got[2] == 0


@needs("transformers", "pip install transformers")
@pytest.mark.parametrize("num_items", [None, 7])
def test_causal_lm_loss_equals_transformers(num_items):
    model = tiny_model()
    ids = torch.randint(0, 53, (3, 11), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :4], labels[1, 6:] = IGNORE, IGNORE
    attention = torch.ones_like(ids)
    attention[2, 9:] = 0
    call = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    call["num_items_in_batch"] = num_items
    plain = model(**call).loss
    expected = gradients(model, plain)
    wide = copy.deepcopy(model).double()
    exact = gradients(wide, wide(**call).loss)
    adapters.fuse_causal_lm(model)
    output = model(**call)
    assert output.logits is None
    torch.testing.assert_close(output.loss, plain)
    got = gradients(model, output.loss)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        # As far off as transformers, and the roundings of a sum over the vocabulary more.
        allowed = bounds.PEER * (expected[name] - exact[name]).abs().max()
        allowed += bounds.of_sum(53, exact[name].abs().max().item())
        assert (value - exact[name]).abs().max() <= allowed, name
    assert model(input_ids=ids).logits.shape == (3, 11, 53)


@needs("transformers", "pip install transformers")
def test_causal_lm_refuses_a_head_with_a_bias():
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(53))
    with pytest.raises(ValueError, match="without bias"):
        adapters.fuse_causal_lm(model)


SIZES = {
    "vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}


@needs("transformers", "pip install transformers")
@pytest.mark.parametrize(
    ("family", "changes", "refusal"),
    [
        ("Qwen3Moe", EXPERTS, None),
        (
            "Qwen3Moe",
            EXPERTS | {"output_router_logits": True},
            "a loss of .* got .*router",
        ),
        ("Gemma2", {"final_logit_softcapping": 3.0}, None),
        ("Granite", {"logits_scaling": 2.0}, "difference of .*logits_scaling"),
        ("FalconH1", {"lm_head_multiplier": 0.3}, "difference of .*lm_head_multiplier"),
        ("Llama4", LLAMA4, "Llama4ForCausalLM does not give hidden states.*do not fuse"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_lm_is_compared_with_the_models_own_loss(family, changes, refusal, dtype):
    """What adds to the loss or scales the logits made another loss without a word."""
    transformers = pytest.importorskip("transformers")
    name = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES | changes)
    made = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
    made.model.layers[0].eval()
    modes = [module.training for module in made.modules()]
    call = {"input_ids": torch.arange(9)[None], "labels": torch.arange(9)[None]}
    if refusal is None:
        stock = made(**call).loss.item()
        allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert adapters.fuse_causal_lm(made)(**call).loss.item() == pytest.approx(stock, allowed)
    else:
        own = made.forward
        with pytest.raises(ValueError, match=refusal):
            adapters.fuse_causal_lm(made)
        assert made.forward == own
    assert [module.training for module in made.modules()] == modes


@needs("transformers", "pip install transformers")
def test_causal_lm_without_weights_is_refused():
    made = tiny_model().to("meta")
    with pytest.raises(ValueError, match="on 'meta'; load them first"):
        adapters.fuse_causal_lm(made)


@needs("accelerate", "pip install accelerate")
def test_hugging_face_trainer_trains_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 53, (8, 9), generator=torch.Generator().manual_seed(4))
    rows = []
    for number, row in enumerate(ids):
        label = row.clone()
        label[: 2 + number % 4] = IGNORE
        rows.append({"input_ids": row, "labels": label})
    weights = []
    for fuse in (False, True):
        model = tiny_model()
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, report_to=[], max_steps=2,
            gradient_accumulation_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True,
            optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        transformers.Trainer(
            adapters.fuse_causal_lm(model) if fuse else model, args, train_dataset=rows
        ).train()
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    moved = (
        weights[0] - torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    ).abs()
    assert moved.max() > 1e-3
    # No rounding: what a wrong divisor or a lost micro-batch changes is several times as much.
    assert (weights[0] - weights[1]).abs().max() < 1e-2 * moved.max()


def grpo_case(loss_type, level="token", ratio_shape=(4, 6), **over):
    """(what TRL's `_compute_loss` reads of its trainer, its inputs) for a tiny model."""
    pytest.importorskip("trl")
    model = tiny_model()
    ids = torch.randint(0, 53, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[1, 4:], mask[3, 1:] = 0, 0
    dense = model(input_ids=ids).logits[:, 2:-1] / 0.9
    logprob = dense.log_softmax(-1).gather(2, ids[:, 3:, None])[..., 0].detach()
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones_like(ids[:, :3]),
        "completion_ids": ids[:, 3:],
        "completion_mask": mask,
        "advantages": randn(4, seed=6),
        "old_per_token_logps": logprob + 0.3 * randn(4, 6, seed=7),
        "ref_per_token_logps": logprob + 0.3 * randn(4, 6, seed=8),
        "importance_sampling_ratio": randn(*ratio_shape, seed=9).exp(),
        "num_items_in_batch": torch.tensor(23.0),
    }
    accelerator = SimpleNamespace(
        unwrap_model=lambda m: m, gather=lambda x: x, reduce=lambda x, reduction: x,
        gather_for_metrics=lambda x: x, num_processes=1, sync_gradients=True,
    )  # fmt: skip
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=2, sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.0, report_to=[],
    )  # fmt: skip
    trainer = SimpleNamespace(
        model=model, args=args, accelerator=accelerator, loss_type=loss_type, temperature=0.9,
        importance_sampling_level=level, epsilon_low=0.1, epsilon_high=0.2, beta=0.0,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, use_vllm=False, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=2, max_completion_length=6,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    for name, value in over.items():
        setattr(args if hasattr(args, name) else trainer, name, value)

    def stock_logprobs(model, input_ids, attention_mask, keep, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        logp = (logits[:, -keep - 1 : -1] / trainer.temperature).log_softmax(-1)
        chosen = logp.gather(2, input_ids[:, -keep:, None])[..., 0]
        return chosen, -(logp.exp() * logp).sum(-1), None

    trainer._get_per_token_logps_and_entropies = stock_logprobs
    model.train()
    return trainer, inputs


@needs("trl", "pip install 'trl==1.16.*'")
@pytest.mark.parametrize(
    ("loss_type", "over"),
    [
        ("dapo", {}),
        ("grpo", {"beta": 0.1, "delta": 1.4}),
        ("bnpo", {"beta": 0.1, "use_bias_correction_kl": True}),
        ("dr_grpo", {"use_vllm": True, "beta": 0.1}),
        ("cispo", {"epsilon_high": 1.1}),
        ("luspo", {}),
        ("grpo", {"level": "sequence"}),
        ("luspo", {"level": "sequence", "use_vllm": True, "ratio_shape": (4, 1)}),
    ],
)
def test_grpo_loss_equals_trl(loss_type, over):
    from trl import GRPOTrainer

    trainer, inputs = grpo_case(loss_type, **over)
    plain = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    expected = gradients(trainer.model, plain)
    loss = adapters.trl_compute_loss(trainer, trainer.model, inputs)
    torch.testing.assert_close(loss, plain)
    assert_same_gradients(gradients(trainer.model, loss), expected)
    stock, ours = trainer._metrics["train"]["entropy"]
    assert ours == pytest.approx(stock, rel=1e-4)


SEQUENCE_BLOCKERS = [
    ({"loss_type": "cispo"}, "unsupported: loss_type='cispo' at sequence level; switch"),
    ({"delta": 1.5}, "unsupported: delta=1.5 at sequence level; switch"),
    (
        {"beta": 0.1, "use_bias_correction_kl": True},
        "unsupported: use_bias_correction_kl=True with beta=0.1 at sequence level; switch",
    ),
]


@pytest.mark.parametrize(("over", "message"), SEQUENCE_BLOCKERS)
def test_grpo_names_the_one_option_in_the_way(over, message):
    """Without TRL: of its trainer only what is read."""
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    trainer = SimpleNamespace(
        args=args, importance_sampling_level="sequence", loss_type="grpo", beta=0.0,
        off_policy_mask_threshold=None, top_entropy_quantile=1.0, _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
    )  # fmt: skip
    adapters._check_trl(trainer)
    for name, value in over.items():
        setattr(args if hasattr(args, name) else trainer, name, value)
    with pytest.raises(ValueError, match=message):
        adapters._check_trl(trainer)


@needs("trl", "pip install 'trl==1.16.*'")
def test_grpo_refuses_what_it_cannot_do():
    cases = [
        ({"loss_type": "sapo"}, "unsupported: loss_type"),
        ({"top_entropy_quantile": 0.5}, "unsupported: top_entropy"),
        ({"aux_loss_enabled": True}, "unsupported: a router"),
        ({"level": "sequence", "use_vllm": True}, "one correction per sequence"),
        *((over | {"level": "sequence"}, message) for over, message in SEQUENCE_BLOCKERS),
    ]
    for over, message in cases:
        trainer, inputs = grpo_case(**{"loss_type": "dapo", **over})
        with pytest.raises(ValueError, match=message):
            adapters.trl_compute_loss(trainer, trainer.model, inputs)


@needs("verl", "pip install 'verl==0.9.*'")
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss_equals_verl(mode):
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.1,
        clip_ratio_high=0.3, clip_ratio_c=1.5,
    )  # fmt: skip
    logprob = (-randn(3, 7).abs()).requires_grad_()
    old = logprob.detach() + 0.5 * randn(3, 7, seed=1)
    mask = torch.ones(3, 7)
    mask[1, 3:] = 0
    arguments = (old, logprob, randn(3, 7, seed=2), mask, mode, config, randn(3, 7, seed=3).exp())
    registered = core_algos.register_policy_loss("intfast")(adapters.verl_policy_loss)
    assert core_algos.get_policy_loss_fn("intfast") is registered
    plain, stock = core_algos.compute_policy_loss_vanilla(*arguments)
    loss, metrics = registered(*arguments)
    torch.testing.assert_close(loss, plain)
    for got, expected in zip(
        torch.autograd.grad(loss, logprob), torch.autograd.grad(plain, logprob), strict=True
    ):
        torch.testing.assert_close(got, expected)
    for name, value in metrics.items():
        # means of at most 21 values of order one
        assert value == pytest.approx(stock[name], abs=bounds.of_sum(21, 1.0))


@needs("verl", "pip install 'verl==0.9.*'")
def test_fused_head_equals_verl():
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden = randn(1, 13, 8).requires_grad_()
    weight = randn(37, 8, seed=1).requires_grad_()
    labels = torch.randint(0, 37, (1, 13), generator=torch.Generator().manual_seed(2))
    stock = FusedLinearForPPO(chunk_size=4)(hidden, weight, labels, temperature=0.7)
    ours = adapters.verl_logprob(hidden, weight, labels, 0.7)
    grads = []
    for logprob, entropy in (stock, ours):
        loss = (logprob.reshape(-1) * randn(13, seed=3) + entropy.reshape(-1)).sum()
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for got, expected in zip((*ours, *grads[1]), (*stock, *grads[0]), strict=True):
        torch.testing.assert_close(got.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="process group"):
        adapters.verl_logprob(hidden, weight, labels, reduction="mean")


@needs("torchtitan", "pip install 'torchtitan==0.3.*'")
def test_titan_loss_equals_torchtitan():
    from torchtitan.components.loss import ChunkedLossWrapper

    head = torch.nn.Linear(8, 41, bias=False)
    with torch.no_grad():
        head.weight.copy_(randn(41, 8))
    hidden = randn(2, 16, 8, seed=1).requires_grad_()
    labels = torch.randint(0, 41, (2, 16), generator=torch.Generator().manual_seed(2))
    labels[0, 5:9] = IGNORE
    results = []
    for config in (ChunkedLossWrapper.Config(num_chunks=4), adapters.titan_loss().Config()):
        loss_fn = config.build(compile_config=None)
        assert isinstance(loss_fn, ChunkedLossWrapper)
        loss_fn.set_lm_head(head)
        hidden.grad = head.weight.grad = None
        loss, metrics = loss_fn(hidden, labels, torch.tensor(28.0))
        loss.backward()
        assert metrics == {}
        results.append((loss.detach(), hidden.grad, head.weight.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def prime_inputs(weights):
    logprob = (-randn(40).abs()).requires_grad_()
    return SimpleNamespace(
        trainer_logprobs=logprob,
        inference_logprobs=logprob.detach() + 0.4 * randn(40, seed=1),
        ref_logprobs=None,
        advantages=randn(40, seed=2),
        loss_mask=torch.arange(40) % 3 != 0,
        loss_weights=randn(40, seed=3).abs() if weights else None,
    )


@needs("prime_rl", "install it from its repository, it is not on PyPI")
@pytest.mark.parametrize("weights", [False, True])
def test_loss_equals_prime_rl(weights):
    from prime_rl.configs.trainer import DefaultLossConfig
    from prime_rl.trainer.rl.loss import LossInputs, default_loss_fn

    inputs = LossInputs(**vars(prime_inputs(weights)))
    config = DefaultLossConfig(dppo_mask_low=0.1, dppo_mask_high=0.15, adv_tau=0.7, kl_tau=0.2)
    plain = default_loss_fn(inputs, config).loss
    loss = adapters.prime_rl_loss(inputs, low=0.1, high=0.15, adv_tau=0.7, kl_tau=0.2).loss
    torch.testing.assert_close(loss, plain)
    for got, expected in zip(
        torch.autograd.grad(loss, inputs.trainer_logprobs),
        torch.autograd.grad(plain, inputs.trainer_logprobs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("weights", [False, True])
def test_prime_rl_contract_without_the_package(monkeypatch, weights):
    """The formula of prime-rl's default loss, written again here, behind its own types' names."""
    module = ModuleType("prime_rl.trainer.rl.loss")
    module.LossOutputs = lambda loss, metrics: SimpleNamespace(loss=loss, metrics=metrics)
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inputs = prime_inputs(weights)
    loss = adapters.prime_rl_loss(inputs, low=0.1, high=0.15, adv_tau=0.7, kl_tau=0.2).loss
    total = 0.0
    for t in inputs.loss_mask.nonzero()[:, 0].tolist():
        current, old = inputs.trainer_logprobs[t], inputs.inference_logprobs[t]
        advantage, moved = inputs.advantages[t], (current.exp() - old.exp()).item()
        out = moved > 0.15 if advantage > 0 else moved < -0.1
        token = 0.2 * (current - old) ** 2 - (0 if out else 0.7 * advantage * (current - old).exp())
        total = total + token * (1.0 if inputs.loss_weights is None else inputs.loss_weights[t])
    torch.testing.assert_close(loss, total)
    (got,) = torch.autograd.grad(loss, inputs.trainer_logprobs)
    (expected,) = torch.autograd.grad(total, inputs.trainer_logprobs)
    torch.testing.assert_close(got, expected)
