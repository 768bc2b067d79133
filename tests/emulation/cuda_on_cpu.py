"""CPU tensors on the kernels of csrc/cuda, as `tests.emulation.cuda_on_host` compiles them for the CPU."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from rlhf_fast.ops import dispatch


@contextlib.contextmanager
def cuda_on_cpu(module: ModuleType) -> Iterator[Tensor]:
    """CPU tensors run the back end "cuda" on the emulated kernels, all on one stream; yields their scratch memory."""
    if importlib.util.find_spec("rlhf_fast._cuda") is None:
        sys.modules["rlhf_fast._cuda"] = module  # which the back end imports
    from rlhf_fast.ops.backends import cuda as cuda_backend

    scratch = torch.zeros(module.scratch_bytes, dtype=torch.uint8)
    with (
        patch.object(cuda_backend, "_cuda", module),
        patch.object(cuda_backend, "_current_stream", lambda device: contextlib.nullcontext(0)),
        patch.object(cuda_backend, "_scratch", lambda device, stream: scratch),
        patch.dict(dispatch.KERNELS["cpu"], dispatch.KERNELS["cuda"]),
    ):
        yield scratch
