"""token_kl: log-probability, entropy and the exact KL to a reference from two tensors of logits, in one pass over both.

Leaves out the matmuls that make the logits (`linear_token_kl`) and KL estimates from the sampled token alone
(`kl_penalty`).
"""

import torch
from torch import Tensor

from rlhf_fast.ops import private, reference
from rlhf_fast.ops.checks import check_flag, check_like, expect
from rlhf_fast.ops.dispatch import (
    LIBRARY,
    _cpu,
    call,
    code,
    define,
    has_kernel,
    kernel,
    pointer,
    statistics_dtype,
    threads,
)
from rlhf_fast.ops.gradients import Context, no_second_derivative, register_autograd
from rlhf_fast.ops.logprobs import check_ids, check_logits, check_overwritable, id_error
from rlhf_fast.ops.results import TokenKL
from rlhf_fast.ops.row_blocks import gradient_kernels, over_rows, rows_contiguous

define(
    "token_kl(Tensor logits, Tensor ref_logits, Tensor token_ids, float temperature, float softcap, "
    "bool inplace_backward) -> (Tensor logprobs, Tensor entropy, Tensor kl, Tensor ref_logprobs, Tensor stats)"
)
_BACKWARD = (
    "Tensor ref_logits, Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor stats, Tensor? grad_logprobs, "
    "Tensor? grad_entropy, Tensor? grad_kl, float temperature, float softcap"
)
define(f"token_kl_backward(Tensor logits, {_BACKWARD}) -> Tensor")
define(f"token_kl_backward_(Tensor(a!) logits, {_BACKWARD}) -> ()")


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> TokenKL:
    """`token_logprobs`, and the exact KL(policy || reference) per token over the whole vocabulary.

        p = softmax(z), q = softmax(z_ref)     (z as in `token_logprobs`, of both at one temperature and softcap)
        kl = sum_j p_j (log p_j - log q_j)     d kl / d z_j = p_j (log p_j - log q_j - kl)

    computed as log(1 + E_p[u] + E_p[e^u - 1 - u]) - E_p[u] with u = z_ref - z - a constant, which loses nothing where p
    and q are close: equal logits give exactly 0, and it is never negative. -inf logits: a token that p cannot give
    contributes 0 whatever q_j is, one that p can give and q cannot makes kl infinite (and its gradient NaN).

    logprobs, entropy and kl are differentiable by the logits. The reference is a constant: no gradient reaches
    ref_logits, and ref_logprobs is detached.

    Plain PyTorch: ``lp, lq = (log_softmax(x.float() / temperature, -1) for x in (logits, ref_logits))``, then
    ``(lp.exp() * (lp - lq)).sum(-1)`` beside the gather and the entropy. That holds five or more [..., V] float32
    tensors; this reads both rows from memory once (for their maxima, then, cached, for the sums), keeps 24 bytes per
    row, and reads them once more for the gradient.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, strides as in `token_logprobs`.
        ref_logits: the same shape and dtype; strides of its own.
        token_ids: [...], int64 or int32; -100 marks a masked place: all outputs and the gradient are exactly 0 there,
            whatever the logits of either hold.
        temperature, softcap: as in `token_logprobs`, on both.
        inplace_backward: as in `token_logprobs`: the gradient overwrites `logits`, never ref_logits.

    Returns:
        TokenKL(logprobs, entropy, kl, ref_logprobs), [...], float32 (float64 for float64 logits). ref_logprobs is the
        token's log-probability under the reference.

    Raises:
        ValueError: as `token_logprobs`; ref_logits of another shape, dtype or device than logits.
    """
    check_logits(logits, token_ids, temperature, softcap)
    check_like("ref_logits", ref_logits, "logits", logits)
    expect(ref_logits.dtype == logits.dtype, "ref_logits", f"dtype {logits.dtype} as logits", ref_logits.dtype)
    if token_ids.dtype != torch.int64:
        token_ids = token_ids.long()
    check_flag("inplace_backward", inplace_backward)
    if inplace_backward and not torch.compiler.is_compiling():
        check_overwritable(logits)
    if not has_kernel("token_kl", logits):
        check_ids(token_ids, logits.shape[-1])
        return reference.token_kl(logits, ref_logits, token_ids, temperature=temperature, softcap=softcap)
    inplace_backward = inplace_backward and not (torch.compiler.is_compiling() or private.in_transform())
    *results, _ = call("token_kl", logits, ref_logits, token_ids, temperature, softcap or 0.0, inplace_backward)
    return TokenKL(*results)


@kernel("token_kl", "cpu")
def _forward_cpu(
    logits: Tensor, ref_logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, ...]:
    ids = token_ids.contiguous()
    outputs = token_kl_outputs(logits, ref_logits, ids, temperature, softcap, inplace_backward)
    both = rows_contiguous(logits), rows_contiguous(ref_logits)
    for row, (z, z_ref), (z_ids, *results) in over_rows(both, (ids, *outputs)):
        n, vocabulary = z.shape
        bad = _cpu.token_kl(
            z.data_ptr(), code(z), z.stride(0), z_ref.data_ptr(), z_ref.stride(0), z_ids.data_ptr(), n, vocabulary,
            1.0 / temperature, softcap, *map(pointer, results), threads(z),
        )  # fmt: skip
        if bad >= 0:
            raise id_error(ids, row + bad, vocabulary)
    return outputs


@torch.library.register_fake("rlhf_fast::token_kl", lib=LIBRARY)
def token_kl_outputs(
    logits: Tensor, ref_logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, ...]:
    """The empty results that a kernel fills."""
    dtype, shape = statistics_dtype(logits), token_ids.shape
    results = (logits.new_empty(shape, dtype=dtype) for _ in range(4))
    return *results, logits.new_empty((*shape, 4), dtype=dtype)


@gradient_kernels("token_kl_backward", "cpu", references=1)
def gradient_cpu(
    grad: Tensor, z: Tensor, z_ref: Tensor, temperature: float, softcap: float, ids: Tensor, *per_row: Tensor | None
) -> None:
    """grad: in the dtype of the logits, or bfloat16 by float32 logits, over which it may lie, row by row.

    per_row: logprobs, entropy, stats, the gradients by the first three.
    """
    _cpu.token_kl_backward(
        z.data_ptr(), code(z), z.stride(0), z_ref.data_ptr(), z_ref.stride(0), ids.data_ptr(), *z.shape,
        1.0 / temperature, softcap, *map(pointer, per_row), grad.data_ptr(), code(grad), grad.stride(0),
        threads(z),
    )  # fmt: skip


@torch.library.register_fake("rlhf_fast::token_kl_backward", lib=LIBRARY)
def _backward_fake(logits: Tensor, *args: Tensor | float | None) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("rlhf_fast::token_kl_backward_", lib=LIBRARY)
def _backward_fake_(logits: Tensor, *args: Tensor | float | None) -> None:
    return None


def _setup_context(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, token_ids, ctx.temperature, ctx.softcap, ctx.inplace = inputs
    logprobs, entropy, _, ref_logprobs, stats = output
    ctx.save_for_backward(logits, ref_logits, token_ids, logprobs, entropy, stats)
    ctx.mark_non_differentiable(ref_logprobs, stats)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Context,
    needed: tuple[bool, ...],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    *_: None,
) -> tuple[Tensor]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    args = (grad_logprobs, grad_entropy, grad_kl, ctx.temperature, ctx.softcap)
    if not ctx.inplace:
        return (torch.ops.rlhf_fast.token_kl_backward(*saved, *args),)
    logits = saved[0].detach()
    torch.ops.rlhf_fast.token_kl_backward_(logits, *saved[1:], *args)
    return (logits,)


register_autograd("token_kl", _setup_context, _backward, differentiable=("logits",))
no_second_derivative("token_kl_backward")
