"""Timings against peers, with a correctness gate before each: python -m benchmarks --help."""
