"""A GPU's kernels on CPU tensors, for tests and `bench.exactness`, with no GPU and no nvcc: Triton's interpreted, those
of csrc/cuda as `bench.cuda_on_host` compiles them.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest.mock import patch

import numpy
import torch
from torch import Tensor

from rlhf_fast.ops import dispatch


@contextlib.contextmanager
def cuda_on_cpu(module: ModuleType) -> Iterator[Tensor]:
    """CPU tensors run the back end "cuda" on the emulated kernels, all on one stream; yields their scratch memory."""
    if importlib.util.find_spec("rlhf_fast._cuda") is None:
        sys.modules["rlhf_fast._cuda"] = module  # which the back end imports
    from rlhf_fast.ops import cuda_backend

    scratch = torch.zeros(module.scratch_bytes, dtype=torch.uint8)
    with (
        patch.object(cuda_backend, "_cuda", module),
        patch.object(cuda_backend, "_current_stream", lambda device: contextlib.nullcontext(0)),
        patch.object(cuda_backend, "_scratch", lambda device, stream: scratch),
        patch.dict(dispatch.KERNELS["cpu"], dispatch.KERNELS["cuda"]),
    ):
        yield scratch


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Triton's interpreter rounds to bfloat16, to nearest even as compiled kernels do; by itself it cuts off. And it
    takes a fraction of its time: triton.language is prepared once a launch, not once more at every function called in
    it, scans are done in doubling steps, as a GPU does them, and numpy's dtypes are looked up once."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, prepare = interpreter._convert_float, interpreter._patch_lang

    def rounding(data: numpy.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> numpy.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(numpy.array(data, dtype=numpy.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    prepared = set()

    def prepare_once(function: Callable) -> object:
        if tl.core.is_builtin(tl.load):  # a launch begins
            prepared.clear()
        if (module := function.__module__) in prepared:
            return None
        prepared.add(module)
        return prepare(function)

    def scan(self: interpreter.ScanOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        types, sums = [x.dtype for x in inputs], [x.handle.data for x in inputs]
        length, step = sums[0].shape[self.axis], 1
        place = numpy.arange(length).reshape(-1, *[1] * (sums[0].ndim - 1 - self.axis))
        while step < length:
            before = [numpy.roll(x, step, self.axis) for x in sums]
            both = self.combine_fn.fn(*map(self.to_tensor, before, types), *map(self.to_tensor, sums, types))
            both = both if isinstance(both, tuple) else (both,)
            sums = [numpy.where(place < step, x, y.handle.data) for x, y in zip(sums, both, strict=True)]
            step *= 2
        return list(map(self.to_tensor, sums, types))

    look_up = interpreter._get_np_dtype
    look_up_scalar = functools.cache(look_up)

    with (
        patch.object(interpreter, "_convert_float", rounding),
        patch.object(interpreter, "_patch_lang", prepare_once),
        patch.object(interpreter.ScanOps, "generic_scan", scan),
        patch.object(interpreter, "_get_np_dtype", lambda t: (look_up_scalar if type(t) is tl.dtype else look_up)(t)),
    ):
        yield
