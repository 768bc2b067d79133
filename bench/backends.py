"""Our GPU kernels by back end, wherever the bench runs: on a GPU, or interpreted and emulated on the CPU."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import dispatch
from tests.emulation import cuda_on_host
from tests.emulation.cuda_on_cpu import cuda_on_cpu
from tests.emulation.triton_on_cpu import triton_on_cpu


@contextlib.contextmanager
def in_triton() -> Iterator[None]:
    """Inside, our operations run Triton's kernels, interpreted on a CPU."""
    if not dispatch.TRITON:
        raise RuntimeError("expected TRITON_INTERPRET=1 from before rlhf_fast was imported")
    with triton_on_cpu(), ops.backend("triton"):
        yield


@contextlib.contextmanager
def in_cuda() -> Iterator[None]:
    """Inside, our operations run the CUDA C++ kernels, emulated where there is no GPU."""
    if torch.cuda.is_available():
        with ops.backend("cuda"):
            yield
    else:
        with cuda_on_cpu(cuda_on_host.load()), ops.backend("cpu"):
            yield


BACKENDS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {"triton": in_triton, "cuda": in_cuda}
TITLES = {"triton": "Triton", "cuda": "CUDA C++"}


def cuda_stands_beside(x: Tensor) -> bool:
    """Whether an operation on x runs on Triton, with the CUDA C++ kernels there to be measured beside it."""
    if x.is_cuda:
        return dispatch.CUDA and dispatch.TRITON
    return dispatch.INTERPRETED and dispatch.override() == "triton"
