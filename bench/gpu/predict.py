"""Seconds of a part before it has run: computed from bytes and flops, and assumed for what the host does.

The rates are those of an H200's data sheet; `SHARE` of them is expected. No figure here has been measured on a GPU.
"""

from collections.abc import Iterable
from typing import NamedTuple

BYTES, FLOPS, FLOPS_64 = 4.8e12, 989e12, 67e12  # a second: memory, dense bf16, float64 on the matrix units
SHARE = 0.7  # of either rate
PROCESS = 9.0  # seconds of a new process: imports of torch and transformers, and the context
TRITON = 0.7  # seconds that Triton takes to compile a kernel
INDUCTOR = 7.0  # seconds that torch.compile takes for a function
LAUNCH = 8e-6  # seconds of the host for a launch by torch
DISK = 1e9  # bytes a second


class Work(NamedTuple):
    """What one piece of a part does; the pieces follow one another. seconds: assumed, for what has no better figure."""

    bytes: float = 0
    flops: float = 0
    flops_64: float = 0
    launches: float = 0
    seconds: float = 0

    def times(self, number: float) -> "Work":
        """So many of these."""
        return Work(*(number * x for x in self))

    @property
    def device(self) -> float:
        """Seconds of the device: by memory or by arithmetic, whichever takes longer."""
        return max(self.bytes / BYTES, self.flops / FLOPS + self.flops_64 / FLOPS_64) / SHARE

    @property
    def total(self) -> float:
        """Seconds, where the host's launches hide behind the device or the other way round."""
        return max(self.device, self.launches * LAUNCH) + self.seconds


def seconds(pieces: Iterable[Work]) -> float:
    """Of a part, with its process."""
    return PROCESS + sum(piece.total for piece in pieces)


def compiled(kernels: int = 0, functions: int = 0) -> Work:
    """Kernels compiled by Triton, functions by torch.compile."""
    return Work(seconds=TRITON * kernels + INDUCTOR * functions)


def processes(number: int) -> Work:
    """Further processes."""
    return Work(seconds=PROCESS * number)


def files(size: float) -> Work:
    """Bytes written to a disk, or read from it."""
    return Work(seconds=size / DISK)
