"""Autograd of the operators: how it is attached, and the backward pass of those that made their gradient already."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from rlhf_fast.ops.dispatch import LIBRARY


def register_autograd(name: str, setup_context: Callable, backward: Callable, differentiable: tuple[int, ...]) -> None:
    """`torch.library.register_autograd` without its fill-in of default arguments.

    That rebuilds the schema's argument list once per argument and call: 0.1 ms for the 16 arguments of `ppo_loss`, as
    long as its kernel runs. Our schemas have no defaults to fill in. `differentiable`: the positions of the inputs that
    can ask for a gradient; the others are constants.
    """
    op = getattr(torch.ops.rlhf_fast, name).default

    def call_kernel(keyset: torch._C.DispatchKeySet, args: tuple) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, *args_and_keyset: object) -> tuple[Tensor, ...]:
            *args, keyset = args_and_keyset
            output = call_kernel(keyset, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *grads), None

    def autograd(keyset: torch._C.DispatchKeySet, *args: object) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in differentiable):
            return Operator.apply(*args, keyset)
        return call_kernel(keyset, args)

    Operator.__name__ = Operator.__qualname__ = f"rlhf_fast_{name}"
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def register_saved_gradients(name: str, inputs: dict[int, int]) -> None:
    """Autograd for an operator that returns its result and then, as further outputs, d result / d input.

    `inputs` maps the position of each differentiable input to that of the output holding its gradient; only the first
    output is differentiable. The gradient is a constant: a second derivative is an error of autograd, not a number.
    """
    number = len(getattr(torch.ops.rlhf_fast, name).default._schema.arguments)
    saved = tuple(inputs.values())

    def setup_context(ctx: FunctionCtx, args: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(output[i] for i in saved))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: FunctionCtx, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * number
        for position, grad in zip(inputs, ctx.saved_tensors, strict=True):
            if upstream is not None and ctx.needs_input_grad[position]:
                grads[position] = grad * upstream
        return tuple(grads)

    register_autograd(name, setup_context, backward, tuple(inputs))


def no_second_derivative(name: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""

    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{name}: second derivatives are not available; the reference back end has them")

    torch.library.register_autograd(f"rlhf_fast::{name}", backward, lib=LIBRARY)
