"""Looks for weights that are NaN or infinite."""

import torch
from torch import nn

from rlhf_fast.lm.sharding import part_here


@torch.no_grad()
def not_finite(model: nn.Module, *, trained: bool = False) -> str | None:
    """The name of the first weight that holds NaN or infinity, or None.

    Reads every weight once, and waits for the device once. Buffers are left out, because some masks are infinite.
    trained: looks at the weights that require gradients alone, such as an adapter's. Of a model in shards it looks at
        the parts of this process.
    """
    looked_at = [(name, part_here(x)) for name, x in model.named_parameters() if x.requires_grad or not trained]
    weights = {name: x for name, x in looked_at if x.is_floating_point() and x.numel() and not x.is_meta}
    largest = [torch.linalg.vector_norm(weight, torch.inf).double() for weight in weights.values()]
    if not largest:
        return None
    finite = torch.stack([x.to(largest[0].device) for x in largest]).isfinite().tolist()
    return next((name for name, holds in zip(weights, finite, strict=True) if not holds), None)
