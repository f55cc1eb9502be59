"""How exact the loss head is: errors against fp64 beside eager PyTorch's, on the same inputs.

Three kinds of rows: usual ones; confident ones, with 1 - p down to 1e-7 or less; and logits of
+-80. "eager fp32" upcasts the inputs, "eager" keeps their type and upcasts the logits, as
trainers do. Errors are the largest of a log-prob (nat), of a confident log-prob relative to its
size, and of a gradient's row relative to that row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from intfast.kernels import truth as definition
from intfast.kernels.linear_logprob import linear_logprob

NAME = "accuracy"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("usual", "confident", "logits of 80")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which shapes and types."""
    parser.add_argument("--rows", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--vocabularies", default="257,32000,151936", help="(%(default)s)")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"of {', '.join(DTYPES)}")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per type and vocabulary."""
    for dtype in args.dtypes.split(","):
        for vocabulary in map(int, args.vocabularies.split(",")):
            print(f"\n{dtype}, N {args.rows} H {args.hidden} V {vocabulary}")
            setting = {
                "dtype": dtype, "rows": args.rows, "hidden": args.hidden, "vocabulary": vocabulary,
            }  # fmt: skip
            figures = {kind: _errors(kind, DTYPES[dtype], vocabulary, args) for kind in KINDS}
            yield {"setting": setting, "figures": figures}


def _inputs(
    kind: str, dtype: torch.dtype, vocabulary: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(args.seed)
    weight_VD = torch.randn(vocabulary, args.hidden, generator=made)
    target_N = torch.randint(vocabulary, (args.rows,), generator=made)
    hidden_ND = 2 * torch.randn(args.rows, args.hidden, generator=made) / args.hidden**0.5
    own_ND = weight_VD[target_N]
    if kind == "confident":
        margin_N1 = torch.linspace(8, 38, args.rows)[:, None]
        hidden_ND = margin_N1 * own_ND / own_ND.square().sum(1, keepdim=True)
    elif kind == "logits of 80":
        largest_N1 = (hidden_ND @ weight_VD.T).abs().amax(1, keepdim=True)
        hidden_ND = 80 * hidden_ND / largest_N1
    cast = hidden_ND.to(args.device, dtype), weight_VD.to(args.device, dtype)
    return *cast, target_N.to(args.device)


def _eager(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, None]:
    logp = F.linear(hidden_ND, weight_VD).float().log_softmax(-1)
    return logp.gather(1, target_N[:, None])[:, 0], None


def _step(
    call: Callable, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    pair = [value.detach().clone().requires_grad_() for value in (hidden_ND, weight_VD)]
    logprob_N, _ = call(*pair, target_N)
    return logprob_N.detach(), *torch.autograd.grad(logprob_N.sum(), pair)


def _errors(
    kind: str, dtype: torch.dtype, vocabulary: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    inputs = _inputs(kind, dtype, vocabulary, args)
    truth = _step(definition.linear_logprob, inputs[0].double(), inputs[1].double(), inputs[2])
    variants = {"intfast": linear_logprob, "eager fp32": definition.linear_logprob, "eager": _eager}
    figures = {}
    for name, call in variants.items():
        found = _step(call, *inputs)
        error_N = (found[0].double() - truth[0]).abs()
        entry = {"logprob_nat": error_N.max()}
        if kind == "confident":
            sure_N = truth[0] > -1e-3
            entry["logprob_relative"] = (error_N / truth[0].abs())[sure_N].max()
        for part, got, exact in zip(("hidden", "weight"), found[1:], truth[1:], strict=True):
            # rows that no gradient reaches beyond underflow have no size to compare with
            size = exact.norm(dim=1)
            rows = size > 1e-6 * size.max()
            entry[f"{part}_row"] = ((got.double() - exact).norm(dim=1) / size)[rows].max()
        figures[name] = {key: float(f"{value.item():.2g}") for key, value in entry.items()}
        text = "  ".join(f"{key} {value:.1e}" for key, value in figures[name].items())
        print(f"  {kind:13} {name:11} {text}")
    return figures


if __name__ == "__main__":
    harness.main(sys.modules[__name__])
