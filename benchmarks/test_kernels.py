"""The kernel benchmark under pytest-benchmark: the cases, gate and peers of `benchmarks.kernels`.

    pytest benchmarks --benchmark-only -k span_cross_entropy [--peers all] [--shapes small]

A variant that is wrong against fp64 fails and has no figures. On a GPU each round ends with a wait
for the device, so a short kernel is seen with its launch; `python -m benchmarks kernels` times with
events behind a backlog, cold as well, and alone stores rows.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks import costs, kernels, timing
from benchmarks.kernel_cases import OPS, Case, Variant, cases, variants


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    found = []
    for case in cases(list(OPS), option("shapes")):
        asked, missing = kernels.choose_peers(OPS[case.op].peers, option("peers"), option("device"))
        for main in (False, True) if OPS[case.op].has_gradient else (False,):
            label = case.label + ("-fp32-buffer" if main else "")
            for variant in variants(case, asked):
                found.append(pytest.param(case, main, variant, id=f"{label}-{variant.name}"))
            for name, reason in missing.items():
                skip = pytest.mark.skip(reason=reason)
                found.append(pytest.param(case, main, None, id=f"{label}-{name}", marks=skip))
    metafunc.parametrize(("case", "main", "variant"), found)


# The variants of a case follow each other; the truth of a large one is gigabytes.
@functools.lru_cache(maxsize=1)
def _prepared(case: Case, device: str) -> tuple[Any, Any]:
    data = OPS[case.op].inputs(case, device, 0)
    return data, OPS[case.op].truth(case, data)


def test_kernel(case: Case, main: bool, variant: Variant, benchmark, request) -> None:
    device = request.config.getoption("device")
    data, truth = _prepared(case, device)
    step, entry = kernels.checked(variant, data, main, truth, device)
    if "status" in entry:
        pytest.fail(f"{entry['status']}: {entry['errors']}")
    cost = OPS[case.op].cost(case, costs.ADDED if main else costs.FRESH)
    benchmark.group = case.label + ("-fp32-buffer" if main else "")
    benchmark.extra_info |= {**entry, "flops": cost.flops, "bytes": cost.bytes}

    def round_() -> None:
        step()
        timing.synchronize(device)

    benchmark(round_)
