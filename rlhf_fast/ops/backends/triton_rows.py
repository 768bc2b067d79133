# pyright: reportCallIssue=false, reportMissingImports=false
# The tensors per row are passed as *per_row, whose number pyright does not know: it expects no argument after them.
# The folder kernels/ is installed as rlhf_fast.kernels, where pyright does not look.
"""The operators on rows of logits on Triton: `token_logprobs`, `token_kl` and `sample_tokens`.

See `rlhf_fast.ops.backends.triton`.
"""

import functools

import torch
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import sample_tokens as sampler
from rlhf_fast.kernels import token_kl as pairs
from rlhf_fast.kernels import token_logprobs as rows
from rlhf_fast.ops.dispatch import contiguous, kernel, on_device, statistics_dtype
from rlhf_fast.ops.logprobs import check_ids, token_logprobs_outputs
from rlhf_fast.ops.row_blocks import gradient_kernels, over_rows, rows_contiguous
from rlhf_fast.ops.sampling import check_rows, sample_outputs
from rlhf_fast.ops.token_kl import token_kl_outputs


def _compute(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@kernel("token_logprobs", "triton")
@on_device
def _token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_ids(token_ids, logits.shape[-1])  # of the interpreter's CPU tensors; on a GPU a bad id gives NaN
    logits, ids = rows_contiguous(logits), token_ids.contiguous()
    outputs = token_logprobs_outputs(logits, ids, temperature, softcap, inplace_backward)
    for _, (z,), here in over_rows((logits,), (ids, *outputs)):
        n, V = z.shape
        splits = rows.splits_for(n, V, _processors(z.device))
        partial = tickets = None
        if splits > 1:
            partial = outputs[2].new_empty(n * splits * 3)  # pyright: ignore[reportArgumentType]
            tickets = torch.zeros(n, dtype=torch.int32, device=z.device)
        rows.token_logprobs(
            z, z.stride(0), here[0], n, V, temperature, softcap, *here[1:], partial, tickets, splits, _compute(z)
        )
    return outputs


@gradient_kernels("token_logprobs_backward", "triton")
@on_device
def _token_logprobs_gradient(
    grad: Tensor, z: Tensor, temperature: float, softcap: float, ids: Tensor, *per_row: Tensor | None
) -> None:
    """per_row: logprobs, entropy, stats, the gradients by the first two."""
    rows.token_logprobs_backward(
        z, z.stride(0), ids, *z.shape, temperature, softcap, *per_row, grad, grad.stride(0), _compute(z)
    )


@kernel("token_kl", "triton")
@on_device
def _token_kl(
    logits: Tensor, ref_logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, ...]:
    check_ids(token_ids, logits.shape[-1])
    ids = token_ids.contiguous()
    outputs = token_kl_outputs(logits, ref_logits, ids, temperature, softcap, inplace_backward)
    both = rows_contiguous(logits), rows_contiguous(ref_logits)
    for _, (z, z_ref), (z_ids, *results) in over_rows(both, (ids, *outputs)):
        pairs.token_kl(
            z, z.stride(0), z_ref, z_ref.stride(0), z_ids, *z.shape, temperature, softcap, *results, _compute(z)
        )
    return outputs


@gradient_kernels("token_kl_backward", "triton", references=1)
@on_device
def _token_kl_gradient(
    grad: Tensor, z: Tensor, z_ref: Tensor, temperature: float, softcap: float, ids: Tensor, *per_row: Tensor | None
) -> None:
    """per_row: logprobs, entropy, stats, the gradients by the first three."""
    pairs.token_kl_backward(
        z, z.stride(0), z_ref, z_ref.stride(0), ids, *z.shape, temperature, softcap, *per_row, grad, grad.stride(0),
        _compute(z),
    )  # fmt: skip


@kernel("sample_tokens", "triton")
@on_device
def _sample_tokens(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(logits)  # of the interpreter's CPU tensors
    logits = rows_contiguous(logits)
    uniforms, greedy = contiguous(uniforms, greedy_mask)
    outputs, (n, V) = sample_outputs(logits, uniforms, greedy, temperature), logits.shape
    if n:
        blocks = sampler.blocks_of(V)  # of a tl.constexpr, an int outside of kernels
        states = logits.new_empty((n, blocks, 3), dtype=statistics_dtype(logits))  # pyright: ignore[reportArgumentType]
        sampler.sample_tokens(
            logits, logits.stride(0), uniforms, greedy, n, V, temperature, states, *outputs,
            {} if torch.version.hip else sampler.REGISTERS, _compute(logits),
        )  # fmt: skip
    return outputs
