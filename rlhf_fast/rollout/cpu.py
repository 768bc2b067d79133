"""The compiled CPU kernels of a decode step, on tensors. `engine` and `blocks` have the same steps in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.ops.dispatch import COMPILED, _cpu, code, has_address, pointer

_HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor) -> bool:
    """Whether these kernels take x: a tensor on the CPU of a dtype that they know.

    A tensor subclass is refused, because the kernels read the tensor's address.
    """
    return COMPILED and has_address(x) and x.device.type == "cpu" and x.dtype in _HALF_OR_FLOAT


def rms_norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    """x -> x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, for contiguous x of weight's dtype.

    The caller has to ask `runs` about weight and about every x.
    """
    assert _cpu is not None  # else `runs` is False
    kernel, dtype, H, address = _cpu.add_rms_norm, code(weight), weight.numel(), weight.data_ptr()

    def norm(x: Tensor, weight: Tensor = weight) -> Tensor:  # the default keeps the address alive
        out = torch.empty_like(x)
        kernel(dtype, x.data_ptr(), 0, address, x.numel() // H, H, epsilon, 0, out.data_ptr(), 0, 1)
        return out

    return norm


def attention(
    cache: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    starts: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Callable[[Tensor, int], Tensor]:
    """(heads, slot) -> attention [n, Q D] of one new token per row, whose key and value go to `slot` of the cache.

    heads: [n, (Q + 2 K) D] of the cache's dtype: queries, keys, values.
    cache: [n, 2 K, S, D] contiguous.
    tables: cos and sin [positions, D] of the rotary embedding, contiguous; sin is negative in its first half.
    positions: [n] int64, changed in place from step to step.
    starts: [n] int64, the first slot that each row sees.
    scaling, softcap, window: the layer's, as in `blocks.Block`.
    The caller has to ask `runs` about the cache. Raises TypeError where heads or another argument is no plain tensor.
    """
    if not all(map(has_address, (cache, positions, starts, *(tables or ())))):
        raise TypeError("attention: expected plain tensors for the cache, the tables, the positions and the starts")
    assert _cpu is not None  # else `runs` is False
    kernel = _cpu.decode_attention
    (n, both, S, D), threads = cache.shape, torch.get_num_threads()
    cos, sin = tables or (None, None)
    dtype, softcap, window = code(cache), softcap or 0.0, window or 0
    fixed = pointer(cos), pointer(sin), positions.data_ptr(), starts.data_ptr(), cache.data_ptr(), S

    def attend(heads: Tensor, slot: int, owners: object = (tables, positions, starts, cache)) -> Tensor:
        if not has_address(heads):
            raise TypeError(f"attention: expected a plain tensor of heads, got {type(heads).__name__}")
        Q = heads.numel() // (n * D) - both
        out = heads.new_empty(n, Q * D)
        kernel(
            dtype, heads.data_ptr(), n, Q, both // 2, D, *fixed, slot, window, scaling, softcap, out.data_ptr(),
            threads,
        )  # fmt: skip
        return out

    return attend
