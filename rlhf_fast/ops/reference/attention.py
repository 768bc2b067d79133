"""Attention within rows whose tokens stand side by side: the rows are spread out, with the padding on the right."""

import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.reference.layers import rotary as turned


def packed_attention(
    query_hNd: Tensor,
    key_hNd: Tensor,
    value_hNd: Tensor,
    slots_N: Tensor,
    rows: int,
    length: int,
    *,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """A causal model does not look to the right, so no mask is needed."""
    if rotary is not None:
        query_hNd, key_hNd = (turned(x, *rotary) for x in (query_hNd, key_hNd))
    heads = (_spread(x, slots_N, rows, length) for x in (query_hNd, key_hNd, value_hNd))
    grouped = len(query_hNd) != len(key_hNd)
    out_BhLd = F.scaled_dot_product_attention(
        *heads, is_causal=True, scale=scale, enable_gqa=grouped, dropout_p=dropout
    )
    return out_BhLd.transpose(1, 2).flatten(0, 1).index_select(0, slots_N)


def _spread(x_hNd: Tensor, slots_N: Tensor, B: int, L: int) -> Tensor:
    """[h, N, d] as [B, h, L, d], with 0 at the padding."""
    x_Nhd = x_hNd.transpose(0, 1)
    padded = x_Nhd.new_zeros(B * L, *x_Nhd.shape[1:]).index_copy(0, slots_N, x_Nhd)
    return padded.view(B, L, *x_Nhd.shape[1:]).transpose(1, 2)
