"""Benchmarks: `make bench`; what they measure, and the columns of their results, are in README.md."""
