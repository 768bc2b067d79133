"""Causal attention within rows of any length that stand side by side without padding. `rlhf_fast.lm.packing` uses it.

On a GPU the rows are spread out and torch's own kernel runs, as in the reference. Leaves out dropout, sliding windows,
soft caps, and rotary embeddings that turn a part of the head only, or neighbouring elements together.
"""

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import FLOATS, check_device, check_dims, expect
from rlhf_fast.ops.dispatch import (
    LIBRARY,
    _cpu,
    call,
    code,
    contiguous,
    define,
    has_kernel,
    kernel,
    pointer,
    statistics_dtype,
)
from rlhf_fast.ops.gradients import Context, no_second_derivative, register_autograd

define(
    "packed_attention(Tensor query, Tensor key, Tensor value, Tensor slots, Tensor? cosines, Tensor? sines, "
    "int length, float scale) -> (Tensor out, Tensor log_sums)"
)
define(
    "packed_attention_backward(Tensor query, Tensor key, Tensor value, Tensor slots, Tensor? cosines, Tensor? sines, "
    "Tensor out, Tensor log_sums, Tensor grad_out, int length, float scale) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    rows: int,
    length: int,
    *,
    scale: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale query key^T) value of each token over those of its row up to itself.

    Plain PyTorch: the tokens spread over [rows, length], `scaled_dot_product_attention(..., is_causal=True)`, the
    tokens taken out again. This copies nothing, computes nothing for padding or for what lies ahead, and keeps for the
    backward pass no more than what goes in and comes out.

    Args:
        query: [h, N, d], float32, bfloat16, float16 or float64; key: [k, N, d] of that dtype, h a multiple of k; value:
            as key, or with another last dimension, which runs the reference; gradients flow to all three.
        slots: [N] int64, row * length + place in the row of every token: ascending, every row from its place 0 on and
            without gaps. Not checked, because a check would read the tensor.
        scale: by default d ** -0.5.
        rotary: cosines and sines [N, d] of the tokens' angles, float32, by which query and key are turned first
            (elements i and i + d / 2 together; arXiv 2104.09864 as in Llama); no gradients flow to them.

    Returns:
        [N, h, d of value] contiguous, the dtype of query.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_dims("query", query, "hNd")
    expect(query.dtype in FLOATS, "query", "dtype float32, bfloat16, float16 or float64", query.dtype)
    (h, N, d), k = query.shape, key.shape[0]
    for name, x in (("key", key), ("value", value)):
        fits = x.dim() == 3 and k > 0 and h % k == 0 and x.shape[:2] == (k, N) and (x is value or x.shape[2] == d)
        expect(fits, name, f"shape [a divisor of {h}, {N}, {d}] as query {list(query.shape)}", list(x.shape))
        expect(x.dtype == query.dtype, name, f"dtype {query.dtype} as query", x.dtype)
        check_device(name, x, "query", query)
    is_index = slots.shape == (N,) and slots.dtype == torch.int64
    expect(is_index, "slots", f"int64 of shape [{N}]", f"{slots.dtype} of shape {list(slots.shape)}")
    check_device("slots", slots, "query", query)
    expect(rows * length >= N, "length", f"room for {N} tokens in {rows} rows", length)
    for table in rotary or ():
        fits = table.shape == (N, d) and table.dtype == torch.float32 and d % 2 == 0
        expect(fits, "rotary", f"float32 of shape [{N}, {d}], an even d", f"{table.dtype} of {list(table.shape)}")
        check_device("rotary", table, "query", query)
    factor: float = d**-0.5 if scale is None else scale
    if not has_kernel("packed_attention", query) or value.shape[2] != d:
        return reference.packed_attention(query, key, value, slots, rows, length, scale=factor, rotary=rotary)
    return call("packed_attention", query, key, value, slots, *(rotary or (None, None)), length, factor)[0]


def _read(*tensors: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors with a contiguous last dimension, and their strides by head and token as the kernel takes them."""
    read = [x if x.stride(2) == 1 else x.contiguous() for x in tensors]
    return read, tuple(stride for x in read for stride in x.stride()[:2])


def _sizes(query: Tensor, key: Tensor, length: int) -> tuple[int, ...]:
    return query.shape[1], length, query.shape[0], key.shape[0], query.shape[2]


@kernel("packed_attention", "cpu")
def _attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    length: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, log_sums = _attention_fake(query)
    (query, key, value), strides = _read(query, key, value)
    slots, cosines, sines = contiguous(slots, cosines, sines)
    _cpu.packed_attention(
        code(query), query.data_ptr(), key.data_ptr(), value.data_ptr(), strides, pointer(cosines), pointer(sines),
        slots.data_ptr(),
        *_sizes(query, key, length), scale, out.data_ptr(), log_sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, log_sums


@torch.library.register_fake("rlhf_fast::packed_attention", lib=LIBRARY)
def _attention_fake(query: Tensor, *args: Tensor | float | None) -> tuple[Tensor, Tensor]:
    h, N, d = query.shape
    return query.new_empty(N, h, d), query.new_empty(h, N, dtype=statistics_dtype(query))


@kernel("packed_attention_backward", "cpu")
def _backward_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    grad_out: Tensor,
    length: int,
    scale: float,
) -> tuple[Tensor, ...]:
    grads = _backward_fake(query, key, value)
    (query, key, value), strides = _read(query, key, value)
    slots, cosines, sines, out, log_sums, grad_out = contiguous(slots, cosines, sines, out, log_sums, grad_out)
    _cpu.packed_attention_backward(
        code(query), query.data_ptr(), key.data_ptr(), value.data_ptr(), strides, pointer(cosines), pointer(sines),
        slots.data_ptr(),
        *_sizes(query, key, length), scale, out.data_ptr(), log_sums.data_ptr(), grad_out.data_ptr(),
        *(x.data_ptr() for x in grads), torch.get_num_threads(),
    )  # fmt: skip
    return grads


@torch.library.register_fake("rlhf_fast::packed_attention_backward", lib=LIBRARY)
def _backward_fake(query: Tensor, key: Tensor, value: Tensor, *args: object) -> tuple[Tensor, ...]:
    """The kernel writes [N, heads, d], as the projections that these gradients go back to want them."""
    return tuple(x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in (query, key, value))


def _setup_context(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, length, scale = inputs
    ctx.options = length, scale
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Context, needed: tuple[bool, ...], grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    return torch.ops.rlhf_fast.packed_attention_backward(*ctx.saved_tensors, grad_out, *ctx.options)


register_autograd("packed_attention", _setup_context, _backward, differentiable=("query", "key", "value"))
no_second_derivative("packed_attention_backward")
