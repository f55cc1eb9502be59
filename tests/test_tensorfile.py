"""Tensor files, written as a stream."""

import torch
from safetensors.torch import load_file

from intfast.state import tensorfile


def test_a_tensor_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.arange(7, dtype=torch.bfloat16),
        "step": torch.tensor(3.0),
        "b": torch.randn(4, 6)[:, 1:5],
        "none": torch.zeros(0, 3),
        "long": torch.tensor([2**40]),
        "half": torch.ones(5, dtype=torch.float16),
    }
    path = tmp_path / "x.safetensors"
    written = tensorfile.write(path, tensors, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == tensors.keys() and written.bytes == path.stat().st_size
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
