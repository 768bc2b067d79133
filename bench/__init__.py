"""Benchmarks of the operations, run from the repository root: `python -m bench ops`. Not installed."""
