"""Which tokens top-k and top-p keep, and how such a set is stored: one bit per token of the vocabulary.

The set is stored because training needs the one that the token was drawn from, and cannot compute it again: logits
summed in another order, or of a policy that has moved, put tokens near the threshold on its other side, and the drawn
token may be among them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.checks import is_readable
from rlhf_fast.ops.reference import at_least_fp32

_FIRST_LOOK = 256  # tokens: most rows have most of their probability in fewer


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[N, V] bool: the logits of each row that are at least its threshold, so that ties stay together.

    top_k keeps the logits that are at least the top_k-th largest (0: all). Of these top_p keeps the largest until their
    probability reaches top_p; the threshold is the last of them.
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
    """The largest logits of each row, in descending order: 256 of them, 2048, ... until `enough` says so.

    All of them where `enough` cannot be asked: on a GPU that would wait for the device, and under `torch.compile` or of
    fake tensors there is no number to ask about.
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
