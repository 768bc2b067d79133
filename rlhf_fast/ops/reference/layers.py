"""What a transformer's layer does between its matmuls."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm times weight) (arXiv 1910.07467)."""
    total = x if delta is None else x + delta
    return total, F.rms_norm(total, weight.shape, weight, epsilon)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up (arXiv 2002.05202)."""
    return F.silu(gate) * up


def rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [..., N, d] turned by the angles of its N tokens: elements i and i + d / 2 are a point of the plane."""
    first, second = x.chunk(2, dim=-1)
    return (x * cosines + torch.cat([-second, first], dim=-1) * sines).to(x.dtype)
