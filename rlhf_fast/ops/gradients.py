"""The backward passes that compute nothing: operations that made their gradient in the forward pass only scale it."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from rlhf_fast.ops.dispatch import LIBRARY


def register_saved_gradients(op: str, inputs: dict[int, int]) -> None:
    """Autograd for an operator that returns its result and then, as further outputs, d result / d input.

    `inputs` maps the position of each differentiable input to that of the output holding its gradient; only the first
    output is differentiable. Constant in the backward pass: a second derivative is an error of autograd, not a number.
    """
    number = len(getattr(torch.ops.rlhf_fast, op).default._schema.arguments)

    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(output[i] for i in saved))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: FunctionCtx, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * number
        for position, grad in zip(inputs, ctx.saved_tensors, strict=True):
            if ctx.needs_input_grad[position]:
                grads[position] = grad * upstream
        return tuple(grads)

    saved = tuple(inputs.values())
    torch.library.register_autograd(f"rlhf_fast::{op}", backward, setup_context=setup_context, lib=LIBRARY)


def no_second_derivative(op: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""

    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{op}: second derivatives are not available; the reference back end has them")

    torch.library.register_autograd(f"rlhf_fast::{op}", backward, lib=LIBRARY)
