"""What does not fit is counted and dropped, never cut."""

import msgspec
import pytest

from intfast import intake
from intfast.config import AttemptConfig, BatchConfig, Config, RlConfig, SamplingConfig, SftConfig
from intfast.records import Example, Problem

PROBLEMS = [Problem(id=str(n), problem="x " * n, answer="1", source=f"t:{n}") for n in (5, 50, 90)]
SAMPLING = SamplingConfig(max_new_tokens=20)


def prompt_of(problem: Problem) -> list[int]:
    return [0] * len(problem.problem.split())


def ids(problems) -> list[str]:
    return [problem.id for problem in problems]


@pytest.mark.parametrize(("context", "kept"), [(110, 3), (109, 2), (70, 2), (69, 1)])
def test_a_prompt_must_leave_room_to_answer(context, kept):
    problems, said = intake.fitting_problems(PROBLEMS, prompt_of, context, [SAMPLING])
    assert problems == PROBLEMS[:kept]
    assert bool(said) == (kept < 3)
    if said:
        assert f"dropped {3 - kept} of 3 problems" in said and "up to 90 tokens" in said
        assert "t:90" in said


def test_a_rollout_must_fit_the_training_batch():
    for budget, kept in ((110, 3), (109, 2)):
        found, _ = intake.fitting_problems(PROBLEMS, prompt_of, 1000, [SAMPLING], budget)
        assert len(found) == kept


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"dropped 3 of 3 problems .*lower max_new_tokens"):
        intake.fitting_problems(PROBLEMS, prompt_of, 10, [SAMPLING])
    assert intake.fitting_problems([], prompt_of, 10, [SAMPLING]) == ([], "")


def test_only_the_stages_of_the_run_decide():
    small, large = SAMPLING, SamplingConfig(max_new_tokens=60)
    config = Config(
        attempts=AttemptConfig(sampling=small),
        rl=RlConfig(sampling=large),
        batch=BatchConfig(max_tokens=100),
    )

    def kept(**changes) -> list[str]:
        changed = msgspec.structs.replace(config, **changes)
        return ids(intake.fitting_train(PROBLEMS, prompt_of, 120, changed)[0])

    assert kept() == ["5"]
    assert kept(batch=BatchConfig(max_tokens=100, too_long="alone")) == ["5", "50"]
    assert kept(rl=msgspec.structs.replace(config.rl, steps=0)) == ["5", "50", "90"]
    assert kept(sft=SftConfig(epochs=0), batch=BatchConfig(max_tokens=110)) == ["5", "50"]


def test_sequences_above_the_budget_are_counted_and_not_cut():
    examples = [Example(token_ids=[1] * n, weights=[1.0] * n) for n in (3, 9, 10)]
    found = intake.Fitting(examples, BatchConfig(max_tokens=9))
    assert list(found) == examples[:2] and "dropped 1 of 3" in found.said
    for batch in (BatchConfig(max_tokens=1, too_long="alone"), BatchConfig(max_tokens=10)):
        found = intake.Fitting(examples, batch)
        assert (list(found), found.said) == (examples, "")
