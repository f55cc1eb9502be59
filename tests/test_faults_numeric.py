"""Numbers that are not finite, wherever they enter: nothing is learned from them, aloud."""

import contextlib
import math
from dataclasses import replace

import bounds
import pytest
import torch
from test_learn import SFT, folder, sft_examples, weights_of  # noqa: F401
from test_parity import altered, one_is_nan, run_of  # noqa: F401

from intfast import credit, loss, parity, rl, sft, update
from intfast.batch import pack
from intfast.config import BatchConfig, PolicyConfig
from intfast.model import optim
from intfast.records import Example

PLACES = ["loss", "loss alone", "gradient", "hidden", "log-prob"]
NAMED = {
    "loss": "the loss of micro-batch",
    "loss alone": "the loss of micro-batch",
    "gradient": "the gradient of model.layers.0.mlp.down_proj.weight of micro-batch",
    "hidden": "the hidden states of micro-batch",
    "log-prob": "the loss of micro-batch",
}


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that stages make, in order."""
    made = []

    class Kept(optim.Optimizer):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(self)

        def close(self):
            self.final = moments(self)
            super().close()

    monkeypatch.setattr(update, "Optimizer", Kept)
    return made


def poisoned_loss(function, factor, offset):
    def poisoned(*arguments, **options):
        loss_sum, stats = function(*arguments, **options)
        loss_sum = loss_sum * factor + offset
        return loss_sum, stats | {"loss_sum": loss_sum.detach().double()}

    return poisoned


@contextlib.contextmanager
def planted(run, place, value=math.nan):
    """`value` in one place of every update inside."""
    with pytest.MonkeyPatch.context() as patch:
        if place.startswith("loss"):
            change = (value, 0.0) if place == "loss" else (1.0, value)
            for name in ("sft_loss", "policy_loss"):
                patch.setattr(loss, name, poisoned_loss(getattr(loss, name), *change))
        elif place == "hidden":
            states = run.decoder.forward

            def poisoned(*arguments):
                hidden = states(*arguments)
                return with_first(hidden, value) if torch.is_grad_enabled() else hidden

            patch.setattr(run.decoder, "forward", poisoned)
        elif place == "log-prob":
            logprobs = rl.logprobs
            poison = lambda *a: [with_first(x, value) for x in logprobs(*a)]  # noqa: E731
            patch.setattr(rl, "logprobs", poison)
        weight = run.decoder.model.layers[0].mlp.down_proj.weight
        hook = None
        if place == "gradient":
            hook = weight.register_hook(lambda grad: torch.full_like(grad, value))
        yield
        if hook:
            hook.remove()


def with_first(x, value):
    return torch.cat([x[:1] * value, x[1:]])


def moments(optimizer):
    return {name: tensor.clone() for name, tensor in optimizer.state_tensors()[0].items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- a poisoned update --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
def test_rl_learns_nothing_from_it_and_stops_after_k_in_a_row(
    run_of,  # noqa: F811
    optimizers,
    monkeypatch,
    place,
    dtype,
):
    monkeypatch.setattr(parity, "check_parity", lambda *_: {})
    monkeypatch.setattr(optim, "MAX_SKIPPED", 4)
    options = (f"model.dtype={dtype}", "rl.minibatches=2")
    with run_of(*options) as run:
        before = weights_of(run)
        with (
            planted(run, place),
            pytest.raises(RuntimeError, match="for 4 updates in a row") as caught,
        ):
            rl.rl(run, "base_rl", "base", run.problems)
        assert same(weights_of(run), before)
        state = optimizers[0].final
        (row,) = run.metrics.rows("base_rl")
    assert state
    assert all(not state[name].any() for name in state if not name.startswith("master."))
    assert row["skipped"] == row["updates"] == 2
    assert row["cause"].startswith(f"base_rl: {NAMED[place]} 1 of ")
    assert NAMED[place] in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [place for place in PLACES if place != "log-prob"])
def test_sft_learns_nothing_from_it_and_goes_on(
    run_of,  # noqa: F811
    monkeypatch,
    place,
    value,
):
    original, taken = sft.update, {}

    def watched(stage, packed, divisor, loss_of):
        run, optimizer = stage.run, stage.optimizer
        step = optimizer.num_steps + 1
        before = weights_of(run) | moments(optimizer)
        with planted(run, place, value) if step == 3 else contextlib.nullcontext():
            result = original(stage, packed, divisor, loss.sft_loss)
        taken[step] = not same(weights_of(run) | moments(optimizer), before)
        return result

    monkeypatch.setattr(sft, "update", watched)
    with run_of(*SFT, "sft.epochs=2") as run:
        sft.sft(run, "int", sft_examples(run))
        rows = run.metrics.rows("int")
        said = "\n".join(run.metrics.console.lines)
    assert taken == {1: True, 2: True, 3: False, 4: True}
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0]
    assert f"SKIPPED, not finite: int: {NAMED[place]} 1 of 2" in said


def test_the_micro_batch_is_named(run_of, monkeypatch):  # noqa: F811
    sft_loss = loss.sft_loss
    with run_of(*SFT, "sft.epochs=1", "sft.batch_size=6", "batch.max_tokens=70") as run:
        examples = sft_examples(run)
        batches = pack(examples, run.config.batch).batches
        assert len(batches) >= 3

        def poisoned(hidden_ND, weight_VD, batch):
            loss_sum, stats = sft_loss(hidden_ND, weight_VD, batch)
            bad = batch.examples_S == batches[2].examples_S
            return (loss_sum * math.inf if bad else loss_sum), stats

        # The order of SFT is shuffled; the packing of all examples is not.
        monkeypatch.setattr(sft, "shuffled", lambda count, seed: list(range(count)))
        monkeypatch.setattr(loss, "sft_loss", poisoned)
        sft.sft(run, "int", examples)
        (row,) = run.metrics.rows("int")
    assert f"the loss of micro-batch 3 of {len(batches)}" in row["cause"]


def test_a_fault_that_does_not_come_back_is_called_one(run_of, monkeypatch):  # noqa: F811
    sft_loss, calls = loss.sft_loss, []

    def once(*arguments):
        loss_sum, stats = sft_loss(*arguments)
        calls.append(1)
        return (loss_sum * math.nan if len(calls) == 1 else loss_sum), stats

    monkeypatch.setattr(loss, "sft_loss", once)
    with run_of(*SFT, "sft.epochs=1", "sft.batch_size=6") as run:
        sft.sft(run, "int", sft_examples(run))
        (row,) = run.metrics.rows("int")
    assert "nothing when" in row["cause"] and "hardware" in row["cause"]


def test_sampler_log_probs_and_rewards_that_are_nan_are_refused(
    run_of,  # noqa: F811
    monkeypatch,
):
    with run_of("rl.sampling.temperature=1") as run:
        before = weights_of(run)
        with monkeypatch.context() as patch:
            patch.setitem(credit.REWARDS, "wrong", math.nan)
            with pytest.raises(ValueError, match="reward of group 0: expected a finite number"):
                rl.rl(run, "base_rl", "base", run.problems)
        assert same(weights_of(run), before)
    monkeypatch.setattr(parity, "check_parity", lambda *_: {})
    monkeypatch.setattr("intfast.engine.start.NativeEngine", altered(one_is_nan))
    with run_of(run="other") as run:
        with pytest.raises(ValueError, match="sampler_logprobs of example 0: expected finite"):
            rl.rl(run, "base_rl", "base", run.problems)
        assert same(weights_of(run), before)


# --- zeros and counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["grpo", "gspo", "cispo", "reinforce"])
def test_advantage_zero_gives_exactly_zero_gradient(objective):
    torch.manual_seed(0)
    examples = [
        Example(
            token_ids=[1, 2, 3, 4, 5],
            weights=[0, 0, 1, 1, 1],
            advantages=[0.0] * 5,
            sampler_logprobs=[0, 0, -1.0, -2.0, -30.0],
        )
    ]
    (batch,) = pack(examples, BatchConfig()).batches
    hidden_ND = torch.randn(3, 8, requires_grad=True)
    weight_VD = torch.randn(9, 8, requires_grad=True)
    batch = replace(batch, old_logprob_N=torch.randn(3))
    config = PolicyConfig(objective=objective)
    loss_sum, _ = loss.policy_loss(hidden_ND, weight_VD, batch, config)
    loss_sum.backward()
    assert loss_sum.item() == 0
    assert not hidden_ND.grad.any() and not weight_VD.grad.any()


def test_three_micro_batches_give_the_update_of_one(run_of, monkeypatch):  # noqa: F811
    monkeypatch.setattr(optim, "EPS", 10.0)
    # A large rate: the update is far above the last place of the weights. Clipping would hide that
    # all of a gradient is too large.
    options = [*SFT, "sft.epochs=1", "sft.batch_size=6"]
    options += ["sft.optim.lr=1.0", "sft.optim.max_grad_norm=0"]
    after = []
    for where, tokens in (("one", 10_000), ("many", 70)):
        with run_of(*options, f"batch.max_tokens={tokens}", run=where) as run:
            examples = sft_examples(run)
            # Unequal counts: a mean of means would differ.
            first = examples[0].token_ids
            examples[0] = Example(token_ids=first, weights=[0.0] + [3.0] * (len(first) - 1))
            count = len(pack(examples, run.config.batch).batches)
            terms = sum(len(example.token_ids) for example in examples)
            before = weights_of(run)
            sft.sft(run, "int", examples)
            after.append((count, weights_of(run), run.metrics.rows("int")[0]["loss"]))
    (one, ours, our_loss), (many, theirs, their_loss) = after
    assert one == 1 and many >= 3
    # All terms of the loss are positive.
    assert our_loss == pytest.approx(their_loss, abs=bounds.of_sum(terms, our_loss))
    bounds.assert_same_update(ours, theirs, before, terms)


def test_statistics_of_several_updates_keep_extremes_and_counts():
    rows = [
        {"num_tokens": 10.0, "ratio_max": 1.0, "ratio_min": 0.5, "ratio_mean": 1.0, "skipped": 0},
        {"num_tokens": 30.0, "ratio_max": 9.0, "ratio_min": 0.9, "ratio_mean": 2.0, "skipped": 1}
        | {"cause": "here"},
    ]
    assert loss.together(rows) == {
        "updates": 2,
        "num_tokens": 40.0,
        "ratio_max": 9.0,
        "ratio_min": 0.5,
        "ratio_mean": 1.75,
        "skipped": 1,
        "cause": "here",
    }
