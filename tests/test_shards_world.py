"""Ranks that hold one model together, as processes: updates, checkpoints, guards, refusals."""

import json
from pathlib import Path

import pytest
from test_ranks import World

from intfast import train

WORKER = Path(__file__).with_name("shards_worker.py")
CONFIG = Path(__file__).parents[1] / "configs/quickstart_short.toml"


class Shards(World):
    """A world whose ranks run another script."""

    WORKER = WORKER


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory):
    """(ranks, what they found), two to a copy of the model."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    code, said = Shards(request.param, folder, 2).end()
    assert code == 0, said
    return request.param, json.loads((folder / "world.json").read_text())


def test_updates_checkpoints_and_guards(world):
    num, found = world
    exact, narrow = found["updates"]["torch.float32"], found["updates"]["torch.bfloat16"]
    assert exact["grad_norm"] < 1e-6 and exact["loss"] < 1e-6 and exact["weights"] < 0.02
    assert narrow["grad_norm"] < 0.05 and narrow["loss"] < 0.01
    # The mutants: the norm takes norms twice; q_norm and k_norm learn from the own heads.
    assert found["counted twice"]["grad_norm"] > 1e-5
    assert found["not summed"]["grad_norm"] > 2e-6 and found["not summed"]["weights"] > 0.05
    assert found["resumed"] == [True] * num
    bad = "the gradient of model.layers.1.mlp.down_proj.weight of micro-batch 1 of 3"
    assert all(skipped and kept and bad in cause for skipped, kept, cause in found["skipped"])
    assert len(found["skipped"]) == num
    for name, said in found["drifted"].items():
        # Two shards differ anyway; the same shard of two copies must not.
        is_seen = num == 4 or name == "norm.weight"
        assert all((f"first model.{name}" in text) == is_seen for text in said), (name, said)
    assert all("have not the same tokens" in text for text in found["tokens"])
    assert found["same tokens"] == [""] * num


def test_what_cannot_work_is_refused_before_any_work(tmp_path, capsys):
    words = [str(CONFIG), f"run={tmp_path / 'run'}", "ranks.tp=2"]
    assert train.main(words) == 2
    assert "ranks.tp = 2 needs a number of ranks that it divides, got 1" in capsys.readouterr().err
    assert train.main([*words, "--dry-run"]) == 2
    assert "add --ranks 2" in capsys.readouterr().err
    assert train.main([*words, "--dry-run", "--ranks", "4"]) == 0
    said = capsys.readouterr().out
    assert "Layout: 4 ranks, 2 data parallel x 2 tensor parallel; weights in 2 shards" in said
    assert "the smallest ranks.tp that fits: 1" in said
    assert train.main([*words[:2], "ranks.tp=3", "--dry-run", "--ranks", "3"]) == 2
    assert "does not divide the model's 2 key/value heads" in capsys.readouterr().err
    code, said = Command(2, *words, "rollout.engine=native").end()
    assert code != 0 and said.count("needs vLLM: the embedded engine holds whole models") == 1
    assert not (tmp_path / "run").exists()


class Command(World):
    """A world whose ranks run the command."""

    WORKER = Path(train.__file__)
