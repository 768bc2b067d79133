"""Bytes that the process holds now, its peak, and the bytes that each role of a run holds.

On CUDA the figures come from the allocator. On the CPU they are the process's resident set, from /proc.
Left out: memory of other processes, of child processes, and what the CUDA driver and cuBLAS hold outside the allocator.
"""

import ctypes
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rlhf_fast.training.tensor_bytes import plain_tensors

_CLEAR_REFS = Path("/proc/self/clear_refs")

_STATUS = Path("/proc/self/status")

_STATM = Path("/proc/self/statm")


def current_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes held now: allocated tensors on CUDA, the resident set of the process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return _process_peak()


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The largest `current_bytes` since the mark was last reset. A Meter resets it when a measured phase begins."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(match[1]) * 1024
    return _process_peak()


def _process_peak() -> int:
    """The peak of the whole process, for systems without /proc. macOS counts bytes, other systems KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_high_water_mark() -> bool:
    """Sets VmHWM to the current resident set; returns False where the kernel forbids it."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Gives free heap pages back to the kernel (glibc only), because they would count as held by the next phase."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Stateful(Protocol):
    """An optimizer, of which the tensors in its state count."""

    @property
    def state(self) -> Any: ...


def static_bytes(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Stateful] | None = None
) -> dict[str, dict[str, int]]:
    """Bytes held now, {role: {"weights", "gradients", "optimizer"}}.

    Every storage counts once, in the order of the roles: tied weights count once, and a base model that two roles share
    belongs to the first role. Of a DTensor the shard of this process counts. Buffers count as weights. Gradients exist
    between backward and zero_grad, optimizer states after the first optimizer step, so the moment of the call matters.
    """
    optimizers = optimizers or {}
    seen: set[tuple[torch.device, int]] = set()

    def held(tensors: Iterable[torch.Tensor | None]) -> int:
        total = 0
        for tensor in (part for whole in tensors if whole is not None for part in plain_tensors(whole)):
            if tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key = (tensor.device, storage.data_ptr())
            if key not in seen:
                seen.add(key)
                total += storage.nbytes()
        return total

    result = {}
    for role in {**models, **optimizers}:
        model, optimizer = models.get(role), optimizers.get(role)
        parameters = list(model.parameters()) if model is not None else []
        result[role] = {
            "weights": held([*parameters, *(model.buffers() if model is not None else [])]),
            "gradients": held(parameter.grad for parameter in parameters),
            "optimizer": held(tensors_in(optimizer.state)) if optimizer is not None else 0,
        }
    return result


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
