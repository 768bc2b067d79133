"""Every test with the argument `kernels` runs on the reference and on the CPU, Triton and CUDA C++ kernels.

Without a GPU Triton's are interpreted and CUDA's emulated.
"""

from collections.abc import Callable

import cuda_emulator
import hypothesis
import numpy
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter

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


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def kernels(request, monkeypatch):
    assert dispatch.COMPILED, "the tests need the compiled core: pip install -e ."
    if request.param in ("reference", "cpu"):
        with rlhf_fast.ops.backend(request.param):
            yield request.param
    elif torch.cuda.is_available():
        with torch.device("cuda"), rlhf_fast.ops.backend(request.param):
            yield request.param
    elif request.param == "triton":
        convert = triton.runtime.interpreter._convert_float
        monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", rounding(convert))
        with rlhf_fast.ops.backend("triton"):
            yield "triton"
    else:
        cuda_emulator.replace_cpu_kernels(request.getfixturevalue("emulated_cuda"), monkeypatch)
        with rlhf_fast.ops.backend("cpu"):
            yield "cuda"


def rounding(convert: Callable) -> Callable:
    """Triton's interpreter truncates to bfloat16; compiled kernels round to nearest even, as this does."""

    def call(data: numpy.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> numpy.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(numpy.array(data, dtype=numpy.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    return call
