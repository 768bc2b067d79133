"""Wall time and true peak memory of every phase of a training step.

On CUDA the peak is the allocator's (`max_memory_allocated`). On the CPU it is the peak of the process's resident set.
The kernel's high-water mark (VmHWM) is reset when a phase begins and read when it ends, so that no phase inherits the
peak of an earlier phase. Where the mark cannot be reset, a thread samples the resident set instead.

Memory that the C allocator keeps after `free` would blur the phases too, so it is handed back before a phase is
measured. Handing it back costs page faults later, a third of a step on a toy model. On the CPU, memory is therefore
measured in one step out of `memory_every` only; time is measured in every step. Inside `TensorBytes` the peaks are
peaks of live tensors instead.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_fast.training.memory import current_bytes, peak_bytes, reset_high_water_mark, trim_heap
from rlhf_fast.training.tensor_bytes import TensorBytes


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

    A phase may be entered several times within a step: its times add up, and its peak is the largest peak. Phases do
    not nest. A phase that raises is not counted.

        meter = Meter(device)
        for batch in batches:
            with meter.phase("rollout"): ...
            with meter.phase("policy"): ...
            metrics |= meter.step()
    """

    _TOTALS = ("_history", "_step_history", "_run_peaks", "_counts")

    def __init__(self, device: torch.device | str = "cpu", *, memory_every: int = 25) -> None:
        """memory_every: on the CPU, memory is measured in the first two steps and in every memory_every-th step."""
        if memory_every < 1:
            raise ValueError(f"memory_every: expected at least 1, got {memory_every}")
        self.device = torch.device(device)
        self.memory_every = memory_every
        self.steps = 0  # steps of this process, so that the first steps of a resumed run are measured too
        self._phase: str | None = None
        self._step_start: float | None = None
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._history: dict[str, list[float]] = {}
        self._step_history: list[float] = []
        self._run_peaks: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._process_peak = 0

    def process_peak(self) -> int:
        """The process's largest resident set so far in bytes, whatever was reset between phases; for the CPU."""
        return max(self._process_peak, peak_bytes("cpu"))

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
                trim_heap()
                self._process_peak = self.process_peak()  # the reset forgets it
                sampler = None if reset_high_water_mark() else _Sampler()
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

        time/step is the wall time since the previous call; in the first step, since the first phase. It includes work
        outside of phases. memory/* is there in measured steps only.
        counted: False for work before the first step, such as an evaluation: its phases count, but it is no step.
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
        """The finished steps so far: {phase: {"seconds", "seconds_median", "peak_bytes", "count"}, "steps": n,
        "step_seconds", "step_seconds_median"}.

        Medians are over the steps in which the phase ran. count says how often the phase was entered.
        """
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
        """Restores a `state_dict`."""
        for name in self._TOTALS:
            setattr(self, name, state[name])
