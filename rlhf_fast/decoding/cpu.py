"""The compiled CPU kernels of a decode step, on tensors. `engine` and `blocks` hold the same in plain PyTorch."""

import torch
from torch import Tensor

from rlhf_fast.ops.dispatch import COMPILED, _cpu, code, pointer

_HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor) -> bool:
    """Whether these kernels take tensors like x."""
    return COMPILED and x.device.type == "cpu" and x.dtype in _HALF_OR_FLOAT


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; x contiguous, weight of its dtype."""
    out, H = torch.empty_like(x), len(weight)
    _cpu.rms_norm(code(x), x.data_ptr(), weight.data_ptr(), x.numel() // H, H, epsilon, out.data_ptr())
    return out


def attention(
    heads: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    starts: Tensor,
    cache: Tensor,
    slot: int,
    *,
    query_heads: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention [n, Q D] of one new token per row, whose key and value go to `slot` of the cache.

    heads: [n, (Q + 2 K) D] contiguous, queries, keys, values. tables: cos and sin [positions, D] of the rotary
    embedding, sin negative in its first half. starts: [n] int64, the first slot each row sees. cache: [n, 2 K, S, D]
    contiguous, of the dtype of heads.
    """
    n, both, S, D = cache.shape
    cos, sin = tables or (None, None)
    out = heads.new_empty(n, query_heads * D)
    _cpu.decode_attention(
        code(heads), heads.data_ptr(), n, query_heads, both // 2, D, pointer(cos), pointer(sin), positions.data_ptr(),
        starts.data_ptr(), cache.data_ptr(), S, slot, window or 0, scale, softcap or 0.0, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
