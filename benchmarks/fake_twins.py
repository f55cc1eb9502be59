"""Twins on the CPU of the operators that only CUDA has; each asserts what CUDA's demands.

Of `fake_cuda.py`. The trainer's own operators take their plain path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import layer_twins
from intfast.kernels.head.plan import NAMESPACE


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operator on tensors of the CPU or of "meta"."""
    name = func._schema.name.split("::")[1]
    if name in TWINS and (name != "mm" or func._overloadname == "dtype"):
        return TWINS[name](_named(func, args, kwargs))
    if func.namespace == NAMESPACE:
        return func(*map(_plain_path, args), **kwargs)
    return func(*args, **kwargs)


def _plain_path(argument: Any) -> Any:
    """A path or a head's recipe that asks for Triton, as one that asks for torch."""
    if argument == "triton":
        return "plain"
    path, *rest = argument.split(" ") if isinstance(argument, str) else [""]
    return " ".join(("plain", *rest[:3], "")) if path in ("odds", "rows") else argument


def _named(func: Any, args: Any, kwargs: dict[str, Any]) -> SimpleNamespace:
    names = [argument.name for argument in func._schema.arguments]
    return SimpleNamespace(**dict(zip(names, args, strict=False)), **kwargs)


def _mm(call: SimpleNamespace) -> Tensor:
    left, right = call.self, call.mat2
    assert call.out_dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16)
    return left.float() @ right.float()


def _varlen(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    query, key = call.query, call.key
    _check_flash(call)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for rows, (q, k, v), seen in _sequences(call):
        scores = (q @ k.transpose(1, 2)).masked_fill(~seen, -math.inf)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    assert query.shape[1] % key.shape[1] == 0
    return out, lse, torch.zeros(2, dtype=torch.uint64, device=query.device)


def _varlen_backward(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    _check_flash(call)
    groups = call.key.shape[1]
    grads = tuple(torch.empty_like(x) for x in (call.query, call.key, call.value))
    scale = call.query.shape[-1] ** -0.5
    for rows, (q, k, v), seen in _sequences(call):
        grad = call.grad_out[rows].transpose(0, 1).float()
        prob = (q @ k.transpose(1, 2)).masked_fill(~seen, -math.inf).softmax(-1)
        along = grad @ v.transpose(1, 2)
        scores = prob * (along - (along * prob).sum(-1, keepdim=True))
        of_heads = (scores @ k * scale, scores.transpose(1, 2) @ q, prob.transpose(1, 2) @ grad)
        for out, found in zip(grads, of_heads, strict=True):
            if out is not grads[0]:
                found = found.unflatten(0, (groups, -1)).sum(1)
            out[rows] = found.transpose(0, 1).to(out.dtype)
    return grads


def _sequences(
    call: SimpleNamespace,
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor], Tensor]]:
    """(rows, scaled query with keys and values of all heads in fp32, what is seen) of each."""
    if call.query.is_meta:
        return
    starts = call.cu_seq_q.tolist()
    heads, width = call.query.shape[1:]
    left = call.window_size[0] if call.window_size else -1
    for start, end in pairwise(starts):
        rows, length = slice(start, end), end - start
        q, k, v = (x[rows].transpose(0, 1).float() for x in (call.query, call.key, call.value))
        k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        yield rows, (q * width**-0.5, k, v), seen.triu(-left) if left >= 0 else seen


def _check_flash(call: SimpleNamespace) -> None:
    for x in (call.query, call.key, call.value):
        assert x.dtype in (torch.bfloat16, torch.float16), x.dtype
        assert x.stride(-1) == 1, x.stride()
        assert x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, f"head size {x.shape[-1]}"
    assert call.cu_seq_q.dtype == torch.int32 and call.cu_seq_q.is_contiguous()
    assert call.is_causal or call.window_size[1] == 0


TWINS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "mm": _mm,
    "_varlen_attn": _varlen,
    "_varlen_attn_backward": _varlen_backward,
    **layer_twins.TWINS,
}
