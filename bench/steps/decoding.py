"""Prefill and decode steps of `generate`: timed, profiled, and once more on one thread.

A decode step lasts from one call of the decoder's step to the next, so that it has the sampling and the loop in it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.steps import products
from bench.steps.products import Counts
from bench.steps.trace import Event
from bench.steps.training import ONE_THREAD, PROFILED, TIMED, described
from bench.steps.watch import Profile
from rlhf_fast.data.encoding import encode_prompts, load_rows, pad_left
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.rollout.engine import StaticDecoder
from rlhf_fast.rollout.generate import generate

PREFILL, DECODE = "prefill", "decode"
NO_EOS = (-1,)
Clocks = tuple[float, float]


class Ticks:
    """Clocks of a decode's parts: of the prefill, and of every step but the last."""

    def __init__(self, profile: Profile | None = None, part: str = "") -> None:
        """profile: of the prefill or of the second step, as `part` says."""
        self.prefill: Clocks | None = None
        self.steps: list[Clocks] = []
        self.window: Event | None = None
        self._profile, self._part, self._before, self._calls = profile, part, None, 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the decoder's calls take the clocks."""
        prefill, step = StaticDecoder.prefill, StaticDecoder.step

        def prefilled(decoder: StaticDecoder, *args: Any) -> Tensor:
            self._open(self._part == PREFILL)
            before = _clocks()
            logits = prefill(decoder, *args)
            self.prefill = _since(before)
            self._close(self._part == PREFILL)
            return logits

        def stepped(decoder: StaticDecoder, tokens: Tensor) -> Tensor:
            if self._before is not None:
                self.steps.append(_since(self._before))
            self._close(self._part == DECODE and self._calls == 2)
            self._open(self._part == DECODE and self._calls == 1)
            self._calls += 1
            self._before = _clocks()
            return step(decoder, tokens)

        with patch.object(StaticDecoder, "prefill", prefilled), patch.object(StaticDecoder, "step", stepped):
            yield

    def of(self, part: str) -> list[Clocks]:
        """The clocks of a part. The first step is left out, because it makes views for the steps behind it."""
        assert self.prefill is not None
        return [self.prefill] if part == PREFILL else self.steps[1:]

    def _open(self, here: bool) -> None:
        if self._profile is not None and here:
            self._profile.begin()

    def _close(self, here: bool) -> None:
        if self._profile is not None and here:
            self.window, self.calls = self._profile.end(), [*self._profile.calls]


def _clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


def _since(before: Clocks) -> Clocks:
    now = _clocks()
    return now[0] - before[0], now[1] - before[1]


class Decoding:
    """A policy and its prompts. prompts: so many. length: longest prompt in tokens. new_tokens: of each completion."""

    def __init__(self, path: str, rows: str, prompts: int, length: int, new_tokens: int, *, bf16: bool) -> None:
        tokenizer = load_tokenizer(path)
        self.model = load_policy(path)
        found = encode_prompts(load_rows(rows, "prompt")[:prompts], tokenizer, length).examples
        self.ids, self.mask = pad_left([example.prompt_ids for example in found], 0)
        self.new_tokens, self.bf16 = new_tokens, bf16

    @torch.no_grad()
    def run(self, profile: Profile | None = None, part: str = "") -> Ticks:
        """The clocks of one `generate`. profile, part: as in `Ticks`."""
        ticks, options = Ticks(profile, part), {"max_new_tokens": self.new_tokens, "eos_ids": NO_EOS, "pad_id": 0}
        labels = nullcontext() if profile is None else profile.labelled()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16), labels, ticks.taken():
            generate(self.model, self.ids, self.mask, **options)
        return ticks

    def measure(self, rounds: int, directory: Path) -> dict[str, tuple[dict[str, Any], Counts]]:
        """ "prefill" and "decode" -> clocks and profile, ready for JSON, and the matmuls."""
        threads = torch.get_num_threads()
        self.run()
        timed = [self.run() for _ in range(rounds)]
        profiled = {part: self.run(Profile(directory / f"{part}.json"), part) for part in (PREFILL, DECODE)}
        torch.set_num_threads(1)
        try:
            alone = self.run()
        finally:
            torch.set_num_threads(threads)
        found = {}
        for part, ticks in profiled.items():
            assert ticks.window is not None
            clocks = {
                TIMED: [clock for one in timed for clock in one.of(part)],
                PROFILED: ticks.of(part)[:1],
                ONE_THREAD: alone.of(part)[:1],
            }
            found[part] = described(clocks, ticks.window, threads), products.count(ticks.window, ticks.calls)
        return found
