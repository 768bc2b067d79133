"""Prompts and responses side by side, as every pass of a model takes them.

Shapes: B rows, P prompt tokens, T response tokens, L = P + T.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Left-padded prompts followed by right-padded responses; masks are bool, True = a real token."""

    prompt_ids: Tensor  # [B, P] int64
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] bool

    def rows(self, index: slice | Tensor) -> "Sequences":
        """These rows alone."""
        return Sequences(*(x[index] for x in self))

    def to(self, device: torch.device) -> "Sequences":
        """The same sequences on `device`."""
        return Sequences(*(x.to(device) for x in self))

    def input_ids(self) -> Tensor:
        """Prompts and responses side by side [B, L] int64, padding included."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    def attention_mask(self) -> Tensor:
        """[B, L] bool, True = a real token."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)


def position_ids(mask_BL: Tensor) -> Tensor:
    """Positions [B, L] int64, counted over real tokens alone, so that left padding does not shift them."""
    return (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
