"""CPU tensors on Triton's kernels in Triton's interpreter, faster than by itself and rounding as a GPU does."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy
import torch


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Triton's interpreter rounds to bfloat16 as compiled kernels do, to the nearest even; by itself it truncates.

    The interpreter also takes a fraction of its usual time, for three reasons: it prepares triton.language once a
    launch instead of at every function call; it scans in doubling steps, as a GPU does; it looks types up instead of
    making them anew. Where Triton compiles, nothing changes.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
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

    with (
        patch.object(interpreter, "_convert_float", rounding),
        patch.object(interpreter, "_patch_lang", prepare_once),
        patch.object(interpreter.ScanOps, "generic_scan", scan),
        _types_looked_up(tl, interpreter),
    ):
        yield


@contextlib.contextmanager
def _types_looked_up(tl: ModuleType, interpreter: ModuleType) -> Iterator[None]:
    """Each type is made once, and operands of the same type are not checked: types took most of the time."""
    block_types, shapes, make_block_type = {}, {}, tl.block_type.__init__
    look_up, convert = interpreter._get_np_dtype, interpreter.TritonSemantic.binary_op_type_checking_impl
    look_up_scalar = functools.cache(look_up)

    def block_type(self: Any, element: Any, shape: Sequence[int]) -> None:
        key = element.name, *map(tl.core._unwrap_if_constexpr, shape)
        if key not in block_types:
            make_block_type(self, element, shape)
            block_types[key] = vars(self).copy()
        vars(self).update(block_types[key], element_ty=element)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    def operands(self: Any, a: Any, b: Any, *args: Any, **options: Any) -> tuple:
        same = isinstance(a, tl.tensor) and isinstance(b, tl.tensor) and a.dtype is b.dtype and a.shape is b.shape
        if same and type(a.dtype) is tl.dtype and a.dtype.primitive_bitwidth != 16:  # no pointers; 16 bits may widen
            return a, b
        return convert(self, a, b, *args, **options)

    with (
        patch.object(tl.block_type, "__init__", block_type),
        patch.object(tl.tensor, "__init__", tensor),
        patch.object(interpreter.TritonSemantic, "binary_op_type_checking_impl", operands),
        patch.object(interpreter, "_get_np_dtype", lambda t: (look_up_scalar if type(t) is tl.dtype else look_up)(t)),
    ):
        yield
