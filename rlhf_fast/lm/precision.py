"""Trials of half-precision models in fp32, where right paths agree to many digits.

In bf16 two right paths of a deep model differ by several percent, because they round at different places. Nothing small
could be told from that. A trial therefore runs on fp32 copies of the weights, for which it needs four more bytes a
weight for a moment.

Left out: weights of tensor subclasses (quantised, sharded), which stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


def is_half(model: nn.Module) -> bool:
    """Whether any weight of the model has two bytes."""
    return any(parameter.dtype in HALVES for parameter in model.parameters())


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, autocast is off, and the model's half-precision weights and buffers have their values in fp32."""
    found = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALVES and type(t.data) is torch.Tensor]
    kept = [tensor.data for tensor in found]
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    try:
        for tensor in found:
            tensor.data = tensor.data.float()
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for tensor, data in zip(found, kept, strict=True):
            tensor.data = data
