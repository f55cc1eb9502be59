"""Campaigns that try to break what intfast promises; `python -m benchmarks.reliability NAME`."""
