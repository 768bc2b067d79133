"""Frozen models that wait in CPU memory and come to the device only while they are used.

The weights never change, so a model leaves the device at no cost: its copy there is dropped. On CUDA the copy in CPU
memory is pinned, so that a model comes back in one transfer at full speed. Weights that are shared with a model on the
device stay there. Where the device is the CPU, nothing moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

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
    """Inside, an offloaded `model` is on its device; other models stay where they are. Visits do not nest."""
    device, homes = getattr(model, "offloaded", (torch.device("cpu"), []))
    try:
        for tensor, home in homes:
            tensor.data = _upload(home, device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
