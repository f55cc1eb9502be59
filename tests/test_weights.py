"""Hugging Face folders in and out: the same bits both ways, and an error before any work."""

from __future__ import annotations

import json

import bounds
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, config_dict, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from intfast.model import folder as model_folder
from intfast.model import weights
from intfast.model.decoder import Architecture, Decoder, PackedAttention
from intfast.model.folder import load_tokenizer

TOKENS = torch.tensor([[5, 61, 7, 7, 30, 2, 9]])


def logits_of(folder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """One folder with a model that no test changes."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, "qwen3")
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_and_saved_is_the_same_model_bit_for_bit(family, tied, sharded, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    dtype = torch.bfloat16 if sharded else torch.float32
    biases = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    make_model(
        source,
        family,
        dtype=dtype,
        shard_size="30KB" if sharded else "5GB",
        tie_word_embeddings=tied,
        **biases,
    )
    assert (len(list(source.glob("*.safetensors"))) > 2) == sharded
    decoder, hf = weights.load(source, dtype)
    assert hf == json.loads((source / "config.json").read_text())
    assert weights.save(decoder, source, out, max_shard_bytes=40_000 if sharded else 10**9) == out
    assert (out / weights.INDEX).is_file() == sharded
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != tied
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {x.dtype for x in after.values()} == {dtype}
    assert torch.equal(logits_of(source), logits_of(out))
    hidden_TD = decoder(TOKENS[0], torch.arange(7), PackedAttention([7]))
    ours, theirs = (
        x.float().log_softmax(-1) for x in (decoder.logits(hidden_TD), logits_of(out)[0])
    )
    peer = AutoModelForCausalLM.from_pretrained(out).eval()
    assert (ours - theirs).abs().max() <= bounds.of_log_probs(peer, TOKENS.tolist())


def test_shards_respect_the_limit_and_the_index_names_every_tensor(source, tmp_path):
    decoder, _ = weights.load(source)
    out = weights.save(decoder, source, tmp_path / "out", max_shard_bytes=50_000)
    index = json.loads((out / weights.INDEX).read_text())
    for file in out.glob("*.safetensors"):
        content = load_file(file)
        assert sum(x.nbytes for x in content.values()) <= 50_000
        assert all(index["weight_map"][name] == file.name for name in content)
    assert index["weight_map"].keys() == weights.slices(decoder.config).keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_of(out).values())


def test_the_dtype_is_converted_and_recorded(source, tmp_path):
    decoder, _ = weights.load(source, torch.bfloat16)
    out = weights.save(decoder, source, tmp_path / "out")
    expected = {name: x.to(torch.bfloat16) for name, x in tensors_of(source).items()}
    assert all(torch.equal(x, expected[name]) for name, x in tensors_of(out).items())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_tokenizer_and_generation_config_come_along(source, tmp_path):
    decoder, hf = weights.load(source)
    out = weights.save(decoder, source, tmp_path / "out")
    names = {file.name for file in source.iterdir()}
    assert {file.name for file in out.iterdir()} == names
    for name in names - {"model.safetensors", "config.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    text = "12 + x = 3.\n"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    bare = weights.save(decoder, hf, tmp_path / "bare")
    assert {file.name for file in bare.iterdir()} == {"config.json", "model.safetensors"}


def test_fused_rows_cover_every_parameter_once():
    config = Architecture.from_hf(config_dict("qwen2"))
    parameters = dict(Decoder(config, device="meta").named_parameters())
    rows = {name: [] for name in parameters}
    for place in weights.slices(config).values():
        rows[place.parameter] += range(place.start, place.stop)
    assert all(rows[name] == list(range(len(p))) for name, p in parameters.items())


def test_others_may_read_what_was_saved(source, tmp_path):
    out = weights.save(weights.load(source)[0], source, tmp_path / "out")
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_save_leaves_nothing_behind_when_it_fails(source, tmp_path, monkeypatch):
    decoder, hf = weights.load(source)
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        weights.save(decoder, source, out)
    with pytest.raises(ValueError, match="config of another model"):
        weights.save(decoder, {**hf, "rms_norm_eps": 0.5}, tmp_path / "other")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(weights.tensorfile, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save(decoder, source, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def refuse(folder, *parts):
    with pytest.raises(ValueError) as error:
        weights.load(folder)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_folder_or_config_is_named(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "there is no such folder")
    refuse(tmp_path, "found no config.json")
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path, "config.json: not valid JSON")


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, "no weights; expected model.safetensors or model.safetensors.index.json")
    (folder / weights.INDEX).write_text(
        json.dumps({"weight_map": {"x": "model-00001.safetensors"}})
    )
    refuse(folder, "names files that are missing: ['model-00001.safetensors']")


def shards(folder, names, index=weights.INDEX):
    """An index that names one shard a tensor of the single file, and the shards."""
    tensors = load_file(folder / "model.safetensors")
    parts = {name: {} for name in names}
    for i, (key, tensor) in enumerate(tensors.items()):
        parts[names[i % len(names)]][key] = tensor
    for name, content in parts.items():
        save_file(content, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, content in parts.items() for key in content}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_weights_of_two_savings_are_refused_by_name(folder):
    """Nothing tells the old ones from the new, and transformers may read the others."""
    shards(folder, PARTS)
    refuse(folder, f"{weights.INDEX} and model.safetensors both claim to be the weights")
    (folder / "model.safetensors").rename(folder / "aside.safetensors")
    weights.check(folder)
    for stray in ("model-00003-of-00003.safetensors", "model.fp16-00001-of-00002.safetensors"):
        (folder / stray).write_bytes(b"")
        refuse(folder, weights.INDEX, stray, "remove what is old")
        (folder / stray).unlink()
    second = folder / "model.safetensors.index.fp16.json"
    second.write_bytes((folder / weights.INDEX).read_bytes())
    refuse(folder, weights.INDEX, second.name, "both claim")
    (folder / weights.INDEX).unlink()
    (folder / "aside.safetensors").rename(folder / "model.safetensors")
    refuse(folder, "model.safetensors and", second.name, PARTS[0])
    second.unlink()
    refuse(folder, "model.safetensors and", PARTS[1])


def test_shards_without_their_index_are_no_weights(folder):
    shards(folder, PARTS)
    (folder / "model.safetensors").unlink()
    (folder / weights.INDEX).unlink()
    refuse(folder, "no weights; expected model.safetensors or model.safetensors.index.json")


def test_an_index_of_the_single_file_is_no_second_saving(folder):
    shards(folder, ["model.safetensors"])
    weights.check(folder)


def test_files_for_other_programs_may_lie_beside_the_weights(folder):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"{}")
    weights.check(folder)
    told = model_folder.said(folder, load_tokenizer(folder), (2,))
    assert told.startswith(
        "weights from model.safetensors (not read: consolidated.safetensors, pytorch_model.bin); "
    )
    assert model_folder.files(folder)["model_files"] == ["model.safetensors", "config.json"]


def test_a_tensor_in_two_files_is_refused(folder):
    shards(folder, PARTS)
    (folder / "model.safetensors").unlink()
    first, second = (load_file(folder / name) for name in PARTS)
    name = next(iter(first))
    save_file(second | {name: first[name]}, folder / PARTS[1], metadata={"format": "pt"})
    refuse(folder, PARTS[1], f"{name} is in another file, too")


def test_an_adapter_that_would_not_be_read_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    refuse(folder, "adapter_config.json", "merge it into the weights")


def test_tokens_that_are_added_beyond_the_embedding_are_refused(folder):
    """tokenizer.json fits; what tokenizer_config.json adds to it does not."""
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for count, fits in ((4, True), (5, False)):
        more = [f"<new{i}>" for i in range(count)]
        file.write_text(json.dumps(content | {"additional_special_tokens": more}))
        weights.check(folder)
        if fits:
            assert len(load_tokenizer(folder)) == 62
        else:
            with pytest.raises(ValueError, match="token id 62, but the embedding has only 62 rows"):
                load_tokenizer(folder)


def test_pickles_are_refused_with_the_remedy(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(folder, "only pickle weights (pytorch_model.bin)", "save_pretrained(NEW_FOLDER)")


@pytest.mark.parametrize("keep", [5, 2000, -10], ids=["header", "half", "tail"])
def test_a_truncated_file_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(folder, "model.safetensors: truncated or damaged")


def test_missing_and_unexpected_tensors_are_listed(folder):
    def change(content):
        content["model.layers.9.oops"] = content.pop("model.layers.1.self_attn.k_proj.weight")

    edit_tensors(folder, change)
    refuse(
        folder,
        "missing: model.layers.1.self_attn.k_proj.weight;",
        "unexpected: model.layers.9.oops",
    )


def test_long_lists_of_tensors_are_cut(folder):
    edit_config(folder, attention_bias=True)
    refuse(folder, "missing: ", " and 4 more; unexpected: none")


def test_a_wrong_shape_is_named(folder):
    edit_config(folder, intermediate_size=81)
    refuse(folder, "mlp.gate_proj.weight: expected shape (81, 48)", "got (80, 48)")


def test_quantised_weights_are_refused(folder):
    def change(content):
        name = "model.layers.0.mlp.up_proj.weight"
        content[name] = content[name].to(torch.int8)

    edit_tensors(folder, change)
    refuse(folder, "mlp.up_proj.weight has dtype I8", "no quantised weights")


def test_a_tokenizer_of_another_model_is_refused(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["new"] = 62
    file.write_text(json.dumps(content))
    refuse(folder, "tokenizer.json has token id 62", "only 62 rows")
    content["model"]["vocab"].pop("new")
    content["added_tokens"].append({"id": 70, "content": "<new>"})
    file.write_text(json.dumps(content))
    refuse(folder, "tokenizer.json has token id 70")


def test_old_and_redundant_tensors_are_accepted(tmp_path):
    make_model(tmp_path, "llama", tie_word_embeddings=True)
    expected, _ = weights.load(tmp_path)

    def change(content):
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(tmp_path, change)
    decoder, _ = weights.load(tmp_path)
    pairs = zip(decoder.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    edit_tensors(tmp_path, lambda content: content["lm_head.weight"].add_(1))
    refuse(tmp_path, "tie_word_embeddings", "a different lm_head.weight")


def test_a_hub_id_that_cannot_be_had_says_how_to_get_it(monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, **patterns):
        asked.append((name, patterns))
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RuntimeError, match="hf download org/model --local-dir FOLDER"):
        weights.load("org/model")
    (name, patterns) = asked[0]
    assert name == "org/model"
    assert not any("py" in p or "bin" in p for p in patterns["allow_patterns"])


def test_a_hub_id_is_downloaded(source, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(source))
    assert weights.load("org/model")[1]["model_type"] == "qwen3"
