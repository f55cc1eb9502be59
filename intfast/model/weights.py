"""A Hugging Face folder to parameters and back.

`slices` is the one map between the two layouts: Hugging Face keeps q, k, v, gate and up apart, the
decoder keeps them fused. Reading copies each tensor of the file straight into its rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from intfast import checks
from intfast.model import folder as model_folder
from intfast.model import shards
from intfast.model.decoder import Architecture, Decoder
from intfast.model.folder import INDEX, SINGLE
from intfast.model.layer_ops import Kernels
from intfast.state import files, interrupt, tensorfile

DTYPES = ("F32", "F16", "BF16", "F64")


class Rows(NamedTuple):
    """Where one Hugging Face tensor lives: rows [start, stop) of a parameter."""

    parameter: str
    start: int
    stop: int
    shape: tuple[int, ...]


def slices(config: Architecture) -> dict[str, Rows]:
    """Hugging Face tensor name -> its rows in the decoder's parameters, for every tensor."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ffn = config.intermediate_size
    fused = {
        "qkv_proj": (("q_proj", query), ("k_proj", kv), ("v_proj", kv)),
        "gate_up_proj": (("gate_proj", ffn), ("up_proj", ffn)),
    }
    found: dict[str, Rows] = {}
    for name, parameter in Decoder(config, device="meta").named_parameters():
        rows, *rest = parameter.shape
        owner = name.split(".")[-2]
        start = 0
        parts = ((owner, rows),) if owner in config.fused else fused.get(owner, ((owner, rows),))
        for part, num_rows in parts:
            key = name.replace(f".{owner}.", f".{part}.")
            found[key] = Rows(name, start, start + num_rows, (num_rows, *rest))
            start += num_rows
        assert start == rows, name
    return found


def resolve(path: str | os.PathLike[str]) -> Path:
    """A local folder for a folder or a hub id ("Qwen/Qwen3-0.6B"), downloading the latter."""
    folder = Path(path).expanduser()
    checks.model_folder(folder)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    # No pickles and no code: weights come from safetensors, the model from intfast.model.decoder.
    allowed = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=allowed, ignore_patterns="*/*"))
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"model {path}: no such folder, and the hub did not deliver it "
            f"({type(error).__name__}: {error}). On a machine with access run "
            f"'hf download {path} --local-dir FOLDER' and give FOLDER as the model"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: expected a model folder, found no config.json in it")
    return model_folder.read_object(file)


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: Kernels = "torch",
    own: shards.Shards | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder of a Hugging Face folder or hub id, and the content of its config.json.

    own: what this rank holds, where several hold the model together

    Names, shapes and files are checked before memory is taken. Raises ValueError for anything
    that is wrong with the folder, RuntimeError when a hub id cannot be downloaded.
    """
    folder = resolve(path)
    config = check(folder)
    decoder = Decoder(config, dtype, device, kernels, own)
    load_into(decoder, folder)
    return decoder, read_config(folder)


def check(folder: Path) -> Architecture:
    """The architecture of a model folder whose files fit it; reads no weights.

    Raises ValueError for anything that is wrong with the folder.
    """
    model_folder.check(folder)
    config = Architecture.from_hf(read_config(folder))
    _check_headers(folder, config)
    model_folder.check_vocabulary(folder, config.vocab_size)
    return config


@torch.no_grad()
def load_into(decoder: Decoder, folder: Path) -> None:
    """Read the weights of a folder that `load` has checked into the parameters, in place."""
    expected, parameters = slices(decoder.config), dict(decoder.named_parameters())
    second_head_VD = None
    for file in _weight_files(folder):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                interrupt.check()
                if name in expected:
                    _fill(decoder, parameters, expected[name], opened.get_tensor(name))
                elif name == "lm_head.weight":
                    second_head_VD = opened.get_tensor(name)
    head_VD = decoder.head_weight_VD
    if second_head_VD is not None:
        second_head_VD = shards.own(decoder.shards, "lm_head.weight", second_head_VD)
    if second_head_VD is not None and not torch.equal(second_head_VD.to(head_VD), head_VD):
        raise ValueError(
            f"{folder}: config.json ties lm_head to the embedding (tie_word_embeddings), but the "
            "weights hold a different lm_head.weight; set tie_word_embeddings to false"
        )


def _fill(
    decoder: Decoder, parameters: Mapping[str, torch.Tensor], place: Rows, whole: torch.Tensor
) -> None:
    """Copy a tensor of the file into its rows, or this rank's pieces of it into theirs."""
    name, start, stop, _ = place
    if decoder.shards is None or not shards.is_dealt(name):
        parameters[name][start:stop].copy_(whole)
        return
    found = decoder.shards.pieces(name, decoder.shards.ranks.tp_rank)
    for dim, begin, end, at in shards.within(found, start, stop):
        mine = parameters[name].narrow(dim, at, end - begin)
        mine.copy_(whole.narrow(dim, begin, end - begin))


def _weight_files(folder: Path) -> list[Path]:
    if names := model_folder.weight_names(folder):
        return [folder / name for name in names]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt*") for p in folder.glob(pattern)):
        raise ValueError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code when they are read. "
            "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER), and give NEW_FOLDER"
        )
    raise ValueError(f"{folder}: no weights; expected {SINGLE} or {INDEX}")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file}: truncated or damaged safetensors file ({error}); download it again"
        ) from error


def _check_headers(folder: Path, config: Architecture) -> None:
    """Raise ValueError unless the files hold every tensor in its shape, and no other."""
    expected = slices(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in shapes:
                    raise ValueError(f"{file}: {name} is in another file, too; which is meant?")
                header = opened.get_slice(name)
                shapes[name] = tuple(header.get_shape())
                if header.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: {name} has dtype {header.get_dtype()}; supported: "
                        f"{', '.join(DTYPES)} (no quantised weights)"
                    )
    missing = expected.keys() - shapes.keys()
    unexpected = shapes.keys() - expected.keys() - ({"lm_head.weight"} if config.tied else set())
    # Old checkpoints store the rotary frequencies, which follow from the config.
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the weights do not fit config.json; missing: {_some(missing)}; "
            f"unexpected: {_some(unexpected)}"
        )
    for name, place in expected.items():
        if shapes[name] != place.shape:
            raise ValueError(
                f"{folder}: {name}: expected shape {place.shape} from config.json, "
                f"got {shapes[name]}"
            )


def _some(names: Set[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(sorted(names)[:8]) + more if names else "none"


def save(
    decoder: Decoder,
    source: str | os.PathLike[str] | Mapping[str, Any],
    out_dir: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write `decoder` as a Hugging Face folder in the dtype of its parameters.

    source    the folder (or hub id) it came from: config.json, generation config and tokenizer
              files are taken from there; or the content of a config.json
    out_dir   must not exist, or be empty; appears only when complete
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; remove it or choose another")
    folder = None if isinstance(source, Mapping) else resolve(source)
    hf = dict(source) if folder is None else read_config(folder)
    if Architecture.from_hf(hf) != decoder.config:
        raise ValueError("save: source is the config of another model than the decoder's")
    hf.pop("torch_dtype", None)
    hf["dtype"] = str(decoder.head_weight_VD.dtype).removeprefix("torch.")
    aside = out.with_name(f".{out.name}.part")
    files.remove(aside)
    files.make_folder(aside)
    try:
        files.write(aside / "config.json", [json.dumps(hf, indent=2).encode() + b"\n"])
        for name in model_folder.COMPANIONS if folder is not None else ():
            if (folder / name).is_file():
                files.write(aside / name, [(folder / name).read_bytes()])
        _write_weights(decoder, aside, max_shard_bytes)
        files.publish(aside, out)
    except BaseException:
        files.remove(aside)
        raise
    return out


def _write_weights(decoder: Decoder, folder: Path, max_shard_bytes: int) -> None:
    parameters = {name: p.detach() for name, p in decoder.named_parameters()}
    tensors = {
        name: _whole(decoder, parameters[place.parameter], place)
        for name, place in slices(decoder.config).items()
    }
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        content = {name: tensors[name] for name in names}
        tensorfile.write(folder / file, content, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write(folder / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])


def _whole(decoder: Decoder, parameter: torch.Tensor, place: Rows) -> Any:
    """The rows of a parameter, or what becomes whole as it is written."""
    name, start, stop, _ = place
    if decoder.shards is None or not shards.is_dealt(name):
        return parameter[start:stop]
    found = decoder.shards.pieces(name, decoder.shards.ranks.tp_rank)
    [(dim, begin, end, at)] = shards.within(found, start, stop)
    mine = parameter.narrow(dim, at, end - begin)
    return decoder.shards.exported(name, mine, start, stop)
