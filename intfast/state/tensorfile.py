"""Safetensors files, written as a stream: one tensor in host memory at a time, hashed on the way.

The format: 8 bytes of header length, a JSON header, the tensors' bytes in the header's order
(https://github.com/huggingface/safetensors, "Format"). Wide types come first, as its own writer
does, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from intfast import ranks
from intfast.state import files

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(
    path: Path,
    tensors: Mapping[str, Tensor | ranks.Part],
    metadata: Mapping[str, str] | None = None,
    everywhere: bool = False,
) -> files.Written:
    """Write and sync a safetensors file; its size and digest.

    everywhere  each rank writes its own, with its parts of all tensors, flat
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    pieces = _pieces({name: tensors[name] for name in names}, metadata, everywhere)
    return files.write(path, pieces, everywhere)


def _pieces(
    tensors: Mapping[str, Tensor | ranks.Part], metadata: Mapping[str, str] | None, is_own: bool
) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if is_own:
            world = ranks.now()
            shape = [math.prod(tensor.shard_shape(world.tp_rank)) // world.dp]
        start, end = end, end + math.prod(shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())
