"""linear_token_kl: the last linear layers of a policy and of its reference fused with `token_kl`, chunk by chunk.

Leaves out the chunking itself: `rlhf_fast.ops.heads`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import check_device, expect
from rlhf_fast.ops.dispatch import LIBRARY, contiguous, define, has_kernel, kernel
from rlhf_fast.ops.gradients import Context, no_second_derivative, register_autograd
from rlhf_fast.ops.head_layers import Layer, layer_of
from rlhf_fast.ops.heads import Head, full_precision
from rlhf_fast.ops.linear import check_head, check_layer, empty_gradients
from rlhf_fast.ops.reference import compute_dtype
from rlhf_fast.ops.results import TokenKL
from rlhf_fast.ops.token_kl import gradient_cpu

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
    "Tensor token_ids"
)
define(
    f"linear_token_kl({_INPUTS}, float temperature, float softcap, int memory_budget) "
    "-> (Tensor logprobs, Tensor entropy, Tensor kl, Tensor ref_logprobs)"
)
define(
    f"linear_token_kl_backward({_INPUTS}, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_kl, "
    "float temperature, float softcap, int memory_budget, bool with_hidden, bool with_weight, bool with_bias) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> TokenKL:
    """`token_kl` of logits = hidden weight^T + bias and of the reference's, without either's [..., V] logits.

    logprobs, entropy and kl are differentiable by hidden, weight and bias. The reference is a constant: no gradient
    reaches ref_hidden, ref_weight or ref_bias, and ref_logprobs is detached.

    Plain PyTorch: ``token_kl(hidden @ weight.t() + bias, ref_hidden @ ref_weight.t() + ref_bias, token_ids)``, which
    holds both tensors of logits and, in the backward pass, the gradient of one. This computes them twice instead, a
    chunk at a time, into two buffers.

    Args:
        hidden, weight, bias, memory_budget: as in `linear_token_logprobs`; the budget is for both buffers.
        ref_hidden: [..., Hr], of the same tokens; ref_weight: [V, Hr]; ref_bias: [V]. Widths and dtypes of their own.
        token_ids: [...], int64 or int32; -100 marks a masked place, which reaches no matmul: all outputs and the
            gradient are exactly 0 there.
        temperature, softcap: as in `token_kl`, on both.

    Returns:
        TokenKL(logprobs, entropy, kl, ref_logprobs), [...], float32 (float64 if an input is).

    Raises:
        ValueError: as `linear_token_logprobs`, of either layer; a ref_hidden with other leading dimensions than
            hidden, a ref_weight of another vocabulary than weight.
    """
    budget = check_head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    _check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    if not has_kernel("linear_token_kl", hidden):
        return reference.linear_token_kl(
            hidden, weight, ref_hidden, ref_weight, token_ids, bias=bias, ref_bias=ref_bias, temperature=temperature,
            softcap=softcap,
        )  # fmt: skip
    results = torch.ops.rlhf_fast.linear_token_kl(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, token_ids.long(), temperature, softcap or 0.0, budget
    )
    return TokenKL(*results)


def _check_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None
) -> None:
    check_layer(ref_hidden, ref_weight, ref_bias, "ref_")
    check_device("ref_hidden", ref_hidden, "hidden", hidden)
    rows, ref_rows = list(hidden.shape[:-1]), list(ref_hidden.shape[:-1])
    expected = f"shape {[*rows, ref_hidden.shape[-1]]}, a row for each row of hidden"
    expect(rows == ref_rows, "ref_hidden", expected, list(ref_hidden.shape))
    V, ref_V = weight.shape[0], ref_weight.shape[0]
    expect(ref_V == V, "ref_weight", f"shape [{V}, Hr], the vocabulary of weight", list(ref_weight.shape))


def _chunks(head: Head, layer: Layer, ref_hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(rows, hidden, ids, logits, ref_logits, the results of `token_kl`) of each chunk, which overwrites the last."""
    ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    for rows in head.rows.split(head.chunk_rows):
        hidden, ids, logits = head.gather(rows)
        ref_logits = layer.logits(ref_hidden.index_select(0, rows).to(layer.operands))
        out = torch.ops.rlhf_fast.token_kl(logits, ref_logits, ids, head.temperature, head.softcap, False)
        yield rows, hidden, ids, logits, ref_logits, *out


@kernel("linear_token_kl", "cpu", "triton", "cuda")
@full_precision
def _token_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_ids: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    layer = layer_of(ref_weight, ref_bias, ref_hidden.dtype, dtype)
    head = Head(hidden, weight, bias, token_ids, *options, beside=layer)
    results = tuple(hidden.new_zeros(token_ids.shape, dtype=head.dtype) for _ in range(4))
    for rows, _, _, _, _, *chunk, _ in _chunks(head, layer, ref_hidden):
        for x, of_chunk in zip(results, chunk, strict=True):
            x.view(-1)[rows] = of_chunk
    return results


@torch.library.register_fake("rlhf_fast::linear_token_kl", lib=LIBRARY)
def _token_kl_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_ids: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    return tuple(hidden.new_empty(token_ids.shape, dtype=dtype) for _ in range(4))


@kernel("linear_token_kl_backward", "cpu", "triton", "cuda")
@full_precision
def _token_kl_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_ids: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    temperature: float,
    softcap: float,
    memory_budget: int,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    layer = layer_of(ref_weight, ref_bias, ref_hidden.dtype, dtype)
    head = Head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget, wanted, beside=layer)
    flat = [None if g is None else g.reshape(-1) for g in (grad_logprobs, grad_entropy, grad_kl)]
    for rows, chunk_hidden, ids, logits, ref_logits, logprobs, entropy, _, _, stats in _chunks(head, layer, ref_hidden):
        upstream = (None if g is None else g[rows] for g in flat)
        per_row = contiguous(ids, logprobs, entropy, stats, *upstream)
        rounded = head.layer.over_logits(len(rows))
        if rounded is None:
            torch.ops.rlhf_fast.token_kl_backward_(logits, ref_logits, *per_row, temperature, softcap)
        else:
            gradient_cpu(rounded, logits, ref_logits, temperature, softcap, *per_row)
        head.add_gradients(rows, chunk_hidden, logits if rounded is None else rounded)
    return tuple(head.gradients())


@torch.library.register_fake("rlhf_fast::linear_token_kl_backward", lib=LIBRARY)
def _backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, args[-3:])


def _setup_context(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Context,
    needed: tuple[bool, ...],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    _: None,
) -> tuple[Tensor | None, ...]:
    grads = torch.ops.rlhf_fast.linear_token_kl_backward(
        *ctx.saved_tensors, grad_logprobs, grad_entropy, grad_kl, *ctx.options, *needed
    )
    return tuple(g if want else None for g, want in zip(grads, needed, strict=True))


register_autograd("linear_token_kl", _setup_context, _backward, differentiable=("hidden", "weight", "bias"))
no_second_derivative("linear_token_kl_backward")
