"""One bounded session on a machine with a GPU and no network: python -m benchmarks.gpu --help."""
