"""The parity gate: every planted fault stops the run, and a sound engine passes."""

import copy
import math

import bounds
import pytest
import torch
from msgspec.structs import replace as change
from small_run import Quiet, rounding_of, words
from test_learn import folder, weights_of  # noqa: F401

from intfast import cli, collect, parity, rl
from intfast.engine.native import NativeEngine
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade, Grader
from intfast.run import open_run


@pytest.fixture
def run_of(folder, tmp_path, monkeypatch):  # noqa: F811
    """Builds the parts of a run whose completions are right in turn."""

    def grade(self, submissions):
        reasons = [Reason.CORRECT if n % 2 else Reason.WRONG for n, _ in enumerate(submissions)]
        return [Grade(status=reason.status, reason=reason) for reason in reasons]

    monkeypatch.setattr(Grader, "grade_many", grade)

    def make(*overrides, run="run"):
        settings = [
            *words(folder, tmp_path / run, max_new_tokens=8),
            "rl.steps=4",
            "rl.problems_per_step=4",
            "rl.group_size=4",
            "parity.every=2",
            "evaluate.samples=1",
            *overrides,
        ]
        return open_run(cli.load(None, settings), Quiet())

    return make


def rows(run):
    return run.metrics.rows("parity")


# --- a sound engine -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("rl.sampling.temperature=1.7",),
        ("rl.minibatches=4",),
        ("rl.sampling={temperature=0.9, top_p=0.8, top_k=20, max_new_tokens=8}",),
        ("model.dtype=bfloat16",),
    ],
    ids=" ".join,
)
def test_the_native_engine_passes_at_start_and_every_n_steps(run_of, tmp_path, options):
    """Below the thresholds, which are promises, and no further off than transformers is."""
    with run_of(*options) as run:
        rl.rl(run, "base_rl", "base", run.problems)
        found = rows(run)
        peer = bounds.PEER * rounding_of(run, tmp_path / "trained").mean()
        peer /= min(1.0, run.config.rl.sampling.temperature)
    assert [row["of"] for row in found] == [
        "base_rl in training",
        "base_rl step 1",
        "base_rl step 2",
        "base_rl step 4",
    ]
    for row in found:
        assert abs(row["signed"]) <= row["mean"] <= row["p99"] <= row["max"]
        assert row["mean"] < min(peer, row["threshold"])
        assert row["tokens"] >= 20
        assert row["ratio_min"] <= row["ratio_p01"] <= row["ratio_p99"] <= row["ratio_max"]
    # A policy of which every token has become certain differs by nothing.
    assert found[0]["mean"] > 0


def test_each_set_of_weights_is_checked_once_before_it_generates(run_of):
    with run_of() as run:
        collect.evaluation(run, "base")
        parity.before_generating(run)
        assert [row["of"] for row in rows(run)] == ["base"]
        run.changed("base")
        parity.before_generating(run)
        assert len(rows(run)) == 2


def test_a_resumed_run_is_checked_again(run_of, monkeypatch):
    with run_of("rl.checkpoint_every=1") as run:
        monkeypatch.setattr(rl, "_line", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rl.rl(run, "base_rl", "base", run.problems)
    monkeypatch.undo()
    with run_of("rl.checkpoint_every=1") as run:
        before = len(rows(run))
        parity.before_generating(run)
        assert len(rows(run)) == before + 1


def test_the_gate_changes_no_result(run_of, monkeypatch):
    def trained(run):
        with run_of(run=run) as run:
            rl.rl(run, "base_rl", "base", run.problems)
            return weights_of(run), [row["reward"] for row in run.metrics.rows("base_rl")]

    checked, rewards = trained("checked")
    monkeypatch.setattr(parity, "check_parity", lambda *_: {})
    monkeypatch.setattr(parity, "_check_samples", lambda *_: None)
    unchecked, same_rewards = trained("unchecked")
    assert rewards == same_rewards
    assert all(torch.equal(checked[name], unchecked[name]) for name in checked)


def test_a_finished_stage_generates_nothing_for_the_gate(run_of, monkeypatch):
    with run_of() as run:
        rl.rl(run, "base_rl", "base", run.problems)
        collect.evaluation(run, "base")
    with run_of() as run:
        monkeypatch.setattr(NativeEngine, "generate", lambda *_: pytest.fail("generated"))
        rl.rl(run, "base_rl", "base", run.problems)
        collect.evaluation(run, "base")


# --- planted faults -----------------------------------------------------------------------------


class StaleEngine(NativeEngine):
    """Reads a copy of the weights, which no update reaches."""

    def __init__(self, decoder, *arguments, **options):
        super().__init__(copy.deepcopy(decoder), *arguments, **options)


class Copying(StaleEngine):
    """The control: the copy is renewed when the engine is told."""

    def __init__(self, decoder, *arguments, **options):
        self.source = decoder
        super().__init__(decoder, *arguments, **options)

    def weights_changed(self):
        self.decoder.load_state_dict(self.source.state_dict())
        super().weights_changed()


def altered(alter):
    """An engine whose completions are changed by `alter(completion)` on their way."""

    class Altered(NativeEngine):
        def generate(self, requests_P, on_finished=None, more=None):
            def ended(p, g, completion):
                if on_finished is not None:
                    on_finished(p, g, alter(completion))

            found = super().generate(requests_P, ended, more)
            return [[alter(completion) for completion in group] for group in found]

    return Altered


class Hotter(NativeEngine):
    """Draws at another temperature than it was asked for."""

    def generate(self, requests_P, on_finished=None):
        hotter = [
            change(r, sampling=change(r.sampling, temperature=1.25 * r.sampling.temperature))
            for r in requests_P
        ]
        return super().generate(hotter, on_finished)


class Truncating(NativeEngine):
    """Adds a top-k of its own, as a generation_config.json would."""

    def generate(self, requests_P, on_finished=None):
        truncated = [change(r, sampling=change(r.sampling, top_k=20)) for r in requests_P]
        return super().generate(truncated, on_finished)


def shifted(completion):
    return change(completion, logprobs=completion.logprobs[1:] + completion.logprobs[:1])


def one_is_nan(completion):
    return change(completion, logprobs=[math.nan, *completion.logprobs[1:]])


def rounded(completion):
    """Log-probs of logits in bfloat16."""
    return change(completion, logprobs=torch.tensor(completion.logprobs).bfloat16().tolist())


def older(completion):
    return change(completion, policy_version=completion.policy_version - 1)


def run_with(run_of, monkeypatch, engine, *options, run="run"):
    monkeypatch.setattr("intfast.engine.start.NativeEngine", engine)
    with run_of(*options, run=run) as run:
        rl.rl(run, "base_rl", "base", run.problems)
        return run


def test_an_engine_with_a_copy_passes_when_it_renews_it(run_of, monkeypatch):
    run_with(run_of, monkeypatch, Copying)


def test_stale_weights_stop_the_run_at_the_next_check(run_of, monkeypatch):
    with pytest.raises(RuntimeError, match=r"(?s)base_rl step 2: .*stale weights"):
        run_with(run_of, monkeypatch, StaleEngine)


def test_weights_changed_without_a_word_stop_the_run(run_of, monkeypatch):
    """The trainer forgets to tell an engine that keeps a copy."""
    update = rl.update

    def forgetful(stage, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(stage.run.sampler.engine, "weights_changed", lambda: None)
            return update(stage, *arguments)

    monkeypatch.setattr(rl, "update", forgetful)
    with pytest.raises(RuntimeError, match=r"(?s)base_rl step 2: .*weights_changed"):
        run_with(run_of, monkeypatch, Copying)


@pytest.mark.parametrize(
    "engine",
    [Hotter, Truncating, altered(shifted), altered(one_is_nan), altered(rounded)],
    ids=["temperature", "truncation", "off by one", "nan", "bfloat16 log-probs"],
)
def test_a_fault_of_sampling_stops_the_run_at_the_start(run_of, monkeypatch, engine):
    with pytest.raises(
        RuntimeError, match=r"(?s)parity of base_rl in training: .*allowed"
    ) as caught:
        run_with(run_of, monkeypatch, engine)
    text = str(caught.value)
    for named in ("temperature", "prefix cache", "vocabulary", "positions"):
        assert named in text


def test_tokens_of_another_policy_version_are_stale(run_of, monkeypatch):
    with pytest.raises(RuntimeError, match="stale"):
        run_with(run_of, monkeypatch, altered(older))


def test_the_row_of_a_failed_check_is_kept(run_of, monkeypatch):
    with pytest.raises(RuntimeError):
        run_with(run_of, monkeypatch, Hotter)
    with run_of() as run:
        assert rows(run)[0]["mean"] > rows(run)[0]["threshold"]


def test_the_threshold_decides(run_of, monkeypatch):
    monkeypatch.setitem(parity.THRESHOLDS, "float32", 0.1)
    run_with(run_of, monkeypatch, altered(rounded))
    monkeypatch.setitem(parity.THRESHOLDS, "float32", 1e-9)
    with pytest.raises(RuntimeError, match="allowed are 1e-09"):
        run_with(run_of, monkeypatch, NativeEngine, run="strict")


@pytest.mark.parametrize("off,outcome", [(0.02, "silent"), (0.04, "said"), (0.06, "stopped")])
def test_a_spread_that_was_seen_of_sound_pairs_is_said_and_goes_on(
    run_of, monkeypatch, capsys, off, outcome
):
    """vLLM beside a bfloat16 trainer: up to 0.03 nat reported, which a fixed 0.03 would stop."""

    def spread(completion):
        signs = [(-1) ** n for n in range(len(completion.logprobs))]
        found = [x + off * sign for x, sign in zip(completion.logprobs, signs, strict=True)]
        return change(completion, logprobs=found)

    said = []
    monkeypatch.setattr("intfast.state.metrics.Metrics.say", lambda self, text: said.append(text))
    options = "model.dtype=bfloat16", "rl.steps=1"
    if outcome == "stopped":
        with pytest.raises(RuntimeError, match=r"allowed are 0\.05 in bfloat16"):
            run_with(run_of, monkeypatch, altered(spread), *options)
        return
    run_with(run_of, monkeypatch, altered(spread), *options)
    warned = [text for text in said if "parity of" in text]
    assert bool(warned) == (outcome == "said")
    assert all("the run stops above 0.05" in text for text in warned)


def test_statistics_against_numbers_by_hand():
    trainer = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    values = parity.compare(trainer, trainer - torch.tensor([0.1, -0.3, 0.0, 0.2]))
    assert values["mean"] == pytest.approx(0.15)
    # Rounding to fp32 of log-probs up to 4, and of their differences.
    assert values["signed"] == pytest.approx(0.0, abs=bounds.worst(2, 4.3))
    assert values["max"] == pytest.approx(0.3)
    assert values["ratio_max"] == pytest.approx(math.exp(0.2))
    assert values["ratio_min"] == pytest.approx(math.exp(-0.3))
