"""What the bench needs of a device: the time of a call, and the memory that the call takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast.training.meter import Meter

FLUSH_BYTES = 256 << 20  # overwritten before a timed call: several times the largest cache of a GPU


@dataclass(frozen=True)
class Contender:
    """A call to be measured."""

    run: Callable[[], object]
    restore: Callable[[], None] | None = None  # untimed, before every run


class CPU:
    """A call's time by the clock, its memory as the process's true peak."""

    name = "cpu"
    sample_seconds = 2e-3  # shorter calls are repeated to fill it, so that the timer and a cold start weigh less

    def timed(self, contender: Contender, calls: int = 1) -> float:
        """Seconds per call; the results are freed within the time, as they are in a training loop."""
        if contender.restore:
            contender.restore()
        start = time.perf_counter()
        for _ in range(calls):
            contender.run()
        return (time.perf_counter() - start) / calls

    def temporary_bytes(self, contender: Contender) -> int:
        """The peak during one call above what was held before: temporaries and results."""
        if contender.restore:
            contender.restore()
        meter = Meter("cpu", memory_every=1)
        with meter.phase("before"):
            pass
        with meter.phase("call"):
            contender.run()
        peaks = meter.step()
        return int(max(0, peaks["memory/call"] - peaks["memory/before"]))

    def about(self) -> dict[str, Any]:
        """What the record of the machine says of the device."""
        return {}


class CUDA:
    """A call's time between two events on the stream, caches cold; its memory as the allocator's peak.

    The queue is filled while the caches are flushed, so that short operations show the device's time, not the host's.
    """

    name = "cuda"
    sample_seconds = 0.0  # one call a sample, because the next call would find its data in the cache

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def timed(self, contender: Contender, calls: int = 1) -> float:
        """Seconds per call, by the device."""
        if contender.restore:
            contender.restore()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        for _ in range(calls):
            contender.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def temporary_bytes(self, contender: Contender) -> int:
        """As for the CPU, by torch's allocator."""
        if contender.restore:
            contender.restore()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def about(self) -> dict[str, Any]:
        """What the record of the machine says of the device."""
        return {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda or torch.version.hip}
