"""The numbers of one optimizer step, gathered on the device and read once.

Reading a number from a GPU waits until the GPU has reached it. `Tally` adds the numbers of all micro-batches as tensors
and reads them together. Sums are float64, as the sums of Python's floats would be.

    tally = Tally()
    for micro_batch in micro_batches:
        tally.add("loss", loss)  # no wait
    metrics = tally.read()  # one wait

With several processes every process adds the numbers of its own rows, and `read` gives the numbers of all of them.
"""

from typing import TypeVar

import torch
from torch import Tensor

from rlhf_fast.ranks import current
from rlhf_fast.training import ending

Number = Tensor | float
Told = TypeVar("Told")


class Tally:
    """Named sums and maxima of numbers, 0-dim tensors or Python's own."""

    def __init__(self) -> None:
        self._numbers: dict[str, Number] = {}
        self._largest: set[str] = set()  # the names whose largest value is kept

    def add(self, name: str, value: Number) -> None:
        """Adds `value` to the sum called `name`."""
        self._numbers[name] = self._numbers.get(name, 0) + _double(value)

    def raise_to(self, name: str, value: Number) -> None:
        """Keeps the largest value called `name`; a NaN stays."""
        self._largest.add(name)
        value, now = _double(value), self._numbers.get(name)
        if now is None:
            self._numbers[name] = value
        else:
            self._numbers[name] = torch.maximum(*(torch.as_tensor(x, dtype=torch.float64) for x in (now, value)))

    def same(self, name: str, value: Number) -> None:
        """Keeps a number that every process has alike, such as the norm of summed gradients."""
        self.raise_to(name, value)

    def read(self) -> dict[str, float]:
        """Every number by its name, in the order in which the names first came. Waits for the device once.

        With several processes the sums and maxima are those of all processes.
        """
        return self.exchange(None)[0]

    def exchange(self, told: Told) -> tuple[dict[str, float], list[Told]]:
        """`read`, and what every process has told the others, in one collective.

        The signals that have asked a process to end go with it, so that all processes end after the same step.
        """
        every = current().gather((self._mine(), self._largest, ending.asked(), told))
        ending.hear([signum for _, _, signum, _ in every])
        numbers, largest = dict(every[0][0]), every[0][1]
        for theirs, names, *_ in every[1:]:
            largest = largest | names
            for name, value in theirs.items():
                if name not in numbers:
                    numbers[name] = value
                elif name in largest:
                    numbers[name] = max(numbers[name], value) if value == value else value
                else:
                    numbers[name] += value
        return numbers, [told for *_, told in every]

    def _mine(self) -> dict[str, float]:
        """The numbers of this process."""
        tensors = {name: value for name, value in self._numbers.items() if isinstance(value, Tensor)}
        read = dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)) if tensors else {}
        return {name: read.get(name, value) for name, value in self._numbers.items()}


def _double(value: Number) -> Number:
    return value.detach().double() if isinstance(value, Tensor) else value
