"""The same cases under pytest-benchmark: `pytest bench --benchmark-only`, with `--quick` at toy shapes.

Each case is checked against float64 before anything of it is timed. `python -m bench ops` also measures ceilings and
memory, and lets the contenders take turns.
"""

import pytest
import torch

from bench.cases import all_cases
from bench.measure import contenders, errors


def pytest_generate_tests(metafunc):
    """One test per case and contender."""
    pairs = [(case, name) for case in all_cases(metafunc.config.getoption("quick")) for name in case.functions()]
    ids = [f"{case.name}-{name}" for case, name in pairs]
    metafunc.parametrize("checked, name", pairs, ids=ids, indirect=["checked"], scope="module")


@pytest.fixture(scope="module")
def checked(request):
    """The contenders of a case, checked against float64."""
    case = request.param
    torch.manual_seed(0)
    inputs = case.make_inputs()
    competitors = contenders(case, inputs)
    errors(case, inputs, competitors)
    return case.name, competitors


def test_op(benchmark, checked, name):
    """The time of one call."""
    benchmark.group, competitors = checked
    contender = competitors[name]
    benchmark.pedantic(contender.run, setup=contender.restore, rounds=5, warmup_rounds=1)
