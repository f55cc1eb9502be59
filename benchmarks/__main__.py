"""Time intfast against its peers, side by side in one process.

Each benchmark first checks that both sides compute the same, then times them in turns and
appends a row to benchmarks/results/<device>.jsonl. On a GPU a row holds times and ratios; on a CPU
it holds ratios only, and neither says anything about the other.
"""

from __future__ import annotations

import argparse

from benchmarks import (
    ablation,
    accuracy,
    collection,
    compare,
    engine,
    evidence,
    fidelity,
    function_speed,
    gates,
    grading,
    harness,
    house,
    kernels,
    likelihood,
    occupancy,
    quickstart,
    scale,
    scored,
    traffic,
    training_step,
    vllm,
)

# Each has a docstring, NAME, `add_arguments(parser)` and `run(args) -> list of rows`, a row being
# {"setting": {...}, "figures": {...}}.
BENCHMARKS = (
    engine, vllm, training_step, fidelity, quickstart, compare, evidence, collection, scored,
    likelihood, ablation, gates, grading, function_speed, kernels, accuracy, traffic, occupancy,
    scale,
)  # fmt: skip


def main() -> None:
    """Run the benchmark named on the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="benchmark")
    for module in BENCHMARKS:
        first_line = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            module.NAME, help=first_line, description=module.__doc__, formatter_class=raw
        )
        harness.add_arguments(command)
        module.add_arguments(command)
    commands.add_parser("house", help=house.__doc__.splitlines()[0])
    args = parser.parse_args()
    if args.name == "house":
        return house.main()
    harness.run(next(module for module in BENCHMARKS if args.name == module.NAME), args)


if __name__ == "__main__":
    main()
