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
from rlhf_fast.ops.logprobs import _forward_fake, check_ids, row_blocks, rows_contiguous
from rlhf_fast.ops.sampling import _sample_fake, check_rows
from rlhf_fast.ops.token_kl import _forward_fake as _kl_forward_fake


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
    logprobs, entropy, stats = outputs = _forward_fake(logits, ids, temperature, softcap, inplace_backward)
    flat = ids.view(-1), logprobs.view(-1), entropy.view(-1), stats.view(-1, 2)
    row = 0
    for (z,) in row_blocks(logits):
        n, V = z.shape
        if n == 0:
            continue
        here = tuple(x[row : row + n] for x in flat)
        splits = rows.splits_for(n, V, _processors(z.device))
        partial = tickets = None
        if splits > 1:
            partial = stats.new_empty(n * splits * 3)
            tickets = torch.zeros(n, dtype=torch.int32, device=z.device)
        rows.token_logprobs(
            z, z.stride(0), here[0], n, V, temperature, softcap, *here[1:], partial, tickets, splits, _compute(z)
        )
        row += n
    return outputs


def _backward_into(
    grad: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    """Write the gradient into the contiguous tensor `grad`, or over the logits where it is None."""
    V, row = logits.shape[-1], 0
    flat = [
        None if x is None else x.contiguous().view(-1)
        for x in (token_ids, logprobs, entropy, grad_logprobs, grad_entropy)
    ]
    stats = stats.view(-1, 2)
    for (z,) in row_blocks(logits):
        n = z.shape[0]
        if n == 0:
            continue
        ids, logp, h, by_logp, by_h = (None if x is None else x[row : row + n] for x in flat)
        out = z if grad is None else grad.view(-1, V)[row : row + n]
        rows.token_logprobs_backward(
            z, z.stride(0), ids, n, V, temperature, softcap, logp, h, stats[row : row + n], by_logp, by_h, out,
            out.stride(0), _compute(z),
        )  # fmt: skip
        row += n


@kernel("token_logprobs_backward", "triton")
@on_device
def _token_logprobs_backward(logits: Tensor, *args: Tensor | float | None) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _backward_into(grad, rows_contiguous(logits), *args)
    return grad


@kernel("token_logprobs_backward_", "triton")
@on_device
def _token_logprobs_backward_(logits: Tensor, *args: Tensor | float | None) -> None:
    _backward_into(None, logits, *args)
    torch.autograd.graph.increment_version(logits)


@kernel("token_kl", "triton")
@on_device
def _token_kl(
    logits: Tensor, ref_logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, ...]:
    check_ids(token_ids, logits.shape[-1])
    ids = token_ids.contiguous()
    outputs = _kl_forward_fake(logits, ref_logits, ids, temperature, softcap, inplace_backward)
    flat = [x.view(-1) for x in (ids, *outputs[:4])]
    row = 0
    for z, z_ref in row_blocks(rows_contiguous(logits), rows_contiguous(ref_logits)):
        n, V = z.shape
        if n:
            ids_here, *here = (x[row : row + n] for x in (*flat, outputs[4].view(-1, 4)))
            pairs.token_kl(
                z, z.stride(0), z_ref, z_ref.stride(0), ids_here, n, V, temperature, softcap, *here, _compute(z)
            )
        row += n
    return outputs


def _kl_backward_into(
    grad: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    temperature: float,
    softcap: float,
) -> None:
    """Write the gradient into the contiguous tensor `grad`, or over the logits where it is None."""
    V, row = logits.shape[-1], 0
    flat = [
        None if x is None else x.contiguous().view(-1)
        for x in (token_ids, logprobs, entropy, grad_logprobs, grad_entropy, grad_kl)
    ]
    for z, z_ref in row_blocks(logits, rows_contiguous(ref_logits)):
        n = z.shape[0]
        if n:
            ids, logp, h, *upstream = (None if x is None else x[row : row + n] for x in flat)
            out = z if grad is None else grad.view(-1, V)[row : row + n]
            pairs.token_kl_backward(
                z, z.stride(0), z_ref, z_ref.stride(0), ids, n, V, temperature, softcap, logp, h,
                stats.view(-1, 4)[row : row + n], *upstream, out, out.stride(0), _compute(z),
            )  # fmt: skip
        row += n


@kernel("token_kl_backward", "triton")
@on_device
def _token_kl_backward(logits: Tensor, *args: Tensor | float | None) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _kl_backward_into(grad, rows_contiguous(logits), *args)
    return grad


@kernel("token_kl_backward_", "triton")
@on_device
def _token_kl_backward_(logits: Tensor, *args: Tensor | float | None) -> None:
    _kl_backward_into(None, logits, *args)
    torch.autograd.graph.increment_version(logits)


@kernel("sample_tokens", "triton")
@on_device
def _sample_tokens(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(logits)  # of the interpreter's CPU tensors
    logits = rows_contiguous(logits)
    uniforms, greedy = contiguous(uniforms, greedy_mask)
    outputs, (n, V) = _sample_fake(logits, uniforms, greedy, temperature), logits.shape
    if n:
        states = logits.new_empty((n, sampler.blocks_of(V), 3), dtype=statistics_dtype(logits))
        sampler.sample_tokens(
            logits, logits.stride(0), uniforms, greedy, n, V, temperature, states, *outputs,
            {} if torch.version.hip else sampler.REGISTERS, _compute(logits),
        )  # fmt: skip
    return outputs
