"""RL as the comparison needs it: hints are prompt, and training goes on until equal tokens."""

import pytest
import torch
from small_run import Quiet, words, write_inputs

from intfast import cli, rl
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade
from intfast.methods import cost
from intfast.records import Guided
from intfast.run import open_run


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Builds the parts of a run; a right answer is one whose first word is a letter a..h."""

    def grade(self, submissions):
        right = [text.split()[:1] and text.split()[0] in "abcdefgh" for _, text, *_ in submissions]
        reasons = [Reason.CORRECT if r else Reason.WRONG for r in right]
        return [Grade(status=reason.status, reason=reason) for reason in reasons]

    monkeypatch.setattr("intfast.grading.grader.Grader.grade_many", grade)
    inputs = write_inputs(tmp_path, num_hidden_layers=1)

    def make(*overrides, run="run"):
        settings = [
            *words(inputs, tmp_path / run, max_new_tokens=3),
            "rl.steps=2",
            "rl.problems_per_step=3",
            "rl.group_size=8",
            "rl.checkpoint_every=1",
            *overrides,
        ]
        return open_run(cli.load(None, settings), Quiet())

    return make


def hints_of(run) -> dict[str, list[int]]:
    return {problem.id: [*run.sampler.prompt(problem), 22, 23, 24] for problem in run.problems}


def test_guided_and_bare_versions_come_one_to_one(run_of, monkeypatch):
    drawn, draw = [], rl.draw

    def watch(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(rl, "draw", watch)
    with run_of("rl.steps=4") as run:
        rl.rl(run, "base_rl", "base", run.problems, hints_of(run))
        rows = run.metrics.rows("base_rl")
    # 4 steps of 3 are one epoch of 6 problems, each bare and with its hint.
    starts = [start for rollouts in drawn for start in rollouts.starts_P]
    bare = [start.problem.id for start in starts if start.prompt_ids is None]
    guided = [start.problem.id for start in starts if start.prompt_ids is not None]
    assert sorted(bare) == sorted(guided) == sorted(set(bare)) and len(bare) == 6
    # The training reward of the table is that of rollouts without a hint.
    for rollouts, row in zip(drawn, rows, strict=True):
        right = [
            graded.grade.status == "correct"
            for start, group in zip(rollouts.starts_P, rollouts.groups_P_G, strict=True)
            for graded in group
            if start.prompt_ids is None
        ]
        if 0 < len(right) < 24:
            assert row["reward_bare"] == pytest.approx(sum(right) / len(right))
        assert ("reward_bare" in row) == (len(right) < 24)


def test_a_guided_rollout_carries_loss_on_its_own_tokens_alone(run_of, monkeypatch):
    kept = []
    pack = rl.pack_apart
    monkeypatch.setattr(
        rl, "pack_apart", lambda made, config: kept.extend(made) or pack(made, config)
    )
    with run_of("rl.problems_per_step=12", "rl.steps=1") as run:
        hints = hints_of(run)
        prompts = {p.id: run.sampler.prompt(p) for p in run.problems}
        rl.rl(run, "base_rl", "base", run.problems, hints)
    seen = set()
    for example in kept:
        hinted, plain = hints[example.problem_id], prompts[example.problem_id]
        is_guided = example.token_ids[: len(hinted)] == hinted
        length = len(hinted if is_guided else plain)
        assert example.token_ids[: len(plain)] == plain
        assert example.weights[:length] == [0.0] * length
        assert 1 <= len(example.weights[length:]) <= 3 and all(example.weights[length:])
        seen.add(is_guided)
    assert seen == {True, False}


@pytest.mark.parametrize("stop_before", [None, 2, 4])
def test_rl_goes_on_until_the_tokens_and_resumes_to_the_same_weights(
    run_of, monkeypatch, stop_before
):
    # A step is 3 x 8 rollouts of at most 3 tokens; 400 tokens were generated before RL.
    until = 400 + 3 * 72 + 1
    words = (f"rl.until_tokens={until}", "rl.steps=2")
    record = Guided(
        kind="star",
        problem_id="p",
        sample=0,
        token_ids=[1] * 400,
        text="",
        finish_reason="stop",
        grade="wrong",
        reason="wrong",
    )
    with run_of(*words, run="whole") as run:
        run.folder.journal("guided", Guided).append([record])
        rl.rl(run, "base_rl", "base", run.problems)
        rows = run.metrics.rows("base_rl")
        weights = {name: p.detach().clone() for name, p in run.decoder.named_parameters()}
        assert sum(cost.generated_tokens(run).values()) == 400
        assert cost.rl_tokens(run, "base_rl") == sum(row["sampled_tokens"] for row in rows)
    sums = [400 + sum(row["sampled_tokens"] for row in rows[: n + 1]) for n in range(len(rows))]
    assert len(rows) >= 4 and sums[-2] < until <= sums[-1]
    if stop_before is None:
        return
    draw, calls = rl.draw, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == stop_before:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(rl, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt), run_of(*words, run="cut") as run:
        run.folder.journal("guided", Guided).append([record])
        rl.rl(run, "base_rl", "base", run.problems)
    monkeypatch.setattr(rl, "draw", draw)
    with run_of(*words, run="cut") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        assert [row["step"] for row in run.metrics.rows("base_rl")] == [r["step"] for r in rows]
        ours = dict(run.decoder.named_parameters())
        assert all(torch.equal(ours[name], weights[name]) for name in weights)


def test_until_tokens_needs_a_schedule_that_does_not_end(tmp_path):
    words = ["data.train=x", "rl.until_tokens=5", "rl.optim.schedule=linear"]
    with pytest.raises(ValueError, match="they leave the number of steps open"):
        cli.load(None, words)
    with pytest.raises(ValueError, match=r"rl\.hint: expected"):
        cli.load(None, ["data.train=x", "rl.hint=1.5"])
