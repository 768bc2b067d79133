"""Frozen models that wait in CPU memory, or in shards, and are whole on the device only while they are used.

The weights never change, so a model leaves the device at no cost: its copy there is dropped. On CUDA the copy in CPU
memory is pinned, so that a model comes back in one transfer at full speed. Weights that are shared with a model on the
device stay there. Where the device is the CPU, nothing moves. A model in shards (`sharding`) is made whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlhf_fast.lm.sharding import whole

Model = TypeVar("Model", bound=nn.Module)


def place(model: Model, device: torch.device, offload: bool) -> Model:
    """`model`, moved to `device`. With `offload` it stays on the CPU, and `visiting(model)` brings it to the device."""
    if not offload:
        return model.to(device)
    away = [t for t in (*model.parameters(), *model.buffers()) if t.device.type != device.type]
    for tensor in away:
        tensor.data = tensor.data.pin_memory()
    model.offloaded = (device, [(tensor, tensor.data) for tensor in away])  # pyright: ignore[reportArgumentType]
    return model


@contextmanager
def visiting(model: nn.Module | None) -> Iterator[None]:
    """Inside, an offloaded `model` is on its device, and a model in shards is whole; other models stay as they are.

    Visits of an offloaded model do not nest. A visit of a model in shards needs all processes, as `whole` does.
    """
    device, homes = getattr(model, "offloaded", (torch.device("cpu"), []))
    try:
        for tensor, home in homes:
            tensor.data = _upload(home, device)
        with whole(model):
            yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
