"""Every test with the argument `kernels` runs on the reference and on the compiled CPU kernels."""

import hypothesis
import pytest
import torch

import rlhf_fast.ops
from rlhf_fast.ops import dispatch

hypothesis.settings.register_profile("ops", database=None, deadline=None, max_examples=25)
hypothesis.settings.load_profile("ops")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    assert dispatch.COMPILED, "the tests need the compiled core: pip install -e ."
    with rlhf_fast.ops.backend(request.param):
        yield request.param
