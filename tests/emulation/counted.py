"""The bytes of global memory that a GPU kernel asks for, counted access by access while the kernel runs on the CPU.

A kernel that reads its input in two passes counts it twice, whatever a cache makes of it. Threads that read one address
together count once: in CUDA C++ between two barriers of a block, in Triton within one load. Not seen: transactions,
which are whole sectors of 32 bytes.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy
import torch

from rlhf_fast.ops import dispatch
from tests.emulation import cuda_on_host
from tests.emulation.cuda_on_cpu import cuda_on_cpu
from tests.emulation.triton_on_cpu import triton_on_cpu


@dataclass
class Bytes:
    """Of global memory, loaded and stored; an atomic addition is both."""

    loads: int = 0
    stores: int = 0


@contextlib.contextmanager
def counted_triton() -> Iterator[Bytes]:
    """Inside, CPU tensors run on Triton's kernels in the interpreter, and their bytes are added up.

    Raises RuntimeError where Triton was imported without TRITON_INTERPRET=1.
    """
    if not dispatch.INTERPRETED:
        raise RuntimeError("expected TRITON_INTERPRET=1 from before rlhf_fast was imported")
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    found = Bytes()
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def size(pointers: Any, mask: Any) -> int:
        addresses = numpy.unique(pointers.data[mask.data.astype(bool)])
        return addresses.size * max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # a bool takes a byte

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.loads += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.stores += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def atomic_rmw(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.loads += size(pointers, mask)
        found.stores += size(pointers, mask)
        return atomic(self, how, pointers, value, mask, *rest)

    with (
        triton_on_cpu(),
        patch.object(Builder, "create_masked_load", masked_load),
        patch.object(Builder, "create_masked_store", masked_store),
        patch.object(Builder, "create_atomic_rmw", atomic_rmw),
    ):
        yield found


@contextlib.contextmanager
def counted_cuda() -> Iterator[Bytes]:
    """Inside, CPU tensors run on the CUDA C++ kernels, emulated; the bytes are there once the block has ended."""
    module, found = cuda_on_host.load(counting=True), Bytes()
    counts = ctypes.CDLL(str(module.__file__))
    counts.counts_loaded.restype = counts.counts_stored.restype = ctypes.c_int64
    with cuda_on_cpu(module):
        counts.counts_begin()
        try:
            yield found
        finally:
            found.loads, found.stores = counts.counts_loaded(), counts.counts_stored()
            counts.counts_end()


def counted(context: Callable[[], contextlib.AbstractContextManager[Bytes]], call: Callable[[], object]) -> Bytes:
    """The bytes of one call inside the context."""
    with context() as found, torch.no_grad():
        call()
    return found
