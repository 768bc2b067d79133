"""What the processes of a run tell each other about a round's completions."""

from typing import NamedTuple

from torch import Tensor


class Everyone(NamedTuple):
    """The completions of all processes in their order, on the device."""

    lengths: Tensor  # [batch_size] int64, response tokens
    finished: Tensor  # [batch_size] bool


class Shares(NamedTuple):
    """What the processes have of some completions."""

    rows: list[int]  # of every process
    tokens: Tensor  # response tokens of all of them, 0-dim int64 on the device
