"""A model folder as hostile input: no code of its own, no file outside it, JSON in its shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        "model_files": [path.name for path in folder.glob("*.safetensors")] + ["config.json"],
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


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder; no code from the folder is run.

    Raises ValueError when it is missing, damaged, or asks for code.
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
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # tokenizers raises bare Exceptions, and transformers whatever a damaged file leads it to.
    except Exception as error:
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error}); copy "
            "tokenizer.json and tokenizer_config.json from the model again"
        ) from error
