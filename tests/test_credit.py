"""Advantages and weights against numbers worked out by hand."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from intfast import checks, credit
from intfast.config import (
    BatchConfig,
    Config,
    CreditConfig,
    DataConfig,
    OptimConfig,
    PolicyConfig,
    RlConfig,
    SftConfig,
)
from intfast.credit import REWARDS, divisor, examples, group_advantages, with_gradient
from intfast.engine.protocol import Completion
from intfast.kernels import group_advantages as kernel
from intfast.kernels.objectives import Level

# Made in fp64 and rounded to fp32 once.
ROUNDED = 2.0**-24


def completion(length: int, finish_reason: str = "stop") -> Completion:
    return Completion(
        token_ids=list(range(10, 10 + length)),
        logprobs=[-0.5 - t for t in range(length)],
        finish_reason=finish_reason,
        policy_version=0,
    )


def test_group_advantages_baselines_by_hand():
    rewards = [[1.0, 0.0, 0.0, 0.0]]
    mean = group_advantages(rewards, CreditConfig())
    assert mean.advantages_P_G == [[0.75, -0.25, -0.25, -0.25]]
    others = group_advantages(rewards, CreditConfig(baseline="leave-one-out"))
    assert others.advantages_P_G[0] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], rel=ROUNDED)


def test_group_advantages_scales_by_hand(monkeypatch):
    monkeypatch.setattr(credit, "EPS", 0.01)
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    # centred squares: 0.75; 2/3; the seven together, mean 3/7: 12/7
    expected = {
        "group": [math.sqrt(0.75 / 3), math.sqrt(2 / 3 / 2)],
        "group-population": [math.sqrt(0.75 / 4), math.sqrt(2 / 3 / 3)],
        "batch": [math.sqrt(12 / 7 / 6)] * 2,
    }
    for scale, (first, second) in expected.items():
        got = group_advantages(rewards, CreditConfig(scale=scale)).advantages_P_G
        assert got[0][0] == pytest.approx(0.75 / (first + 0.01), rel=ROUNDED), scale
        assert got[1][2] == pytest.approx(-2 / 3 / (second + 0.01), rel=ROUNDED), scale


@pytest.mark.parametrize("scale", ["none", "group", "group-population", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_group_without_variance_is_exactly_zero(scale, baseline):
    # 0.1 three times: the sum is not three times 0.1 in floating point
    config = CreditConfig(scale=scale, baseline=baseline)
    credit = group_advantages([[0.1] * 3, [0.7], [1e-9] * 7, [1.0, 0.0]], config)
    assert [a for group in credit.advantages_P_G[:3] for a in group] == [0.0] * 11
    assert credit.advantages_P_G[3][0] > 0


def test_unscored_leaves_the_baseline_and_the_counts():
    credit = group_advantages(
        [[1.0, None, 0.0], [None, None], [0.0, None], [1.0, 1.0], [0.0, 0.0]], CreditConfig()
    )
    assert credit.advantages_P_G[0] == [0.5, None, -0.5]
    assert credit.advantages_P_G[1] == [None, None]
    assert credit.advantages_P_G[2] == [0.0, None]
    counts = (credit.num_active, credit.num_all_wrong, credit.num_all_right)
    assert counts == (1, 2, 1)
    assert (credit.num_unscored_groups, credit.num_unscored) == (1, 4)
    assert credit.zero_advantage_share == 3 / 4
    assert REWARDS["unscored"] is None


def test_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="group 1: expected a finite number or None, got nan"):
        group_advantages([[0.0], [math.nan, 1.0]], CreditConfig())


def test_group_order_does_not_matter_to_advantages():
    # Multiples of 1/8, whose sums are exact in every order.
    rewards = [0.25, 1.0, 0.125, 0.0, 0.75]
    first = group_advantages([rewards], CreditConfig(scale="group")).advantages_P_G[0]
    turned = group_advantages([rewards[::-1]], CreditConfig(scale="group")).advantages_P_G[0]
    assert turned[::-1] == first


def test_examples_align_prompt_and_samples():
    made = examples(
        [[1, 2, 3]], [[completion(2), completion(3)]], [[0.5, None]], CreditConfig(), ["p"]
    )
    assert len(made) == 1
    example = made[0]
    assert example.token_ids == [1, 2, 3, 10, 11]
    assert example.weights == [0, 0, 0, 1, 1]
    assert example.advantages == [0, 0, 0, 0.5, 0.5]
    assert example.sampler_logprobs == [0, 0, 0, -0.5, -1.5]
    assert (example.problem_id, example.kind) == ("p", "rollout")


def test_divisor_of_every_normalisation_by_hand():
    # four sequences of 1, 2, 0 and 5 tokens; the fifth is unscored, the empty one counts
    lengths = (1, 2, 0, 5, 9)
    completions = [[completion(n) for n in lengths]]
    advantages = [[1.0, 0.0, -1.0, 0.5, None]]
    expected = {  # (weight of a token of the 5-token sequence, divisor)
        "token": (1.0, 8.0),
        "sequence-mean": (0.2, 4.0),
        "sequence-sum": (1.0, 4.0),
        "constant": (1.0, 4.0 * 16),
    }
    for normalisation, (weight, count) in expected.items():
        config = CreditConfig(normalisation=normalisation)
        made = examples([[1]], completions, advantages, config)
        assert made[3].weights == [0.0] + [weight] * 5, normalisation
        assert divisor(made, config, max_new_tokens=16) == count, normalisation


def test_normalisations_equal_their_formulas():
    completions = [[completion(n) for n in (3, 1, 4)]]
    losses = [[0.3, -1.0, 0.7], [2.0], [0.1, 0.2, 0.4, -0.8]]
    formulas = {
        "token": sum(map(sum, losses)) / 8,
        "sequence-mean": sum(sum(row) / len(row) for row in losses) / 3,
        "sequence-sum": sum(map(sum, losses)) / 3,
        "constant": sum(map(sum, losses)) / (3 * 50),
    }
    for normalisation, expected in formulas.items():
        config = CreditConfig(normalisation=normalisation)
        made = examples([[1, 2]], completions, [[1.0, 2.0, 3.0]], config)
        total = sum(
            weight * loss
            for example, row in zip(made, losses, strict=True)
            for weight, loss in zip(example.weights[2:], row, strict=True)
        )
        assert total / divisor(made, config, 50) == pytest.approx(expected, rel=1e-14)


def test_truncated_completions_are_masked_only_on_request():
    completions = [[completion(2, "length"), completion(3)]]
    for mask, count in ((False, 2), (True, 1)):
        config = CreditConfig(mask_truncated=mask, normalisation="token")
        made = examples([[1]], completions, [[-0.5, 0.5]], config)
        assert len(made) == count
        assert divisor(made, config, 9) == (3 if mask else 5)


def test_zero_advantage_is_dropped_only_where_exact():
    made = examples([[1]], [[completion(2), completion(3)]], [[0.0, 0.5]], CreditConfig())
    assert with_gradient(made, PolicyConfig()) == [made[1]]
    assert with_gradient(made, PolicyConfig(kl=0.1)) == made
    assert with_gradient(made, PolicyConfig(entropy=0.1)) == made


def test_examples_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="one advantage per completion, got 1 for 2"):
        examples([[1]], [[completion(1), completion(1)]], [[1.0]], CreditConfig())
    with pytest.raises(ValueError, match="every completion was unscored"):
        divisor([], CreditConfig(), 16)


BAD_SETTINGS = [
    (CreditConfig(baseline="median"), "baseline"),
    (BatchConfig(max_tokens=0), "max_tokens"),
    (PolicyConfig(clip_low=1.5), "clip_low"),
    (PolicyConfig(clip_high=math.nan), "clip_high"),
    (PolicyConfig(dual_clip=1.1), "dual_clip"),
    (PolicyConfig(dual_clip=3.0, objective="cispo"), "dual_clip"),
    (PolicyConfig(clip_high=0.3, objective="reinforce"), "clip_high"),
    (PolicyConfig(kl=-0.1), "kl"),
    (PolicyConfig(kl_estimator="k1"), "kl_estimator"),
    (PolicyConfig(correction_bounds=(0.5, 3.0)), "correction_bounds"),
    (PolicyConfig(correction="mask", correction_bounds=(1.2, 2.0)), "correction_bounds"),
    (PolicyConfig(correction="truncate", correction_bounds=(0.5, 0.5)), "correction_bounds"),
    (PolicyConfig(correction="truncate", correction_bounds=(0.1, 2.0)), "correction_bounds"),
    (OptimConfig(lr=0.0), "lr"),
    (OptimConfig(lr=math.inf), "lr"),
    (OptimConfig(schedule="constant", floor=0.5), "floor"),
]


def config_of(part) -> Config:
    """A config that could run, with this section."""
    data = DataConfig(train="x.jsonl")
    if isinstance(part, BatchConfig):
        return Config(data=data, batch=part)
    if isinstance(part, OptimConfig):
        return Config(data=data, sft=SftConfig(optim=part))
    name = {CreditConfig: "credit", PolicyConfig: "policy"}[type(part)]
    return Config(data=data, rl=RlConfig(**{name: part}))


@pytest.mark.parametrize(("settings", "field"), BAD_SETTINGS)
def test_impossible_settings_name_the_field_and_what_is_expected(settings, field):
    with pytest.raises(ValueError) as caught:
        checks.check(config_of(settings))
    messages = str(caught.value).splitlines()
    assert field in messages[-1].split(";")[0] and "xpected" in messages[-1]


def test_full_use_passes_the_check():
    full = PolicyConfig(
        dual_clip=3.0, kl=0.1, kl_estimator="k1", correction="mask", correction_bounds=(0.2, 2.0)
    )
    checks.check(config_of(full))


def test_settings_do_not_import_torch():
    code = "import sys, intfast.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainer_and_the_ops_use_the_same_words():
    credit, policy = get_type_hints(CreditConfig), get_type_hints(PolicyConfig)
    for ours, theirs in (
        (credit["baseline"], kernel.Baseline),
        (credit["scale"], kernel.Scale),
        (policy["correction_level"], Level),
    ):
        assert set(get_args(ours)) == set(get_args(theirs))


@pytest.mark.parametrize("scale", ["group", "group-population", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_ragged_groups_against_their_definition(scale, baseline):
    rnd = random.Random(0)
    groups = [
        [rnd.choice([0.0, 1.0, 0.25, None]) for _ in range(rnd.randint(0, 6))] for _ in "x" * 40
    ]
    made = group_advantages(groups, CreditConfig(scale=scale, baseline=baseline))
    scored = [reward for group in groups for reward in group if reward is not None]
    for group, found in zip(groups, made.advantages_P_G, strict=True):
        own = [reward for reward in group if reward is not None]
        for reward, advantage in zip(group, found, strict=True):
            if reward is None or len(set(own)) < 2:
                assert advantage == (None if reward is None else 0.0)
                continue
            others = sum(own) - reward
            mean = sum(own) / len(own) if baseline == "mean" else others / (len(own) - 1)
            divisor = {
                "group": lambda own=own: statistics.stdev(own),
                "group-population": lambda own=own: statistics.pstdev(own),
                "batch": lambda: statistics.stdev(scored),
                "none": lambda: 1.0 - credit.EPS,
            }[scale]() + credit.EPS
            assert advantage == pytest.approx((reward - mean) / divisor, rel=4 * ROUNDED)
    active = sum(len({r for r in group if r is not None}) > 1 for group in groups)
    assert made.num_active == active > 10
    assert made.num_unscored == sum(map(len, groups)) - len(scored) > 0
    assert made.num_unscored_groups == sum(all(r is None for r in group) for group in groups) > 0
