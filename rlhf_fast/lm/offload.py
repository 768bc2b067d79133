"""Frozen models that wait in CPU memory and come to the device only while they are used.

Their weights never change, so leaving is free: the copy on the device is dropped. On CUDA the CPU's copy is pinned,
which makes arriving one transfer at full speed. Weights that are on the device already, because they are shared with a
model that lives there, stay. On a CPU there is nowhere to go and nothing happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def place(model: nn.Module, device: torch.device, offload: bool) -> nn.Module:
    """`model` on `device`; with `offload` it stays on the CPU, frozen, and `visiting(model)` brings it there."""
    if not offload:
        return model.to(device)
    away = [t for t in (*model.parameters(), *model.buffers()) if t.device.type != device.type]
    for tensor in away:
        tensor.data = tensor.data.pin_memory()
    model.offloaded = (device, [(tensor, tensor.data) for tensor in away])
    return model


@contextmanager
def visiting(model: nn.Module | None) -> Iterator[None]:
    """`model` is on its device inside; nothing happens to one that was never offloaded. Visits do not nest."""
    device, homes = getattr(model, "offloaded", (None, []))
    try:
        for tensor, home in homes:
            tensor.data = _upload(home, device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
