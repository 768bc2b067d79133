"""The last linear layer fused with what follows it: log-probs, and losses whose gradient is taken in the forward pass.

`linear_token_logprobs` with any loss behind it takes four products with the weight, 8 N H V flops, because the backward
pass computes the logits again. The losses (`linear_ppo_loss`, ..., and `linear_loss` for one of your own) take three,
6 N H V flops: they compute a chunk's gradient while its logits are there. Neither ever holds [N, V]. Leaves out the
chunking: `rlhf_fast.ops.heads`.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    INTEGERS,
    check_device,
    check_dtype,
    check_integer,
    check_positive,
    check_temperature,
    check_whole,
    expect,
)
from rlhf_fast.ops.dispatch import LIBRARY, define, has_kernel, kernel
from rlhf_fast.ops.gradients import (
    Context,
    mark_constants,
    no_second_derivative,
    refuse_graph,
    refuse_second,
    register_autograd,
)
from rlhf_fast.ops.heads import MEMORY_BUDGET, Head, full_precision, kept_dtype
from rlhf_fast.ops.logprobs import check_ids
from rlhf_fast.ops.reference import compute_dtype
from rlhf_fast.ops.results import TokenLogprobs

define(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, float temperature, "
    "float softcap, int memory_budget, bool with_slope) "
    "-> (Tensor logprobs, Tensor entropy, Tensor slope)"
)
define(
    "linear_token_logprobs_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float softcap, int memory_budget, "
    "bool with_hidden, bool with_weight, bool with_bias) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of logits = hidden weight^T + bias, without the [..., V] logits; both outputs differentiable.

    Plain PyTorch: ``token_logprobs(hidden @ weight.t() + bias, token_ids)``, which holds the logits and, in the
    backward pass, their gradient. This computes them twice instead, a chunk at a time. With a frozen weight and bias
    (LoRA) it keeps d logprobs / d hidden, as large as `hidden`, and computes them once; a gradient into `entropy` then
    costs the second time. Where a `linear_*_loss` function has the loss, or `linear_loss` can take it, that is faster.

    Args:
        hidden: [..., H]; weight: [V, H], may be the tied embedding; bias: [V]. float32, bfloat16, float16 or float64.
            Logits are float32 (float64 if an input is) whatever the inputs, and so are the sums of the gradients.
        token_ids: [...], int64 or int32; -100 marks a masked place, which reaches no matmul: both outputs and the
            gradient are exactly 0 there.
        temperature, softcap: as in `token_logprobs`.
        memory_budget: bytes of working memory beyond inputs and gradients, in which the chunks have to fit; by default
            128 MiB on CPU, 2 GiB on CUDA. At least 32 rows of logits are held.

    Returns:
        TokenLogprobs(logprobs, entropy), [...], float32 (float64 if an input is).

    Raises:
        ValueError: wrong shapes, dtypes or devices; temperature, softcap or memory_budget <= 0; a token id outside
            [0, V) other than -100 (on CPU).
    """
    budget = check_head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    if not has_kernel("linear_token_logprobs", hidden):
        return reference.linear_token_logprobs(
            hidden, weight, token_ids, bias=bias, temperature=temperature, softcap=softcap
        )
    frozen = not any(wants_gradients(weight, bias))
    logprobs, entropy, _ = torch.ops.rlhf_fast.linear_token_logprobs(
        hidden, weight, bias, token_ids.long(), temperature, softcap or 0.0, budget,
        frozen and wants_gradients(hidden)[0],
    )  # fmt: skip
    return TokenLogprobs(logprobs, entropy)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float | None,
    memory_budget: int | None,
) -> int:
    """Check the arguments that all fused heads share; returns the memory budget in bytes."""
    check_layer(hidden, weight, bias)
    check_dtype("token_ids", token_ids, INTEGERS)
    expected = f"shape {list(hidden.shape[:-1])} as the rows of hidden {list(hidden.shape)}"
    expect(token_ids.shape == hidden.shape[:-1], "token_ids", expected, list(token_ids.shape))
    check_device("token_ids", token_ids, "hidden", hidden)
    check_temperature(temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    if memory_budget is not None:
        check_integer("memory_budget", memory_budget, 1, "a finite number > 0 of whole bytes")
    check_ids(token_ids, weight.shape[0])
    return memory_budget or MEMORY_BUDGET.get(hidden.device.type, MEMORY_BUDGET["cpu"])


def check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Check one layer and its input. prefix: of the arguments' names in errors, such as "ref_" for a reference."""
    named = {f"{prefix}hidden": hidden, f"{prefix}weight": weight}
    if bias is not None:
        named[f"{prefix}bias"] = bias
    for name, x in named.items():
        check_dtype(name, x)
        check_whole(name, x)
        check_device(name, x, f"{prefix}hidden", hidden)
    shape = list(weight.shape)
    expect(weight.dim() == 2 and shape[0] > 0, f"{prefix}weight", "shape [V, H] with V > 0", shape)
    V, H = shape
    fits = hidden.dim() > 0 and hidden.shape[-1] == H
    expect(fits, f"{prefix}hidden", f"shape [..., {H}] as {prefix}weight {shape}", list(hidden.shape))
    if bias is not None:
        expect(list(bias.shape) == [V], f"{prefix}bias", f"shape [{V}] as {prefix}weight {shape}", list(bias.shape))


def wants_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Whether autograd will ask for the gradient by each tensor; False for None."""
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


@kernel("linear_token_logprobs", "cpu", "triton", "cuda")
@full_precision
def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float,
    memory_budget: int,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    logprobs, entropy, slope = (
        x.zero_()
        for x in _logprobs_fake(hidden, weight, bias, token_ids, temperature, softcap, memory_budget, with_slope)
    )
    for chunk in head.chunks():
        logprobs.view(-1)[chunk.rows], entropy.view(-1)[chunk.rows] = chunk.logprobs, chunk.entropy
        if with_slope:
            slope.view(-1, hidden.shape[-1])[chunk.rows] = head.slope(chunk)
    return logprobs, entropy, slope


@torch.library.register_fake("rlhf_fast::linear_token_logprobs", lib=LIBRARY)
def _logprobs_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    softcap: float,
    memory_budget: int,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden, weight, bias)
    logprobs, entropy = (hidden.new_empty(token_ids.shape, dtype=dtype) for _ in range(2))
    return logprobs, entropy, hidden.new_empty(hidden.shape if with_slope else 0)


@kernel("linear_token_logprobs_backward", "cpu", "triton", "cuda")
@full_precision
def _logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    memory_budget: int,
    with_hidden: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, ...]:
    wanted = with_hidden, with_weight, with_bias
    head = Head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget, wanted)
    flat = [None if g is None else g.reshape(-1) for g in (grad_logprobs, grad_entropy)]
    for chunk in head.chunks():
        head.backward(chunk, *(None if g is None else g[chunk.rows] for g in flat))
    return tuple(head.gradients())


@torch.library.register_fake("rlhf_fast::linear_token_logprobs_backward", lib=LIBRARY)
def _backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, args[-3:])


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...], scaled_later: bool = False
) -> tuple[Tensor, ...]:
    """What `Head.gradients` returns, for a fake kernel."""
    return tuple(
        hidden.new_empty(0)
        if x is None or not want
        else x.new_empty(x.shape, dtype=kept_dtype(x.dtype) if scaled_later else x.dtype)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _setup_context(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, token_ids, *ctx.options, ctx.with_slope = inputs
    ctx.save_for_backward(hidden, weight, bias, token_ids, output[2])
    mark_constants(ctx, output, [2], first=2)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Context,
    needed: tuple[bool, ...],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_slope: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, slope = ctx.saved_tensors
    refuse_second("linear_token_logprobs", (grad_slope,))
    if ctx.with_slope and grad_entropy is None:
        refuse_graph("linear_token_logprobs", ctx.nested)
        return (None if grad_logprobs is None else (grad_logprobs.unsqueeze(-1) * slope).to(slope.dtype)), None, None
    grads = torch.ops.rlhf_fast.linear_token_logprobs_backward(
        *inputs, grad_logprobs, grad_entropy, *ctx.options, *needed
    )
    return tuple(g if want else None for g, want in zip(grads, needed, strict=True))


register_autograd("linear_token_logprobs", _setup_context, _backward, differentiable=("hidden", "weight", "bias"))
no_second_derivative("linear_token_logprobs_backward")
