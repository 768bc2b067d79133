"""Every test with the argument `kernels` runs on the reference, the CPU kernels and the CUDA kernels (emulated)."""

import cuda_emulator
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


@pytest.fixture(scope="session")
def emulated_cuda():
    return cuda_emulator.load()


@pytest.fixture(params=["reference", "cpu", "cuda"])
def kernels(request, monkeypatch):
    assert dispatch.COMPILED, "the tests need the compiled core: pip install -e ."
    if request.param == "cuda":
        cuda_emulator.replace_cpu_kernels(request.getfixturevalue("emulated_cuda"), monkeypatch)
    with rlhf_fast.ops.backend("cpu" if request.param == "cuda" else request.param):
        yield request.param
