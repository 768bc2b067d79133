"""Decoding under pytest-benchmark, on the demo's model: `pytest bench --benchmark-only`, with `--quick` a few tokens.

Tokens and log-probs are checked before anything is timed. `python -m bench rollout` has more shapes and the bars.
"""

import pytest
import torch

from bench.rollout import FOLDED, GREEDY, SAMPLED, THEIRS, THEIRS_GREEDY, check, contenders, shapes, untrained


@pytest.fixture(scope="module")
def everyone(request):
    """The contenders, checked."""
    shape = shapes("cpu", request.config.getoption("quick"))[0]
    loaded = untrained(shape, "cpu")
    found = contenders(shape, loaded)
    check(shape, loaded, found)
    return found


@pytest.mark.parametrize("name", [SAMPLED, GREEDY, FOLDED, THEIRS, THEIRS_GREEDY])
def test_decoding(benchmark, everyone, name):
    """The time of one decode."""
    benchmark.group = "decoding"
    with torch.no_grad():
        benchmark.pedantic(everyone[name].run, rounds=5, warmup_rounds=1)
