"""Wall time and true peak memory of every phase of a training step, and the bytes each role holds.

On CUDA the peak is the allocator's (`max_memory_allocated`). On the CPU it is the process's resident set: the kernel's
high-water mark (VmHWM) is reset when a phase begins and read when it ends, so that a phase never inherits the peak of
an earlier one; where the mark cannot be reset a thread samples the resident set instead. Memory the C allocator keeps
after `free` would blur the phases too, and handing it back costs page faults later (a third of a step on a toy model),
so on the CPU only one step in `memory_every` is measured for memory; time is measured in all of them. Inside
`TensorBytes` the peaks are those of live tensors instead.

Left out: memory of other processes, of child processes, and what the CUDA driver and cuBLAS hold outside the allocator.
"""

import ctypes
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast.training.tensor_bytes import TensorBytes

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
    """Largest `current_bytes` since the mark was last reset (a Meter resets it at the start of each measured phase)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(match[1]) * 1024
    return _process_peak()


def _process_peak() -> int:
    """Without /proc only the peak of the whole process is known (macOS counts bytes, the others KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_high_water_mark() -> bool:
    """Sets VmHWM to the current resident set; False where the kernel does not let us."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _trim_heap() -> None:
    """Gives free heap pages back to the kernel (glibc only), else they count as held by the next phase."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class _Sampler:
    """Samples the resident set every 2 ms: the fallback where the high-water mark cannot be reset."""

    def __init__(self) -> None:
        self.peak = current_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, current_bytes())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.peak, current_bytes())


class Meter:
    """Measures phases, adds them up to steps and sums up the run.

    A phase may be entered several times within a step (its times add, its peak is the largest); phases do not nest.
    A phase that raises is not counted.

        meter = Meter(device)
        for batch in batches:
            with meter.phase("rollout"): ...
            with meter.phase("policy"): ...
            metrics |= meter.step()
    """

    _TOTALS = ("_history", "_step_history", "_run_peaks", "_counts")

    def __init__(self, device: torch.device | str = "cpu", *, memory_every: int = 25) -> None:
        """memory_every: on the CPU, measure memory in the first two steps and in every memory_every-th after them."""
        if memory_every < 1:
            raise ValueError(f"memory_every: expected at least 1, got {memory_every}")
        self.device = torch.device(device)
        self.memory_every = memory_every
        self.steps = 0  # of this process: the first ones of a resumed run are measured too
        self._phase: str | None = None
        self._step_start: float | None = None
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._history: dict[str, list[float]] = {}
        self._step_history: list[float] = []
        self._run_peaks: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the body as part of phase `name`. Raises ValueError inside another phase."""
        if self._phase is not None:
            raise ValueError(f"phase: phases must not nest, got {name!r} inside {self._phase!r}")
        self._phase = name
        if self._step_start is None:
            self._step_start = time.perf_counter()
        cuda = self.device.type == "cuda"
        counter = TensorBytes.active
        measured = cuda or counter is not None or self.steps < 2 or self.steps % self.memory_every == 0
        sampler = None
        try:
            if counter is not None:
                counter.take_peak()
            elif cuda:
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            elif measured:
                _trim_heap()
                sampler = None if _reset_high_water_mark() else _Sampler()
            start = time.perf_counter()
            yield
            if cuda:
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
        finally:
            self._phase = None
            sampled_peak = sampler.stop() if sampler else None
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._counts[name] = self._counts.get(name, 0) + 1
        if measured:
            if counter is not None:
                peak = counter.take_peak()
            else:
                peak = peak_bytes(self.device) if sampled_peak is None else sampled_peak
            self._peaks[name] = max(self._peaks.get(name, 0), peak)

    def step(self, *, counted: bool = True) -> dict[str, float]:
        """Ends the step: {"time/<phase>": s, "memory/<phase>": peak bytes, "time/step": s}.

        time/step is the wall time since the previous call (since the first phase, for the first step), so it also holds
        what ran outside any phase. memory/* is there in measured steps only.
        counted: False for what came before the first step (an evaluation, say): its phases count, but it is no step.
        """
        now = time.perf_counter()
        elapsed = 0.0 if self._step_start is None else now - self._step_start
        result: dict[str, float] = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        result |= {f"memory/{name}": peak for name, peak in self._peaks.items()}
        result["time/step"] = elapsed
        for name, seconds in self._seconds.items():
            self._history.setdefault(name, []).append(seconds)
        for name, peak in self._peaks.items():
            self._run_peaks[name] = max(self._run_peaks.get(name, 0), peak)
        self._seconds, self._peaks = {}, {}
        self._step_start = now
        if counted:
            self._step_history.append(elapsed)
            self.steps += 1
        return result

    def summary(self) -> dict[str, dict[str, float] | int | float]:
        """The run so far (finished steps): {phase: {"seconds", "seconds_median", "peak_bytes", "count"}, "steps": n,
        "step_seconds", "step_seconds_median"}. Medians are over the steps in which the phase ran; count is how often
        it was entered."""
        phases = {
            name: {
                "seconds": sum(values),
                "seconds_median": statistics.median(values),
                "peak_bytes": self._run_peaks.get(name, 0),
                "count": self._counts[name],
            }
            for name, values in self._history.items()
        }
        return phases | {
            "steps": len(self._step_history),
            "step_seconds": sum(self._step_history),
            "step_seconds_median": statistics.median(self._step_history or [0.0]),
        }

    def state_dict(self) -> dict[str, Any]:
        """The finished steps, for the summary of a run that is continued in another process."""
        return {name: getattr(self, name) for name in self._TOTALS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._TOTALS:
            setattr(self, name, state[name])


def static_bytes(
    models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer] | None = None
) -> dict[str, dict[str, int]]:
    """Bytes really held now, {role: {"weights", "gradients", "optimizer"}}.

    Counted by storage and once each, in the order of the roles: tied weights once, and a base model that two roles
    share belongs to the first. Buffers count as weights. Gradients exist between backward and zero_grad, optimizer
    states after the first optimizer step; call this at the moment you want to know about.
    """
    optimizers = optimizers or {}
    seen: set[tuple[torch.device, int]] = set()

    def held(tensors: Iterable[torch.Tensor | None]) -> int:
        total = 0
        for tensor in tensors:
            if tensor is None or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key = (tensor.device, storage.data_ptr())
            if key not in seen:
                seen.add(key)
                total += storage.nbytes()
        return total

    result = {}
    for role in models | optimizers:
        model, optimizer = models.get(role), optimizers.get(role)
        parameters = list(model.parameters()) if model is not None else []
        result[role] = {
            "weights": held([*parameters, *(model.buffers() if model is not None else [])]),
            "gradients": held(parameter.grad for parameter in parameters),
            "optimizer": held(_tensors(optimizer.state)) if optimizer is not None else 0,
        }
    return result


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
