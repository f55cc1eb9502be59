"""The ops of intfast.kernels against other implementations: time, peak memory, share of the floor.

Each case prints its cost card, holds every variant against fp64 (a variant that is wrong gets no
figures), then times all of them in turns, hot and cold. With loss on a share of the rows, peers run
as their trainers call them (all rows) and on rows that were indexed beforehand. What has gradients
runs twice: with a fresh one of the weight, and with it added to an fp32 buffer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks import costs, harness, kernel_cases, timing
from benchmarks.kernel_cases import OPS, Case, Variant
from benchmarks.peers import Peer

NAME = "kernels"
# Largest error against fp64 for ours and for peers: of the loss and of the log-probs (relative to
# the largest), and of a gradient (relative, Frobenius). Peers in bf16 are allowed what they ship.
OUR_BOUNDS = {"value": 1e-3, "gradient": 1e-2}
PEER_BOUNDS = {"value": 2e-2, "gradient": 1e-1}
BUILT_IN = ("eager", "torch.compile", "F.linear_cross_entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ops, shapes and peers, and how long."""
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (all)")
    default = "full" if torch.cuda.is_available() else "small"
    parser.add_argument("--shapes", choices=("small", "full"), default=default)
    parser.add_argument(
        "--peers",
        default="",
        help="'all', or names as printed, separated by commas (what torch itself has; on a CPU "
        "eager alone)",
    )
    parser.add_argument("--caches", default="hot,cold", help="(%(default)s)")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which to stop")
    parser.add_argument("--json", action="store_true", help="also print each row as JSON")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per case and gradient mode, as soon as it is measured."""
    unknown = set(args.ops) - set(OPS)
    if unknown:
        raise ValueError(f"ops: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    start = time.monotonic()
    for case in kernel_cases.cases(args.ops or list(OPS), args.shapes):
        for main in (False, True) if OPS[case.op].has_gradient else (False,):
            if time.monotonic() - start > args.budget:
                print(f"stopped: {args.budget:g} s are over")
                return
            row = _measure(case, main, args)
            if args.json:
                print(json.dumps(row))
            yield row


def _measure(case: Case, main: bool, args: argparse.Namespace) -> dict[str, Any]:
    device = args.device
    roof = costs.roof(harness.device_name(device)) if device.startswith("cuda") else None
    op = OPS[case.op]
    cost = op.cost(case, costs.ADDED if main else costs.FRESH)
    floor = None if roof is None else cost.floor_seconds(roof)
    _print_head(case, main, cost, floor)
    figures: dict[str, Any] = {}
    data = op.inputs(case, device, args.seed)
    truth = op.truth(case, data)
    asked, missing = choose_peers(op.peers, args.peers, device)
    figures |= {name: {"status": reason} for name, reason in missing.items()}
    steps = _gated(kernel_cases.variants(case, asked), data, main, truth, figures, device)
    del truth
    _time(steps, figures, floor, args)
    _print_figures(figures, floor)
    setting = asdict(case) | {
        "live": case.live,
        "weight_gradient": "fp32 buffer" if main else "fresh",
        "dtype": "bf16" if device.startswith("cuda") else "fp32",
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_ms": None if floor is None else 1e3 * floor,
        "roof": None if roof is None else roof.source,
        "versions": _versions(),
    }
    return {"setting": setting, "figures": _stored(figures, device)}


def choose_peers(
    peers: tuple[Peer, ...], asked: str, device: str
) -> tuple[tuple[Peer, ...], dict[str, str]]:
    """(peers that can run, why the others that were asked for cannot); `asked` as in --peers."""
    default = BUILT_IN if device.startswith("cuda") else ("eager",)
    names = tuple(asked.split(",")) if asked else default
    wanted = [p for p in peers if asked == "all" or p.name in ("eager", *names)]
    reasons = {p.name: p.missing(device) for p in wanted}
    missing = {name: reason for name, reason in reasons.items() if reason}
    return tuple(p for p in wanted if p.name not in missing), missing


def _gated(
    variants: list[Variant],
    data: Any,
    main: bool,
    truth: tuple[Tensor, ...],
    figures: dict[str, Any],
    device: str,
) -> dict[str, timing.Step]:
    """The steps whose results are right; the others get a status instead of figures."""
    steps = {}
    for variant in variants:
        try:
            step, entry = checked(variant, data, main, truth, device)
        # Whatever another package raises is its result; it is printed and stored, and ours is red.
        except Exception as error:
            text = str(error).strip().splitlines()
            entry = {"status": f"{type(error).__name__}: {(text or [''])[0][:120]}"}
            torch.cuda.empty_cache()
        figures[variant.name] = entry
        if "status" not in entry:
            steps[variant.name] = step
    return steps


def checked(
    variant: Variant, data: Any, main: bool, truth: tuple[Tensor, ...], device: str
) -> tuple[timing.Step, dict[str, Any]]:
    """(step, its errors and the seconds of its first call); a "status" where it is wrong."""
    step = variant.build(data, main)
    if main:
        data.main_VD.zero_()
    seconds = timing.first_call(step, device)
    if main:
        data.main_VD.zero_()
    errors = _errors(step(), truth)
    bounds = OUR_BOUNDS if variant.ours else PEER_BOUNDS
    entry = {"errors": errors, "first_call_s": round(seconds, 3)}
    if wrong := [name for name, value in errors.items() if not value <= bounds[name]]:
        entry["status"] = f"WRONG, not timed: {', '.join(wrong)}"
    return step, entry


def _errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest relative errors of a step's results; NaN stays NaN."""
    value = (found[0].double() - truth[0]).abs().max() / truth[0].abs().max().clamp(min=1e-12)
    errors = {"value": float(f"{value.item():.3g}")}
    if len(truth) > 1:
        # Row slices, because a difference in fp64 of the whole weight would be a copy of it.
        ratios = []
        for got, exact in zip(found[1:3], truth[1:3], strict=True):
            parts = zip(got.split(8192), exact.split(8192), strict=True)
            square = sum((g.double() - e).square().sum() for g, e in parts)
            ratios.append((square.sqrt() / exact.norm().clamp(min=1e-12)).item())
        # max() would drop a NaN that is not the first.
        errors["gradient"] = float(f"{sum(r for r in ratios if r != r) or max(ratios):.3g}")
    return errors


def _time(
    steps: dict[str, timing.Step],
    figures: dict[str, Any],
    floor: float | None,
    args: argparse.Namespace,
) -> None:
    ours = "intfast"
    # A host timer cannot empty the CPU's caches.
    caches = args.caches.split(",") if args.device.startswith("cuda") else ["hot"]
    for cache in caches:
        sample = timing.Sample(args.device, args.rounds, args.warmup, cold=cache == "cold")
        seconds = timing.in_turns(steps, sample)
        for name, values in seconds.items():
            figures[name][f"{cache}_ms"] = harness.percentiles([1e3 * value for value in values])
            if name != ours and ours in seconds:
                pairs = zip(values, seconds[ours], strict=True)
                ratios = harness.percentiles([theirs / own for theirs, own in pairs])
                figures[name][f"{cache}_intfast_times_as_fast"] = ratios
    for name, step in steps.items():
        peak = timing.peak_bytes(step, args.device)
        figures[name]["peak_mb"] = None if peak is None else round(peak / 1e6, 1)
        if floor is not None:
            median = figures[name][f"{caches[0]}_ms"]["p50"]
            figures[name]["floor_share"] = round(1e3 * floor / median, 3)


def _stored(figures: dict[str, Any], device: str) -> dict[str, Any]:
    """What a row keeps: on a CPU no times, because they say nothing about the ops on a GPU."""
    if device.startswith("cuda"):
        return figures
    return {
        name: {key: value for key, value in entry.items() if not key.endswith(("_ms", "_s", "_mb"))}
        for name, entry in figures.items()
    }


def _versions() -> dict[str, str]:
    """Of Triton and of the peers that are installed."""
    names = ("triton", "liger-kernel", "trl", "verl", "cut-cross-entropy", "quack-kernels")
    installed = {dist.name.lower() for dist in importlib.metadata.distributions() if dist.name}
    return {name: importlib.metadata.version(name) for name in names if name in installed}


def _print_head(case: Case, main: bool, cost: costs.Cost, floor: float | None) -> None:
    shape = f"N {case.rows} H {case.hidden} V {case.vocabulary}"
    if not case.vocabulary:
        shape = f"{case.rows} rows of {case.hidden}"
    if case.op == "group_advantages":
        shape = f"{case.rows} samples, {kernel_cases.SAMPLE_TOKENS * case.rows} tokens"
    live = f", {case.live} rows with loss" if case.share < 1 else ""
    mode = ", dW added to fp32" if main else ""
    print(f"\n{case.op}: {shape}{live}{mode}")
    card = f"  {cost.flops / 1e12:.4g} TFLOP, {cost.bytes / 1e9:.4g} GB"
    print(card + ("" if floor is None else f", floor {1e3 * floor:.4g} ms"))


def _print_figures(figures: dict[str, Any], floor: float | None) -> None:
    for name, entry in figures.items():
        if "status" in entry:
            print(f"  {name:32} {entry['status']} {entry.get('errors', '')}")
            continue
        text = "  ".join(
            f"{cache} {entry[f'{cache}_ms']['p50']:9.4g} ms "
            f"({entry[f'{cache}_ms']['p20']:.4g}..{entry[f'{cache}_ms']['p80']:.4g})"
            for cache in ("hot", "cold")
            if f"{cache}_ms" in entry
        )
        peak = "" if entry["peak_mb"] is None else f"  peak {entry['peak_mb']:.0f} MB"
        share = "" if floor is None else f"  {100 * entry['floor_share']:.0f} % of floor"
        errors = " ".join(f"{key} {value:.1e}" for key, value in entry["errors"].items())
        print(f"  {name:32} {text}{peak}{share}  error: {errors}")


if __name__ == "__main__":
    harness.main(sys.modules[__name__])
