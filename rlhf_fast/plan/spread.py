"""The processes of a planned run: which rows are a process's own, and a model's weights in shards over all of them.

Both are the run's own functions (`ranks`, `lm.sharding`). A model of fake tensors is put into shards by FSDP2 itself,
in front of processes that are not there, so that a pass has the very buffers of a run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.sharding import lay_out, shard_untried
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.ranks import Ranks, pretended

_RARE = 5  # standard deviations, beyond which a share of random rows is found once in millions of steps


class Spread(NamedTuple):
    """How a model's weights lie over `size` processes: whole in each ("none"), or in shards ("full", "hybrid").

    local: processes of one machine. gloo: messages are those of gloo, which has no GPU.
    """

    how: str
    size: int
    local: int
    gloo: bool = False

    @property
    def parts(self) -> int:
        """How many parts a weight is split into."""
        return {"none": 1, "full": self.size, "hybrid": self.local}[self.how]

    @contextmanager
    def putter(self) -> Iterator[Callable[[PreTrainedModel], None]]:
        """Inside, the given function puts a model of fake tensors into shards, as the first process has them."""
        if self.how == "none":
            yield lambda model: None
            return
        with pretended(self.size):
            mesh = lay_out(self.how, "cpu", self.size, self.local)
            yield lambda model: shard_untried(model, mesh, reduce_scatter=_GlooReduceScatter() if self.gloo else None)


class _GlooReduceScatter:
    """gloo adds up a copy of what a process gives to a reduce-scatter; nothing is sent here."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        copy = input_tensor.clone()
        output_tensor.copy_(copy[: len(output_tensor)])


def spread_of(plan: PlanConfig) -> Spread:
    """The processes of a plan, one for each GPU."""
    return Spread(plan.shard, plan.gpus, plan.gpus // plan.machines)


def own_rows(rows: int, size: int, rank: int) -> int:
    """How many of `rows` rows are those of process `rank`."""
    part = Ranks(rank, size).part(rows)
    return part.stop - part.start


def rows_of_minibatch(own: int, batch: int, minibatches: int, size: int) -> int:
    """How many of a process's `own` rows one of the minibatches of a batch may hold.

    A minibatch takes its rows at random out of the whole batch. Its part of `own` rows is hypergeometric: on average
    own / minibatches rows, and hardly ever more than five standard deviations above.
    """
    if size == 1 or minibatches == 1:
        return own // minibatches
    step = batch // minibatches
    share = own / batch
    deviation = math.sqrt(step * share * (1 - share) * (batch - step) / (batch - 1))
    return min(own, step, math.ceil(step * share + _RARE * deviation))
