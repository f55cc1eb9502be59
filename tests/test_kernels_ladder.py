"""The rungs of the loss head on CUDA: kernels that fail at will, on a device that is not there."""

import dataclasses
import warnings

import pytest
import torch
from kernels_common import HAS_TRITON, INTERPRETED, inputs

from intfast import loss
from intfast.config import PolicyConfig
from intfast.kernels.head import ladder, plan
from intfast.kernels.head.plan import Head
from intfast.kernels.head.tiles import FALLBACK_TILES, INTERPRETER_TILE, ODDS_TILES
from intfast.kernels.linear_logprob import linear_logprob
from intfast.kernels.linear_objective import linear_objective
from intfast.kernels.objectives import CrossEntropy, Streams

pytestmark = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="needs triton and no device"
)
if HAS_TRITON:
    from intfast.kernels.head import odds, rows

T = 12
TABLE = ODDS_TILES[90]["logprob"]


class Refused(RuntimeError):
    """What Triton raises when a kernel does not compile."""


@pytest.fixture
def device(monkeypatch):
    """A Hopper card on which rungs fail by name; the list of what was launched."""
    failing, launched = set(), []
    monkeypatch.setattr(ladder, "_settled", {})
    monkeypatch.delenv(ladder.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def path(weight_VD, head):
        return "odds" if head.path == "auto" else head.path

    def tile(path, weight_VD, head):
        kind = "logprob" if head.entropy == "none" else "entropy"
        return (head.tile or ODDS_TILES[90][kind]) if path == "odds" else None

    monkeypatch.setattr(plan, "_resolve_path", path)
    monkeypatch.setattr(plan, "_resolve_tile", tile)

    def launch(name, run, *arguments):
        launched.append(name)
        if name in failing:
            raise Refused(f"{name}: PassManager::run failed\nand a page of IR")
        return run(*arguments)

    own_odds, own_rows, own_plain = odds.chunk, rows.chunk, ladder.chunks.plain.chunk

    def odds_chunk(hidden, weight, target, made, keep):
        name = "odds" if made.tile.warp_specialize else "odds-no-ws"
        name = name if made.tile.tma else "odds-no-tma"
        small = dataclasses.replace(made, tile=INTERPRETER_TILE)
        return launch(name, own_odds, hidden, weight, target, small, keep)

    monkeypatch.setattr(odds, "chunk", odds_chunk)
    monkeypatch.setattr(rows, "chunk", lambda *a: launch("rows", own_rows, *a))
    monkeypatch.setattr(ladder.chunks.plain, "chunk", lambda *a: launch("plain", own_plain, *a))
    return failing, launched


def step(**options):
    """(loss, gradients) of a cross-entropy."""
    hidden, weight, target = inputs(T, 8, 40)
    pair = hidden.requires_grad_(), weight.requires_grad_()
    streams = Streams(torch.linspace(0.1, 1, T))
    value = linear_objective(*pair, target, CrossEntropy(), streams, entropy="none", **options).loss
    return value.detach(), *torch.autograd.grad(value, pair)


def test_what_works_is_taken_without_a_word(device):
    _, launched = device
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = step()
    assert set(launched) == {"odds"}
    for x, y in zip(found, step(path="plain"), strict=True):
        torch.testing.assert_close(x, y)
    weight = inputs(T, 8, 40)[1]
    made = ladder.plan_for(T, weight, Head(entropy="none"))
    assert (made.path, made.tile, made.note) == ("odds", TABLE, "")


@pytest.mark.parametrize("number", range(1, len(ladder.RUNGS)))
def test_each_rung_falls_to_the_next_aloud(device, number):
    failing, launched = device
    failing |= set(ladder.RUNGS[:number])
    with pytest.warns(RuntimeWarning) as caught:
        found = step()
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(said) == number
    for text, name in zip(said, ladder.RUNGS, strict=False):
        assert f"{name} failed" in text and "PassManager" in text and "page of IR" not in text
        assert f"INTFAST_HEAD={name}" in text
    # Right all the same, in the layout of that rung.
    for x, y in zip(found, step(path="plain"), strict=True):
        torch.testing.assert_close(x, y)
    made = ladder.plan_for(T, inputs(T, 8, 40)[1], Head(entropy="none"))
    taken = ladder.RUNGS[number]
    assert made.path == taken.partition("-")[0]
    tiles = [TABLE, *(tiles["logprob"] for tiles in FALLBACK_TILES[90])]
    assert made.tile == (tiles[number] if made.path == "odds" else None)
    assert f"{ladder.RUNGS[number - 1]} failed with Refused" in made.describe()
    # Settled: nothing is tried again and nothing said.
    launched.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        step()
    assert set(launched) == {taken}


def test_a_gradient_through_the_entropy_has_a_ladder_of_its_own(device):
    failing, _ = device
    failing.add("odds")
    hidden, weight, target = inputs(T, 8, 40)
    with pytest.warns(RuntimeWarning, match="odds failed"):
        linear_logprob(hidden, weight, target, entropy="none")
    failing.clear()
    assert ladder.plan_for(T, weight, Head(entropy="value")).tile == ODDS_TILES[90]["entropy"]


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_the_switch_names_where_to_start(device, monkeypatch, name):
    _, launched = device
    monkeypatch.setenv("INTFAST_HEAD", name)
    step()
    assert set(launched) == {name}
    weight = inputs(T, 8, 40)[1]
    said = loss.head_plans(weight, T, PolicyConfig(), 1.0)
    # As the manifest of a run has it.
    assert all((f"INTFAST_HEAD={name}" in line) == (name != "odds") for line in said.values())


def test_a_name_that_is_no_rung_is_refused(device, monkeypatch):
    monkeypatch.setenv("INTFAST_HEAD", "fast")
    with pytest.raises(ValueError, match=r"INTFAST_HEAD: expected one of odds.*plain, got 'fast'"):
        step()


def test_what_a_caller_names_stands(device):
    failing, launched = device
    failing.add("odds")
    for options in ({"path": "odds"}, {"tile": TABLE}):
        with pytest.raises(Refused):
            step(**options)
    assert set(launched) == {"odds"}


def test_no_memory_is_not_a_kernel_that_fails(device, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(odds, "chunk", full)
    with pytest.raises(torch.OutOfMemoryError):
        step()


def test_what_was_settled_holds_in_compiled_code(device):
    failing, launched = device
    failing.add("odds")
    with pytest.warns(RuntimeWarning):
        want = step()
    launched.clear()
    torch._dynamo.reset()
    hidden, weight, target = inputs(T, 8, 40)

    def call(hidden, weight):
        streams = Streams(torch.linspace(0.1, 1, T))
        return linear_objective(
            hidden, weight, target, CrossEntropy(), streams, entropy="none"
        ).loss

    pair = hidden.requires_grad_(), weight.requires_grad_()
    value = torch.compile(call, fullgraph=True, backend="aot_eager")(*pair)
    torch.testing.assert_close(value.detach(), want[0])
    assert set(launched) == {"odds-no-ws"}
