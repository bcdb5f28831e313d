"""Benchmarks: `pytest benchmarks`; what they measure, and the columns of their results, are in README.md."""

THREADS = 2  # of every CPU measurement
