"""Autograd of the operators: how it is attached, and the backward pass of those that made their gradient already."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from rlhf_fast.ops.dispatch import AUTOGRAD, KERNELS, LIBRARY


def register_autograd(name: str, setup_context: Callable, backward: Callable, differentiable: tuple[int, ...]) -> None:
    """`torch.library.register_autograd` without its fill-in of default arguments.

    That rebuilds the schema's argument list once per argument and call: 0.1 ms for the 16 arguments of `ppo_loss`, as
    long as its kernel runs. Our schemas have no defaults to fill in. `differentiable`: the positions of the inputs that
    can ask for a gradient; the others are constants. `backward` returns the gradients of those, in that order, and its
    `ctx.needs_input_grad` starts with two entries of no interest. A keyset of None: called past the dispatcher.
    """
    op = getattr(torch.ops.rlhf_fast, name).default

    def call_kernel(keyset: torch._C.DispatchKeySet | None, args: tuple) -> tuple[Tensor, ...]:
        if keyset is None:
            return KERNELS["cpu"][name](*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Operator(torch.autograd.Function):  # sees the differentiable inputs alone: every argument costs it time
        @staticmethod
        def forward(
            ctx: FunctionCtx, keyset: torch._C.DispatchKeySet | None, args: tuple, *_: Tensor | None
        ) -> tuple[Tensor, ...]:
            output = call_kernel(keyset, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return None, None, *backward(ctx, *grads)

    def autograd(keyset: torch._C.DispatchKeySet | None, *args: object) -> tuple[Tensor, ...]:
        inputs = [args[i] for i in differentiable if args[i] is not None]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            raise NotImplementedError(f"{name}: forward-mode derivatives are not available; the reference has them")
        if torch.is_grad_enabled():
            for x in inputs:
                if x.requires_grad:
                    return Operator.apply(keyset, args, *(args[i] for i in differentiable))
        if keyset is not None:
            return call_kernel(keyset, args)
        with torch.no_grad():  # constants that ask for gradients get none, as below the dispatcher's autograd
            return call_kernel(None, args)

    Operator.__name__ = Operator.__qualname__ = f"rlhf_fast_{name}"
    Operator._backward_cls.__name__ = f"rlhf_fast_{name}Backward"  # what grad_fn, profiles and anomalies show
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    AUTOGRAD[name] = autograd


def register_saved_gradients(name: str, inputs: dict[int, int]) -> None:
    """Autograd for an operator that returns its result and then, as further outputs, d result / d input.

    `inputs` maps the position of each differentiable input to that of the output holding its gradient; only the first
    output is differentiable. The gradient is a constant of autograd's, so that `create_graph` is an error: a second
    derivative would lack what goes through it.
    """
    saved = tuple(inputs.values())

    def setup_context(ctx: FunctionCtx, args: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(output[i] for i in saved))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: FunctionCtx, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(saved)
        _refuse_graph(name)
        grads, needed = ctx.saved_tensors, ctx.needs_input_grad
        if not _is_one(upstream):
            grads = [grad * upstream for grad in grads]
        return tuple([grad if needed[i] else None for i, grad in enumerate(grads, start=2)])

    register_autograd(name, setup_context, backward, tuple(inputs))


def register_consumed_gradients(name: str, inputs: dict[int, int]) -> None:
    """As `register_saved_gradients`, for gradients too large to keep twice: the backward pass hands them over.

    An upstream gradient of 1 leaves them as they are, but for the dtype of the input; a second backward pass is an
    error.
    """
    positions = tuple(inputs.values())

    def setup_context(ctx: FunctionCtx, args: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.gradients = [output[i] for i in positions]
        ctx.dtypes = [None if args[i] is None else args[i].dtype for i in inputs]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: FunctionCtx, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(f"{name}: the gradients were made in the forward pass and are gone after one backward")
        if upstream is None:
            return (None,) * len(positions)
        _refuse_graph(name)
        gradients, ctx.gradients = ctx.gradients, None
        unscaled = _is_one(upstream)
        return tuple(
            (grad if unscaled else grad * upstream).to(dtype) if needed else None
            for grad, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        )

    register_autograd(name, setup_context, backward, tuple(inputs))


def _is_one(upstream: Tensor) -> bool:
    """Known without waiting for a device, and while nothing is being traced."""
    known = type(upstream) is Tensor and upstream.dim() == 0 and upstream.is_cpu
    return known and upstream.item() == 1.0


_NO_SECOND = "{}: second derivatives are not available; the reference back end has them"


def _refuse_graph(name: str) -> None:
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise RuntimeError(_NO_SECOND.format(name))


def no_second_derivative(name: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""

    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> None:
        raise RuntimeError(_NO_SECOND.format(name))

    torch.library.register_autograd(f"rlhf_fast::{name}", backward, lib=LIBRARY)
