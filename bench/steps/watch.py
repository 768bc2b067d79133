"""What a profiled window needs beyond the profiler: labels on what the profiler cannot name, and attention's rows."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bench.steps.products import Attention
from bench.steps.trace import ATTENTION, LAYERS, OPTIMIZER, SAMPLING, WINDOW, Event, windows
from rlhf_fast.lm import layers, packing
from rlhf_fast.rollout import cpu, generate
from rlhf_fast.training.learner import Learner


class Profile:
    """Profiles what runs between `begin` and `end`, all of it inside `labelled`.

    path: of the file that the profiler writes. calls: the attention's calls of the window.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.calls, self._open = path, list[Attention](), ExitStack()

    def labelled(self) -> AbstractContextManager[None]:
        """Inside, parts of the package carry labels that `trace` knows, and attention's calls are noted."""
        return labelled(self.calls)

    def begin(self) -> None:
        """Turns the profiler on and opens the window."""
        self.calls.clear()
        self._profiler = self._open.enter_context(profile(activities=[ProfilerActivity.CPU], record_shapes=True))
        self._open.enter_context(record_function(WINDOW))

    def end(self) -> Event:
        """The window, with its tree of events."""
        self._open.close()
        self._profiler.export_chrome_trace(str(self.path))
        (window,) = windows(self.path)
        self.path.unlink()
        return window


@contextmanager
def labelled(calls: list[Attention]) -> Iterator[None]:
    """`Profile.labelled`, with the calls in this list."""
    with ExitStack() as stack:
        for owner, name, group in (
            (Learner, "clip", OPTIMIZER),
            (Learner, "apply", OPTIMIZER),
            (generate, "sample_tokens", SAMPLING),
            (generate, "row_uniforms", SAMPLING),
        ):
            stack.enter_context(patch.object(owner, name, _named(getattr(owner, name), group)))
        for module in (layers, packing):
            stack.enter_context(patch.object(module, "packed_attention", _noted(module.packed_attention, calls)))
        stack.enter_context(patch.object(cpu, "rms_norm", _decoding_norm(cpu.rms_norm)))
        stack.enter_context(patch.object(cpu, "attention", _decoding_attention(cpu.attention, calls)))
        yield


def _named(function: Callable, group: str) -> Callable:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with record_function(f"bench: {group}"):
            return function(*args, **options)

    return call


def _noted(attention: Callable, calls: list[Attention]) -> Callable:
    """`packed_attention`, whose rows are noted."""

    def call(
        query: Tensor, key: Tensor, value: Tensor, slots: Tensor, rows: int, length: int, **options: Any
    ) -> Tensor:
        lengths = tuple(torch.bincount(slots // length).tolist())
        backward = torch.is_grad_enabled() and query.requires_grad
        calls.append(
            Attention(lengths, lengths, len(query), len(key), query.shape[2], _dtype(query), backward=backward)
        )
        return attention(query, key, value, slots, rows, length, **options)

    return call


def _decoding_norm(make: Callable) -> Callable:
    return lambda *args: _named(make(*args), LAYERS)


def _decoding_attention(make: Callable, calls: list[Attention]) -> Callable:
    """`cpu.attention`, whose steps carry a label and are noted."""

    def made(cache: Tensor, tables: Any, positions: Tensor, starts: Tensor, **options: Any) -> Callable:
        attend, first = make(cache, tables, positions, starts, **options), tuple(starts.tolist())
        (_, both, _, D), dtype = cache.shape, _dtype(cache)

        def step(heads: Tensor, slot: int) -> Tensor:
            keys = tuple(slot + 1 - start for start in first)
            queries = heads.numel() // (len(first) * D) - both
            calls.append(Attention((1,) * len(first), keys, queries, both // 2, D, dtype, backward=False))
            with record_function(f"bench: {ATTENTION}"):
                return attend(heads, slot)

        return step

    return made


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
