"""Options of `pytest benchmarks`, as `python -m benchmarks kernels` has them."""

import torch


def pytest_addoption(parser):
    group = parser.getgroup("kernels", "the kernel benchmark")
    cuda = torch.cuda.is_available()
    group.addoption("--device", default="cuda" if cuda else "cpu", help="(%(default)s)")
    group.addoption("--shapes", choices=("small", "full"), default="full" if cuda else "small")
    group.addoption("--peers", default="", help="'all', or names separated by commas")
