"""vLLM on ranks that hold one model together: its shards are what is trained."""

import json
import re
import shutil
from pathlib import Path

import pytest
from engine_cases import needs_vllm
from test_engine_vllm import make
from test_ranks import World, codes, equal, gap, tensors
from test_shards_world import Shards

pytestmark = needs_vllm
RL = ["train", "rl", "rollout.engine=vllm", "rollout.cache_gib=0.05", "rollout.max_rows=64"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3 untied", "qwen2", "llama", "mistral"])
def test_a_step_in_vllms_own_shards_reaches_its_samples(family, tmp_path):
    name, _, untied = family.partition(" ")
    changes = {"vocab_size": 152, "tie_word_embeddings": not untied and name == "qwen3"}
    make(tmp_path / "model", name, **changes)
    code, said = Shards(2, tmp_path, 2, tmp_path / "model").end()
    # vLLM ends its groups as the process does.
    assert (tmp_path / "vllm.json").exists(), said
    for found in json.loads((tmp_path / "vllm.json").read_text()):
        assert found["same"] and found["addresses"] and found["version"] == 1
        assert found["before"] < 1e-5 and found["after"] < 1e-5 and found["moved"] > 1e-2, found
    assert code == 0, said
    assert not [*Path("/dev/shm").glob("*cpushm*")]


def test_a_broken_alias_on_one_rank_ends_all(tmp_path):
    make(tmp_path / "model", "qwen3", vocab_size=152)
    code, said = Shards(2, tmp_path, 2, tmp_path / "model", "break").end()
    assert code != 0 and "no longer share their storage with the engine" in said, said
    assert not (tmp_path / "vllm.json").exists()


def test_a_killed_rank_ends_all_and_both_worlds_continue(tmp_path):
    whole, killed, one = (tmp_path / name for name in ("whole", "killed", "one"))
    # At once: two worlds on one machine do not meet, and what a kill leaves stands in no way.
    first = World(2, *RL, "ranks.tp=2", f"run={whole}")
    code, said = World(2, *RL, "ranks.tp=2", f"run={killed}", fault="kill:1:3").end()
    assert code != 0 and "-9" in codes(said), said
    assert not [*Path("/dev/shm").glob("*cpushm*")]
    code, said = first.end()
    assert code == 0, said
    shutil.copytree(killed, one)
    code, said = World(2, *RL, "ranks.tp=2", f"run={killed}").end()
    assert code == 0, said
    expected = tensors(whole, "base_rl", 3)
    assert equal(tensors(killed, "base_rl", 3), expected)
    code, said = World(None, *RL, f"run={one}").end()
    # The copy lies elsewhere, which is said in the same line.
    assert code == 0 and re.search(r"continues with run = .*, ranks\.tp = 1 \(was 2\)", said), said
    assert gap(tensors(one, "base_rl", 3), expected) < 1e-5
