"""The contender's end of the comparison: first step, turns, peak memory, as JSON lines to the process that started it.

A contender reports its first step, makes its warm-up steps, then waits at the end of a step until it is its turn. The
output of libraries goes to stderr. Nothing of this package is imported, because the environments of rivals need not
have it.
"""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Turns:
    """One contender's turns.

    spec: the settings, as `cases.write_specs` wrote them. rival: the package whose version is reported.
    The gradients are those of the first optimizer step of each parameter.
    """

    def __init__(self, spec: dict[str, Any], rival: str) -> None:
        self.spec, self._rival = spec, rival
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._steps = 0
        self._gradients: dict[int, Tensor] = {}
        self._hook = register_optimizer_step_pre_hook(self._note_gradients)

    @classmethod
    def from_command_line(cls, rival: str) -> "Turns":
        """With the spec whose file is the first argument."""
        return cls(json.loads(Path(sys.argv[1]).read_text()), rival)

    def _note_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in self._gradients:
                    self._gradients[id(parameter)] = parameter.grad.detach().clone()

    def end_step(self, facts: Callable[[], dict[str, float]], models: dict[str, nn.Module]) -> None:
        """Call at the end of every step. facts, called after the first: its numbers. models: role -> trained model."""
        self._steps += 1
        if self._steps == 1:
            self._hook.remove()
            gradients = {
                f"{role}.{name}": self._gradients.pop(id(parameter))
                for role, model in models.items()
                for name, parameter in model.named_parameters()
                if id(parameter) in self._gradients
            }
            torch.save(gradients, self.spec["gradients"])
            environment = {self._rival: version(self._rival), "torch": torch.__version__}
            environment |= {"transformers": version("transformers"), "threads": torch.get_num_threads()}
            self._say(facts=facts(), environment=environment)
        if self._steps == self.spec["warmup"]:
            self._wait()
        elif self._steps > self.spec["warmup"]:
            done = self._steps - self.spec["warmup"]
            if done % self.spec["steps_per_turn"] == 0:
                self._say(seconds=time.perf_counter() - self._start, cpu_seconds=time.process_time() - self._cpu_start)
                self._wait()

    def end(self, peak_bytes: int = 0) -> None:
        """Call after the last step. peak_bytes: the process's peak, if its high-water mark was reset on the way."""
        self._say(peak_bytes=max(peak_bytes, _high_water_mark()))

    def _say(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._out, flush=True)

    def _wait(self) -> None:
        sys.stdin.readline()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()


def _high_water_mark() -> int:
    """The largest resident set. `getrusage` would also count the process that started this process."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
