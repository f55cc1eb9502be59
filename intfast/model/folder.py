"""A model folder as hostile input: no code of its own, no file outside it, JSON in its shape."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}\.safetensors$")
MAX_JSON_BYTES = 1 << 28
# What is copied to an exported folder besides the weights, where the source has it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def check(folder: Path) -> None:
    """Refuse a folder that brings code, or whose files lie elsewhere; ValueError says what."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and read_object(folder / name).get("auto_map"):
            raise ValueError(
                f"{folder / name} asks for code of its own (auto_map), which is never run; remove "
                "the key if the model is one of the supported architectures without it"
            )
    for file in sorted(folder.iterdir()):
        is_read = file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt")
        if is_read and file.is_symlink() and not is_own_file(folder, file.name):
            raise ValueError(
                f"{file} is a link to {file.resolve()}, outside the model folder; copy the file"
            )


def files(folder: Path) -> dict[str, list[str]]:
    """The names of the files that make a model, and of those that make its tokenizer."""
    return {
        "model_files": [*weight_names(folder), "config.json"],
        "tokenizer_files": [name for name in COMPANIONS if name != "generation_config.json"],
    }


def is_own_file(folder: Path, name: str) -> bool:
    """Whether a file exists and lies in the folder, or in the hub cache that the folder is of."""
    file = folder / name
    if not file.is_file():
        return False
    place = file.resolve()
    # The cache keeps models--a--b/snapshots/REVISION/NAME as a link to models--a--b/blobs/HASH.
    blobs = folder.resolve().parent.parent / "blobs"
    in_cache = folder.resolve().parent.name == "snapshots" and place.is_relative_to(blobs)
    return place.is_relative_to(folder.resolve()) or in_cache


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def weight_names(folder: Path) -> list[str]:
    """The names of the weight files of a folder: one, the shards of an index, or none.

    Raises ValueError where files are missing, or where it is not clear which are meant: nothing
    tells old weights from new ones.
    """
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    indices = sorted(path.name for path in folder.glob("*.safetensors.index*.json"))
    shards = shard_names(folder / INDEX) if INDEX in indices else []
    chosen = shards or [name for name in found if name == SINGLE]
    if absent := sorted({*shards} - {*found}):
        raise ValueError(f"{folder}: {INDEX} names files that are missing: {absent}")
    # Others may lie beside them, for other programs: consolidated.safetensors, pytorch_model.bin.
    rivals = [name for name in found if name == SINGLE or _SHARD.search(name)]
    others = sorted({*rivals, *indices} - {*chosen, INDEX})
    if others and chosen:
        named = [INDEX] if shards else chosen
        raise ValueError(
            f"{folder}: {', '.join(named)} and {', '.join(others)} both claim to be the weights; "
            "remove what is old"
        )
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder}: {ADAPTER} belongs to an adapter, which would not be read; merge it into "
            "the weights (merge_and_unload of peft), or remove it"
        )
    return chosen


def said(folder: Path, tokenizer: Any, stop_ids: Sequence[int]) -> str:
    """What of a model folder is read, for the console: weights, and where answers end."""
    chosen = weight_names(folder)
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    others = sorted({p.name for p in folder.iterdir() if p.suffix in kinds} - {*chosen})
    ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in stop_ids)
    weights = chosen[0] if len(chosen) == 1 else f"{len(chosen)} files of {INDEX}"
    unread = f" (not read: {', '.join(others)})" if others else ""
    return f"weights from {weights}{unread}; answers end at {ends}"


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names. Raises ValueError for a name that is not plain."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map from tensor to file, got {weight_map!r}")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise ValueError(
                f"{index}: names {name!r}; expected the name of a .safetensors file beside it"
            )
    return sorted(names)


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Refuse a tokenizer.json with ids that the embedding does not have."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    content = read_object(file)
    try:
        vocabulary = content["model"].get("vocab", {})
        # A mapping from token to id, or a list in the order of the ids.
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (token["id"] for token in content.get("added_tokens") or ())
        highest = max((*ids, *added), default=-1)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a tokenizer ({error!r}); download it again") from error
    if highest >= vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has token id {highest}, but the embedding has only "
            f"{vocab_size} rows (vocab_size); tokenizer and weights are of different models"
        )


def end_ids(folder: Path) -> tuple[int, ...]:
    """The `eos_token_id`s of generation_config.json and config.json: one, several or none each.

    Raises ValueError for what is no token id of the model.
    """
    found: dict[int, None] = {}
    size = _vocab_size(folder)
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = read_object(file).get("eos_token_id") if file.is_file() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < size]:
            raise ValueError(
                f"{file}: eos_token_id: expected token ids below {size} (vocab_size), got {wrong}; "
                "take the file of the model again"
            )
        found |= dict.fromkeys(ids)
    return tuple(found)


def _vocab_size(folder: Path) -> float:
    """Rows of the embedding, as config.json says."""
    file = folder / "config.json"
    size = read_object(file).get("vocab_size") if file.is_file() else None
    return math.inf if size is None else size


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder; no code from the folder is run.

    Its `end_ids()` are those of the folder. Raises ValueError when it is missing, damaged, or asks
    for code.
    """
    from transformers import AutoTokenizer

    check(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the model into its folder"
        )
    if (folder / "tokenizer.json").is_file():
        read_object(folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # tokenizers raises bare Exceptions, and transformers whatever a damaged file leads it to.
    except Exception as error:
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error}); copy "
            "tokenizer.json and tokenizer_config.json from the model again"
        ) from error
    # Tokens can be added in files beside tokenizer.json, too.
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= (size := _vocab_size(folder)):
        raise ValueError(
            f"{folder}: the tokenizer has token id {highest}, but the embedding has only {size} "
            "rows (vocab_size); tokenizer and weights are of different models"
        )
    # Generation in transformers ends at each of these too; no other of its defaults is read.
    tokenizer.end_ids = partial(end_ids, folder)
    return tokenizer
