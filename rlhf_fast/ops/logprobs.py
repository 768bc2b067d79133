"""token_logprobs: log-probability and entropy of given tokens from logits, in one pass over each row.

Leaves out the matmul that makes the logits: that is the `linear_*` family's.
"""

import torch
from torch import Tensor

from rlhf_fast.ops import private, reference
from rlhf_fast.ops.checks import (
    INTEGERS,
    check_device,
    check_dtype,
    check_flag,
    check_positive,
    check_temperature,
    expect,
    is_readable,
)
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
from rlhf_fast.ops.reference import IGNORED_ID
from rlhf_fast.ops.results import TokenLogprobs
from rlhf_fast.ops.row_blocks import gradient_kernels, over_rows, rows_contiguous

define(
    "token_logprobs(Tensor logits, Tensor token_ids, float temperature, float softcap, bool inplace_backward) "
    "-> (Tensor logprobs, Tensor entropy, Tensor stats)"
)
define(
    "token_logprobs_backward(Tensor logits, Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor stats, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float softcap) -> Tensor"
)
define(
    "token_logprobs_backward_(Tensor(a!) logits, Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor stats, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float softcap) -> ()"
)


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """Log-probability of each token and entropy of its distribution; both differentiable.

        z = logits / temperature            (with softcap c: z = c tanh(logits / c) / temperature)
        logprobs = z_token - log sum_j exp z_j           entropy = -sum_j p_j log p_j,  p = softmax(z)

    computed with the row's maximum taken out and without the target in the sum,
    logprobs = -softplus(log sum_{j != token} exp z_j - z_token): -inf logits (padded vocabulary, masks on tokens)
    give finite results and gradients, and a token ahead by 25 nats still has a non-zero log-probability and gradient.

    Plain PyTorch: ``lp = log_softmax(logits.float() / temperature, -1)``, then ``lp.gather(-1, ids)`` and
    ``-(lp.exp() * lp).sum(-1)``. That holds three or more [..., V] float32 tensors; this reads the logits once and
    keeps 16 bytes per row.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. Rows are read in place whatever their strides as
            long as the last dimension is contiguous (so ``logits[:, :-1]`` costs nothing); otherwise they are copied.
        token_ids: [...], int64 or int32; -100 marks a masked place: both outputs and the gradient are exactly 0
            there, whatever its logits hold.
        softcap: the logits' soft cap of Gemma 2 (arXiv 2408.00118, section 2.2).
        inplace_backward: the backward pass overwrites the logits with their gradient, so that no second [..., V]
            tensor exists. The logits must not be needed by anything else afterwards: another consumer whose
            backward pass still needs them raises autograd's "modified by an inplace operation" error. Under
            `torch.compile`, and where there is no kernel, the gradient is a new tensor.

    Returns:
        TokenLogprobs(logprobs, entropy), [...], float32 (float64 for float64 logits), autocast or not.

    Raises:
        ValueError: wrong shapes, dtypes or devices; temperature or softcap <= 0; inplace_backward on logits whose
            last dimension is not contiguous, whose rows overlap, or that are a leaf (a parameter's own numbers); a
            token id outside [0, V) other than -100 (on CPU; CUDA tensors are not checked, that would wait for the
            device).
    """
    check_logits(logits, token_ids, temperature, softcap)
    if token_ids.dtype != torch.int64:
        token_ids = token_ids.long()
    check_flag("inplace_backward", inplace_backward)
    if inplace_backward and not torch.compiler.is_compiling():
        check_overwritable(logits)
    if not has_kernel("token_logprobs", logits):
        check_ids(token_ids, logits.shape[-1])
        return reference.token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap)
    inplace_backward = inplace_backward and not (torch.compiler.is_compiling() or private.in_transform())
    logprobs, entropy, _ = call("token_logprobs", logits, token_ids, temperature, softcap or 0.0, inplace_backward)
    return TokenLogprobs(logprobs, entropy)


def check_logits(logits: Tensor, token_ids: Tensor, temperature: float, softcap: float | None) -> None:
    """Logits [..., V] and token ids [...] that fit each other, and a temperature and a soft cap > 0."""
    check_dtype("logits", logits)
    check_dtype("token_ids", token_ids, INTEGERS)
    expect(logits.dim() > 0 and logits.shape[-1] > 0, "logits", "shape [..., V] with V > 0", list(logits.shape))
    if logits.shape[:-1] != token_ids.shape:
        expected = f"shape {list(logits.shape[:-1])} as the rows of logits {list(logits.shape)}"
        raise ValueError(f"token_ids: expected {expected}, got {list(token_ids.shape)}")
    check_device("token_ids", token_ids, "logits", logits)
    check_temperature(temperature)
    if softcap is not None:
        check_positive("softcap", softcap)


def check_overwritable(logits: Tensor) -> None:
    """Logits that a gradient can replace: contiguous rows that share no memory, of a tensor that is no leaf."""
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward: expected logits that a model has computed, got a leaf, whose own numbers the gradient "
            "would replace"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"inplace_backward: expected logits with a contiguous last dimension, got strides {logits.stride()}"
        )
    reach = 0  # of the dimensions looked at so far; those with the smallest strides come first
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"inplace_backward: expected rows that do not overlap, got strides {logits.stride()}")
        reach += stride * (size - 1)


def check_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Token ids in [0, vocabulary) or -100. Ids on a GPU are not read, because reading them waits for the device."""
    if not is_readable(token_ids):
        return
    bad = (token_ids != IGNORED_ID) & ((token_ids < 0) | (token_ids >= vocabulary))
    if bad.any():
        raise id_error(token_ids, int(bad.flatten().int().argmax()), vocabulary)


def id_error(token_ids: Tensor, row: int, vocabulary: int) -> ValueError:
    """The error about the token id of this row, a place in the flattened ids."""
    got = int(token_ids.flatten()[row])
    return ValueError(f"token_ids: expected ids in [0, {vocabulary}) or {IGNORED_ID}, got {got} at row {row}")


@kernel("token_logprobs", "cpu")
def _forward_cpu(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits, ids = rows_contiguous(logits), token_ids.contiguous()
    outputs = token_logprobs_outputs(logits, ids, temperature, softcap, inplace_backward)
    for row, (z,), (z_ids, *results) in over_rows((logits,), (ids, *outputs)):
        n, vocabulary = z.shape
        bad = _cpu.token_logprobs(
            z.data_ptr(), code(z), z.stride(0), z_ids.data_ptr(), n, vocabulary, 1.0 / temperature, softcap,
            *map(pointer, results), threads(z),
        )  # fmt: skip
        if bad >= 0:
            raise id_error(ids, row + bad, vocabulary)
    return outputs


@torch.library.register_fake("rlhf_fast::token_logprobs", lib=LIBRARY)
def token_logprobs_outputs(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The empty results [...], and the two numbers per row that the backward pass reads."""
    dtype = statistics_dtype(logits)
    shape = token_ids.shape
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty((*shape, 2), dtype=dtype),
    )


@gradient_kernels("token_logprobs_backward", "cpu")
def gradient_cpu(
    grad: Tensor, z: Tensor, temperature: float, softcap: float, ids: Tensor, *per_row: Tensor | None
) -> None:
    """grad: in the dtype of the logits, or bfloat16 by float32 logits, over which it may lie, row by row.

    per_row: logprobs, entropy, stats, the gradients by the first two.
    """
    _cpu.token_logprobs_backward(
        z.data_ptr(), code(z), z.stride(0), ids.data_ptr(), *z.shape, 1.0 / temperature, softcap,
        *map(pointer, per_row), grad.data_ptr(), code(grad), grad.stride(0),
        threads(z),
    )  # fmt: skip


@torch.library.register_fake("rlhf_fast::token_logprobs_backward", lib=LIBRARY)
def _backward_fake(logits: Tensor, *args: Tensor | float | None) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("rlhf_fast::token_logprobs_backward_", lib=LIBRARY)
def _backward_fake_(logits: Tensor, *args: Tensor | float | None) -> None:
    return None


def _setup_context(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, token_ids, ctx.temperature, ctx.softcap, ctx.inplace = inputs
    ctx.save_for_backward(logits, token_ids, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Context,
    needed: tuple[bool, ...],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    _: None,
) -> tuple[Tensor]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    args = (grad_logprobs, grad_entropy, ctx.temperature, ctx.softcap)
    if not ctx.inplace:
        return (torch.ops.rlhf_fast.token_logprobs_backward(*saved, *args),)
    logits = saved[0].detach()
    torch.ops.rlhf_fast.token_logprobs_backward_(logits, *saved[1:], *args)
    return (logits,)


register_autograd("token_logprobs", _setup_context, _backward, differentiable=("logits",))
no_second_derivative("token_logprobs_backward")
