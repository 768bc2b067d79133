"""Which rows make a step, and the random numbers of a step."""

import functools
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from rlhf_fast.data.encoding import epoch_batches

_seeded = (0, 0)  # what the generators got last for a step, and how many guests have drawn since


def seed_everything(seed: int, step: int) -> int:
    """Seeds the global generators from (seed, step), and returns the number that they got.

    A resumed run therefore draws the same numbers as an uninterrupted run.
    """
    global _seeded
    _seeded = step_seed(seed, step), 0
    _seed(_seeded[0])
    return _seeded[0]


def step_seed(seed: int, step: int) -> int:
    """The number that the global generators get for a step."""
    return _mixed(seed, step)


@contextmanager
def guest_draws() -> Iterator[None]:
    """Inside, the global generators are a guest's, such as a reward function's; torch's then go on where they were.

    Each guest of a step draws other numbers. A resumed run gives them the same numbers as an uninterrupted run.
    """
    global _seeded
    _seeded = _seeded[0], _seeded[1] + 1
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        _seed(_mixed(*_seeded))
        yield


def _mixed(first: int, second: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{first}/{second}".encode()).digest()[:8], "big") >> 1


def _seed(mixed: int) -> None:
    random.seed(mixed)
    numpy.random.seed(mixed % 2**32)
    # torch.manual_seed is slow: at every step it would note down the stack for every kind of device not in use.
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(mixed)


def micro_batches(rows: int, size: int | None) -> list[slice]:
    """Slices that cut `rows` rows into pieces of `size` rows; the last piece may be shorter. None: one piece."""
    size = size or max(rows, 1)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


class OfflineBatches:
    """The row indices of every step of `epochs` shuffled passes; each pass drops the rows that fill no batch.

    The passes are shuffled one at a time, so that any number of epochs fits into memory.
    Raises ValueError where there are fewer rows than a batch takes.
    """

    def __init__(self, rows: int, batch_size: int, epochs: int, seed: int) -> None:
        if rows < batch_size:
            raise ValueError(f"batch_size: expected at most the number of rows, {rows}, got {batch_size}")
        self.per_epoch, self.steps = rows // batch_size, rows // batch_size * epochs
        self.pass_of = functools.lru_cache(maxsize=1)(functools.partial(epoch_batches, rows, batch_size, seed))

    def __call__(self, step: int) -> list[int]:
        """The rows of a step, counted from 1."""
        epoch, index = divmod(step - 1, self.per_epoch)
        return self.pass_of(epoch)[index]
