"""Which tokens top-k and top-p keep, and such sets as bits.

A set is kept as bits because training needs the very one a token was drawn from: logits computed again, in another
order or by a policy that has moved, would put tokens near the threshold on its other side, the drawn one among them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.checks import is_readable
from rlhf_fast.ops.reference import at_least_fp32

_FIRST_LOOK = 256  # tokens, which hold most of p in most rows


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[N, V] bool: the logits of each row that are at least its threshold, so that ties stay together.

    The threshold is the top_k-th largest logit (0: the smallest), then, of what that keeps, the last that the smallest
    set of probability top_p needs.
    """
    vocabulary, largest = logits.shape[-1], None
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < vocabulary:
        largest = logits.topk(top_k, dim=-1).values
        kept = logits >= largest[:, -1:]
    if top_p == 1:
        return kept
    top = logits.amax(-1, keepdim=True)

    def weights(z: Tensor) -> Tensor:
        return torch.exp((at_least_fp32(z) - at_least_fp32(top)) / temperature).double()

    goal = top_p * torch.where(kept, weights(logits), 0.0).sum(-1, keepdim=True)
    if largest is None:
        largest = _largest(logits, lambda z: bool((weights(z).sum(-1, keepdim=True) >= goal).all()))
    w = weights(largest)
    needed = (w.cumsum(-1) - w < goal).sum(-1, keepdim=True)
    return logits >= largest.gather(-1, (needed - 1).clamp(min=0))


def _largest(logits: Tensor, enough: Callable[[Tensor], bool]) -> Tensor:
    """The largest logits of each row in order: `enough` on the CPU, all where asking would wait for a device.

    All, too, where there is nothing to ask about: under `torch.compile` and of fake tensors.
    """
    vocabulary, count = logits.shape[-1], _FIRST_LOOK
    if not is_readable(logits):
        count = vocabulary
    while count < vocabulary:
        largest = logits.topk(count, dim=-1).values
        if enough(largest):
            return largest
        count *= 8
    return logits.sort(dim=-1, descending=True).values


def packed(mask: Tensor) -> Tensor:
    """[..., V] bool as [..., ceil(V / 8)] uint8: place j is bit j % 8 of byte j // 8."""
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits * _powers(mask.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, places: int) -> Tensor:
    """The [..., places] bool mask that `packed` made `bits` of."""
    return (bits.unsqueeze(-1) & _powers(bits.device)).bool().flatten(-2)[..., :places]


def _powers(device: torch.device) -> Tensor:
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)
