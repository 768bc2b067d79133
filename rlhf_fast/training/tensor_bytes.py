"""Counts the bytes of live tensors exactly: a storage counts from the operator that made it until nothing holds it.

Activations that autograd saves, gradients, optimizer states and the buffers inside this package's own operators all
count. Fake tensors (`FakeTensorMode`) count like real tensors. While a `TensorBytes` is entered, a `Meter` reports its
peaks as the phases' peaks, in place of the process's resident set.

A storage that is resized counts with its new size: FSDP2 lets go of a weight's whole copy by resizing its storage to 0.

Left out: memory outside of tensors (the interpreter, libraries, scratch inside a matmul), and the allocator's overhead.
No training run counts in this way, because it costs tens of microseconds per operator.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import dispatch, private


class TensorBytes(private.TorchDispatchMode):
    """Context manager; `live` and `peak` are bytes of tensors made or first read inside.

    exclude: tensors whose storages do not count, such as weights that are counted elsewhere.
    """

    active: "TensorBytes | None" = None

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self._depth = 0
        self._held: dict[int, int] = {}  # storage -> bytes
        self._excluded: set[int] = set()
        self._resize: Any = None
        for tensor in exclude:
            self._follow(tensor, excluded=True)

    def __enter__(self) -> "TensorBytes":
        if not self._depth:
            TensorBytes.active = self
            self._resize = vars(torch.UntypedStorage).get("resize_")  # another counter's
            torch.UntypedStorage.resize_ = self._resizing(torch.UntypedStorage.resize_)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._depth -= 1
        if not self._depth:
            TensorBytes.active = None
            if self._resize is None:
                del torch.UntypedStorage.resize_  # torch's own is that of a base class
            else:
                torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exc)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before, such as weights."""
        for tensor in tensors:
            self._follow(tensor)

    def take_peak(self) -> int:
        """The largest `live` since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._follow_all((args, kwargs))
        if func.namespace == "rlhf_fast" and all(dispatch.has_address(x) for x in args if isinstance(x, Tensor)):
            with self:  # counts the operator's own buffers
                out = dispatch.run_kernel(func.name().split("::")[1], *args)
        else:
            out = func(*args, **(kwargs or {}))
        self._follow_all(out)
        return out

    def _follow_all(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._follow(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow_all(item)
        elif isinstance(value, dict):
            for item in value.values():
                self._follow_all(item)

    def _follow(self, whole: Tensor, excluded: bool = False) -> None:
        if type(whole) is Tensor:  # most are
            self._follow_storage(whole.untyped_storage(), excluded)
            return
        for tensor in plain_tensors(whole):
            self._follow_storage(tensor.untyped_storage(), excluded)

    def _follow_storage(self, storage: torch.UntypedStorage, excluded: bool) -> None:
        key = private.storage_key(storage)
        if key in self._held:
            return
        self._held[key] = 0
        if excluded:
            self._excluded.add(key)
        else:
            self._count(key, storage.nbytes())
        weakref.finalize(storage, self._free, key).atexit = False

    def _count(self, key: int, size: int) -> None:
        self.live += size - self._held[key]
        self._held[key] = size
        self.peak = max(self.peak, self.live)

    def _resizing(self, resize: Any) -> Any:
        """`UntypedStorage.resize_` with a count. No mode sees the call, because it is no operator."""

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result, key = resize(storage, size), private.storage_key(storage)
            if key in self._held and key not in self._excluded:
                self._count(key, storage.nbytes())
            return result

        return resize_

    def _free(self, key: int) -> None:
        self.live -= self._held.pop(key)
        self._excluded.discard(key)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the memory of `tensor`: itself, or the tensors that a wrapper such as DTensor wraps.

    A wrapper's own storage has a size and no memory.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, Tensor):  # DTensor names its mesh too
            yield from plain_tensors(part)
