"""Every test with the argument `kernels` runs on the reference and on the CPU, Triton and CUDA C++ kernels.

Without a GPU Triton's are interpreted and CUDA's emulated.
"""

import functools

import hypothesis
import pytest
import torch

import rlhf_fast.ops
from rlhf_fast.ops import dispatch
from tests.emulation import cuda_on_host
from tests.emulation.cuda_on_cpu import cuda_on_cpu
from tests.emulation.triton_on_cpu import triton_on_cpu

if dispatch.COMPILED:
    from rlhf_fast import _cpu

hypothesis.settings.register_profile("ops", database=None, deadline=None, max_examples=25)
hypothesis.settings.load_profile("ops")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_cuda():
    """Context manager: inside, CPU tensors run the back end "cuda"."""
    return functools.partial(cuda_on_cpu, cuda_on_host.load())


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def kernels(request):
    assert dispatch.COMPILED, "the tests need the compiled core: pip install -e ."
    if request.param in ("reference", "cpu"):
        with rlhf_fast.ops.backend(request.param):
            yield request.param
    elif torch.cuda.is_available():
        with torch.device("cuda"), rlhf_fast.ops.backend(request.param):
            yield request.param
    elif request.param == "triton":
        with triton_on_cpu(), rlhf_fast.ops.backend("triton"):
            yield "triton"
    else:
        with request.getfixturevalue("emulated_cuda")(), rlhf_fast.ops.backend("cpu"):
            yield "cuda"


@pytest.fixture(params=["reference", *(_cpu.isas() if dispatch.COMPILED else ())])
def instruction_set(request):
    """For what has kernels on CPUs alone: the reference, and every instruction set that this CPU has."""
    if request.param == "reference":
        with rlhf_fast.ops.backend("reference"):
            yield request.param
    else:
        widest = _cpu.isa()
        _cpu.set_isa(request.param)
        yield request.param
        _cpu.set_isa(widest)
