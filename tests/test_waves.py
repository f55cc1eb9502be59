"""Rules that end continuations early: replayed by hand, interrupted, and against enumeration."""

import math

import msgspec
import pytest

from benchmarks import collection
from intfast import checks, intervene
from intfast.config import Config, DataConfig, InterveneConfig
from intfast.records import Continuation, Intervention
from intfast.waves import Tried, chance_of_success, fit_beta, next_wave, waves

NEVER = InterveneConfig(continuations=6, wave=2, stop="never")
FIRST = msgspec.structs.replace(NEVER, stop="first_success")
ONE = msgspec.structs.replace(FIRST, one_per_problem=True)


def tried(problem, outcomes):
    return Tried(problem, {n: c == "+" for n, c in enumerate(outcomes)})


FOUND = [tried("p", "...+.."), tried("p", "....+."), tried("q", "......"), tried("r", "+.....")]


def drawn(config, found=FOUND):
    steps = list(waves(found, config))
    return [sum(len(wave_I[i]) for wave_I in steps) for i in range(len(found))]


def test_the_rules_by_hand():
    assert drawn(NEVER) == [6, 6, 6, 6]
    assert drawn(FIRST) == [4, 6, 6, 2]
    assert drawn(ONE) == [4, 4, 6, 2]
    assert drawn(msgspec.structs.replace(ONE, wave=3)) == [6, 6, 6, 3]
    assert drawn(msgspec.structs.replace(FIRST, wave=4)) == [4, 6, 6, 4]
    two = msgspec.structs.replace(FIRST, min_correct=2)
    assert drawn(two, [tried("p", "+.+..."), tried("p", "+....."), tried("q", "++++++")]) == [
        4,
        6,
        2,
    ]


@pytest.mark.parametrize(
    ("done", "stop", "expected"),
    [
        ({}, "never", [0, 1]),
        ({0: False}, "never", [1]),
        ({0: True, 1: False}, "never", [2, 3]),
        ({0: True, 1: False}, "first_success", []),
        ({0: False, 1: False}, "first_success", [2, 3]),
        ({0: True}, "first_success", [1]),
        (dict.fromkeys(range(6), False), "never", []),
    ],
)
def test_the_next_wave_is_what_is_missing(done, stop, expected):
    config = msgspec.structs.replace(NEVER, stop=stop)
    assert next_wave([Tried("p", done)], config) == [expected]


def test_futility_gives_up_on_what_is_unlikely_and_keeps_the_siblings_of_a_success():
    config = msgspec.structs.replace(FIRST, continuations=32, wave=8, stop="futility")
    config = msgspec.structs.replace(config, futility=0.3)
    found = [tried(f"p{n}", "." * 32) for n in range(20)]
    found += [tried("q", "+" * 32), tried("q", "." * 32)]
    steps = drawn(config, found)
    assert steps[:20] == [8] * 20
    assert steps[20:] == [8, 32]
    # After a wave, 8 right and 8 wrong: a success is missing in the next 24 draws with about 1e-4.
    # After the second, with 16 wrong, with about 1e-3.
    strict = msgspec.structs.replace(config, futility=0.9993)
    assert drawn(strict, found)[20:] == [8, 16]


def test_an_interrupted_wave_is_finished_before_anything_is_decided():
    for config in (FIRST, ONE, msgspec.structs.replace(ONE, stop="futility")):
        done = [{} for _ in FOUND]
        total = drawn(config)
        while any(
            wave_I := next_wave(
                [Tried(f.problem_id, d) for f, d in zip(FOUND, done, strict=True)], config
            )
        ):
            # One sample at a time, from the last intervention: as if killed after each.
            index = max(i for i, wave in enumerate(wave_I) if wave)
            sample = wave_I[index][-1]
            done[index][sample] = FOUND[index].done[sample]
        assert [len(d) for d in done] == total


def test_the_chance_of_a_success_is_that_of_the_beta_binomial():
    # Beta(1, 1) is Laplace's rule: after n failures the next m all fail with (n+1)/(n+m+1).
    assert chance_of_success((1.0, 1.0), 0, 3, 4) == pytest.approx(1 - 4 / 8)
    assert chance_of_success((1.0, 1.0), 0, 3, 0) == 0.0
    a, b, m = 0.7, 2.5, 5
    product = math.prod((b + 2 + j) / (a + 1 + b + 2 + j) for j in range(m))
    assert chance_of_success((a, b), 1, 2, m) == pytest.approx(1 - product)


def test_the_prior_is_found_again():
    # Half of the problems always right, half never: nearly all mass at 0 and 1.
    a, b = fit_beta([(20, 0)] * 10 + [(0, 20)] * 10)
    assert a / (a + b) == pytest.approx(0.5, abs=0.15) and a + b < 0.2
    # The same rate everywhere: concentrated.
    a, b = fit_beta([(10, 90)] * 30)
    assert a / (a + b) == pytest.approx(0.1, rel=0.15) and a + b > 100


def test_stopping_at_a_success_keeps_what_drawing_everything_keeps():
    candidates, records = stored()
    for wave in (1, 2, 3, 6):
        rule = msgspec.structs.replace(FIRST, wave=wave)
        drawn = collection.replay(candidates, records, rule)
        judged = intervene.judge(candidates, drawn, rule)
        assert [r.gate for r in judged] == ["kept", "kept", "unsolved", "kept"]


def test_settings_that_cannot_work_are_refused():
    bad = [
        InterveneConfig(one_per_problem=True, stop="never"),
        InterveneConfig(stop="futility", futility=0.0),
        InterveneConfig(stop="never", futility=0.2),
        InterveneConfig(stop="futility", min_correct=2),
    ]
    good = InterveneConfig(stop="futility", futility=0.2, one_per_problem=True)
    data = DataConfig(train="x.jsonl")
    counts = [len(checks.faults(Config(data=data, intervene=stage))) for stage in [*bad, good]]
    assert counts == [1] * len(bad) + [0]


# --- the benchmark's replay --------------------------------------------------------------------


def stored():
    candidates = [
        Intervention(
            id=f"{f.problem_id}{n}",
            problem_id=f.problem_id,
            attempt=n,
            sample=0,
            guided="",
            reply="",
            gate="kept",
        )
        for n, f in enumerate(FOUND)
    ]
    records = [
        Continuation(
            intervention_id=candidate.id,
            problem_id=f.problem_id,
            start="intervention",
            sample=sample,
            token_ids=[0] * 10,
            text="",
            finish_reason="stop",
            grade="correct" if right else "wrong",
            reason="",
        )
        for candidate, f in zip(candidates, FOUND, strict=True)
        for sample, right in f.done.items()
    ]
    return candidates, records


def test_replay_counts_what_a_rule_would_have_drawn():
    candidates, records = stored()
    paper = collection.count(collection.replay(candidates, records, NEVER))
    assert paper == {
        "continuations": 24,
        "tokens": 240,
        "unlocked_problems": 2,
        "kept_interventions": 3,
    }
    one = collection.count(collection.replay(candidates, records, ONE))
    assert one == {
        "continuations": 16,
        "tokens": 160,
        "unlocked_problems": 2,
        "kept_interventions": 2,
    }
