"""The self-test of the engine finds shapes in which rows differ, and what follows from that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_cases import mixed_requests, native
from tiny import make_model

from intfast.engine import invariance
from intfast.model import fixed
from intfast.model.fixed import BLOCK


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, and no result of an earlier test."""
    monkeypatch.setattr(invariance, "_row_sizes", {})
    monkeypatch.setattr(invariance, "_attention", {})
    make_model(tmp_path, max_position_embeddings=512)
    return tmp_path


def nudged(out, by):
    """One unit in the last place more, in places that the library would choose."""
    return out.where(~by, torch.nextafter(out, torch.tensor(torch.inf)))


def test_parts_are_of_known_sizes():
    assert fixed.cut(480, (256, 128, 32)) == [
        slice(0, 256),
        slice(256, 384),
        *(slice(i, i + 32) for i in range(384, 480, 32)),
    ]
    assert fixed.cut(40, (32,)) == [slice(0, 32), slice(32, 40)]
    assert fixed.cut(40, ()) == [slice(0, 40)] and fixed.cut(0, (32,)) == [slice(0, 0)]


def test_it_holds_here(folder):
    shapes = native(folder).shapes
    assert shapes.holds and shapes.said == invariance.HOLDS
    assert shapes.rows[-1] == shapes.head[-1] == BLOCK


def test_a_product_that_depends_on_its_size_is_made_in_blocks(folder, monkeypatch):
    """A library whose larger calls round differently, as MKL's with two threads."""
    plain = F.linear

    def linear(x, weight, bias=None):
        out = plain(x, weight, bias)
        return nudged(out, torch.tensor(len(x) > 64))

    expected = native(folder).generate(mixed_requests(12))
    monkeypatch.setattr(invariance, "_row_sizes", {})
    monkeypatch.setattr(fixed.F, "linear", linear)
    engine = native(folder, max_rows=128)
    # This library may itself refuse 64.
    assert engine.shapes.holds and engine.shapes.head in ((64, BLOCK), (BLOCK,))
    assert max(engine.decoder.model.layers[0].mlp.down_proj.row_sizes) <= 64
    assert engine.generate(mixed_requests(12)) == expected


def test_attention_that_depends_on_its_width_has_one(folder, monkeypatch):
    plain = torch.bmm

    def bmm(left, right):
        return nudged(plain(left, right), torch.tensor(left.shape[2] not in (64, 256)))

    monkeypatch.setattr(torch, "bmm", bmm)
    shapes = native(folder).shapes
    assert shapes.holds and (shapes.chunk, shapes.slots) == (64, 64)


def test_a_library_without_any_order_is_said(folder, monkeypatch):
    plain = F.linear

    def linear(x, weight, bias=None):
        return nudged(plain(x, weight, bias), torch.arange(len(x))[:, None] % 7 == 0)

    monkeypatch.setattr(fixed.F, "linear", linear)
    shapes = native(folder).shapes
    assert not shapes.holds and "last bits may depend on its batch" in shapes.said
