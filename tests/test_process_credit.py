"""Credit inside wrong rollouts: streams worked out by hand, and both rules in a tiny RL run."""

import json
from pathlib import Path

import msgspec
import pytest
from small_run import Quiet

from intfast import checks, cli, credit, rl
from intfast.config import (
    Config,
    CreditConfig,
    DataConfig,
    InterveneConfig,
    PolicyConfig,
    RlConfig,
)
from intfast.engine.protocol import Completion
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade
from intfast.methods import process_credit
from intfast.methods.process_credit import Located, capo, vppo
from intfast.run import open_run
from intfast.sample import Graded

ROOT = Path(__file__).parents[1]
VPPO = CreditConfig(process="vppo")
CAPO = CreditConfig(process="capo")


def test_vppo_by_hand():
    # Mean token rewards: 1 (right), 2 x 0.5 / 4 = 0.25 (located), 0 (not located): baseline 5/12.
    rewards, lengths, found = [1.0, 0.0, 0.0], [2, 4, 3], [None, Located(2, 3), None]
    base = 1.25 / 3
    expected = [[1 - base] * 2, [0.5 - base] * 2 + [-base] * 2, [-base] * 3]
    assert base < 0.5
    assert vppo(rewards, lengths, found, 0, VPPO) == [pytest.approx(row) for row in expected]
    # A margin of one token takes one token's reward, which moves the baseline.
    base = 1.125 / 3
    (_, second, _) = vppo(rewards, lengths, found, 1, VPPO)
    assert second == pytest.approx([0.5 - base, -base, -base, -base])


def test_vppo_clamps_only_what_it_rewards():
    rewards, lengths, found = [1.0, 0.0], [3, 4], [None, Located(1, 2)]
    base = (1 + 0.125) / 2
    right, wrong = vppo(rewards, lengths, found, 0, VPPO)
    assert right == pytest.approx([1 - base] * 3)
    assert wrong == pytest.approx([0.0] + [-base] * 3)
    assert base > 0.5  # unclamped, the rewarded token would be pushed down


def test_vppo_teaches_in_a_group_that_is_all_wrong_and_not_in_one_that_is_all_right():
    all_wrong = vppo([0.0, 0.0], [2, 2], [Located(1, 2), None], 0, VPPO)
    assert all_wrong == [pytest.approx([0.375, -0.125]), pytest.approx([-0.125, -0.125])]
    assert vppo([1.0, 1.0, None], [2, 0, 1], [None] * 3, 0, VPPO) == [[0.0, 0.0], [], None]


def test_capo_penalises_the_wrong_step_only():
    advantages, found = [0.75, -0.25, -0.25, None], [None, Located(1, 3), None, None]
    assert capo(advantages, [2, 4, 2, 1], found, CAPO) == [
        [0.75, 0.75],
        [-0.25, -0.75, -0.75, -0.25],
        [-0.25, -0.25],
        None,
    ]
    # The stop token is sampled but belongs to no step.
    assert capo([0.0], [3], [Located(1, 9)], CAPO) == [[0.0, -0.5, -0.5]]


def test_examples_take_one_advantage_per_token():
    completion = Completion(
        token_ids=[5, 6], logprobs=[-1.0, -1.0], finish_reason="stop", policy_version=0
    )
    (example,) = credit.examples([[1, 2]], [[completion]], [[[0.5, -0.5]]], CreditConfig())
    assert example.advantages == [0.0, 0.0, 0.5, -0.5]
    idle = msgspec.structs.replace(example, advantages=[0.0, 0.0, 0.5, 0.0])
    assert credit.with_gradient([idle], PolicyConfig()) == [idle]


def test_settings_that_cannot_work_are_refused():
    bad = [
        RlConfig(credit=CreditConfig(process_weight=0.3)),
        RlConfig(credit=CreditConfig(process="vppo", process_weight=1.0)),
        RlConfig(credit=CreditConfig(process="vppo", scale="group")),
        RlConfig(credit=CAPO, refill=1),
        RlConfig(credit=CAPO, hint="shortest"),
        RlConfig(credit=CAPO, policy=PolicyConfig(objective="gspo")),
        RlConfig(credit=VPPO),
    ]
    data = DataConfig(train="x.jsonl")
    counts = [len(checks.faults(Config(data=data, rl=rl))) for rl in bad]
    assert counts == [1] * (len(bad) - 1) + [0]


# --- in a run ----------------------------------------------------------------------------------

SAMPLING = "{temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=110}"


@pytest.fixture
def run_of(tmp_path):
    def make(*overrides):
        words = [
            f"run={tmp_path / 'run'}",
            f"model.path={ROOT / 'configs/quickstart/base'}",
            f"data.train={ROOT / 'configs/quickstart/train.jsonl'}",
            f"data.test={ROOT / 'configs/quickstart/test.jsonl'}",
            "data.train_limit=4",
            "data.test_limit=2",
            "rl.problems_per_step=2",
            "rl.group_size=4",
            "rl.steps=2",
            *overrides,
        ]
        return open_run(cli.load(ROOT / "configs/quickstart_short.toml", words), Quiet())

    return make


def test_located_steps_are_spans_of_the_sampled_tokens(run_of):
    with run_of("rl.credit.process=capo") as run:
        tasks = [(problem, None) for problem in run.problems]
        rollouts = rl.draw(run, "rl", tasks, 0)
        located_P_G, counts = process_credit.locate(
            run.sampler,
            run.problems[:2],
            rollouts.groups_P_G,
            run.config.intervene,
            seed=1,
        )
        places = 0
        for group, located in zip(rollouts.groups_P_G, located_P_G, strict=True):
            wrong = [g for g, graded in enumerate(group) if graded.grade.status == "wrong"]
            for g, found in enumerate(located):
                if found is None:
                    continue
                places += 1
                assert g in wrong[:2]
                graded = group[g]
                ids = run.sampler.without_stop(graded.completion)[found.start : found.stop]
                step = run.sampler.tokenizer.decode(ids).strip()
                assert step in [s.strip() for s in run.sampler.style.split(graded.text)]
        assert counts["located"] == places > 0
        assert counts["verified"] == 4 and counts["verify_tokens"] > 4


@pytest.mark.parametrize("process", ["vppo", "capo"])
def test_groups_that_are_all_wrong_move_the_weights(run_of, monkeypatch, process):
    monkeypatch.setattr(process_credit, "MARGIN", 0.0)
    with run_of(f"rl.credit.process={process}") as run:
        before = run.decoder.head_weight_VD.detach().clone()
        rl.rl(run, "base_rl", "base", run.problems)
        rows = run.metrics.rows("base_rl")
        assert not before.equal(run.decoder.head_weight_VD)
    assert [row["updates"] for row in rows] == [1, 1]
    assert all(row["verify_tokens"] > 0 and row["located"] <= row["verified"] for row in rows)


def test_a_step_whose_problems_have_no_reference_locates_nothing():
    wrong = Graded(
        Completion(token_ids=[5], logprobs=[0.0], finish_reason="stop", policy_version=0),
        "x",
        Grade(status=Reason.WRONG.status, reason=Reason.WRONG),
    )
    row = json.loads((ROOT / "configs/quickstart/train.jsonl").read_text().splitlines()[0])
    problem = process_credit.Problem(id="p", problem=row["problem"], answer=row["answer"])
    found, counts = process_credit.locate(None, [problem], [[wrong]], InterveneConfig(), 0)
    assert found == [[None]] and set(counts.values()) == {0}
