"""What the reference's modules share: the dtype of statistics, and a sum over a denominator that may be 0."""

import contextlib

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def mean_over(x: Tensor, denominator: float | Tensor) -> Tensor:
    """Sum over a denominator, which may be a 0-dim tensor; 0 / 0 is 0: a batch in which nothing counts."""
    if isinstance(denominator, Tensor):
        denominator = denominator.to(x).clamp(min=torch.finfo(x.dtype).tiny)
    return x.sum() / denominator


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off, on devices that have it (meta has none)."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()
