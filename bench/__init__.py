"""Benchmarks of the operations, run from the repository root: `python -m bench ops`. Not installed."""

from rlhf_fast.threads import wait_quietly

wait_quietly()  # as the `rlhf-fast` command does
