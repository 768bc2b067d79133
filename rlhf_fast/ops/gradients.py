"""Autograd of the operators: how it is attached, and the backward pass of those that made their gradient already.

Inputs and results are spoken of by their names in the operator's schema; the gradient by the input `x` is the result
`grad_x`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlhf_fast.ops import private
from rlhf_fast.ops.dispatch import ARGUMENTS, AUTOGRAD, KERNELS, LIBRARY, RESULTS, overridden, override

Context: TypeAlias = Any
"""torch's `FunctionCtx`, whose stubs know neither `saved_tensors` nor the attributes that a forward pass sets."""


def register_autograd(name: str, setup_context: Callable, backward: Callable, differentiable: tuple[str, ...]) -> None:
    """`torch.library.register_autograd` without its fill-in of default arguments.

    That rebuilds the schema's argument list once per argument and call: 0.1 ms for the 16 arguments of `ppo_loss`, as
    long as its kernel runs. Our schemas have no defaults to fill in.

    differentiable: the inputs that can ask for a gradient; the others are constants.
    setup_context(ctx, inputs, output): as in torch.
    backward(ctx, needed, *grads): the gradients by the differentiable inputs, in that order; `needed` says of each
    whether anybody asks for it.
    """
    op, positions = getattr(torch.ops.rlhf_fast, name).default, [ARGUMENTS[name].index(x) for x in differentiable]

    def call_kernel(keyset: Any, args: tuple) -> tuple[Tensor, ...]:
        return KERNELS["cpu"][name](*args) if keyset is None else private.call_below_autograd(op, keyset, args)

    class Operator(torch.autograd.Function):  # sees the differentiable inputs alone: every argument costs it time
        @staticmethod
        def forward(ctx: Context, keyset: Any, args: tuple, *_: Tensor | None) -> tuple[Tensor, ...]:
            with private.for_outer_transforms():
                output = call_kernel(keyset, args)
            setup_context(ctx, args, output)
            ctx.backend = override()
            return output

        @staticmethod
        def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[2:]  # the first two are the keyset and the tuple of arguments
            if ctx.backend == override():
                return None, None, *backward(ctx, needed, *grads)
            with overridden(ctx.backend):  # autograd's thread of a GPU, or after the block
                return None, None, *backward(ctx, needed, *grads)

    def autograd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        """Called by torch's dispatcher with its keyset, and by `dispatch.call` past it, with None."""
        inputs = [args[i] for i in positions if args[i] is not None]
        if private.has_tangents(inputs):
            raise NotImplementedError(f"{name}: forward-mode derivatives are not available; the reference has them")
        if torch.is_grad_enabled():
            for x in inputs:
                if x.requires_grad:
                    return private.apply(Operator, keyset, args, *(args[i] for i in positions))
        if keyset is not None:
            return call_kernel(keyset, args)
        with torch.no_grad():  # constants that ask for gradients get none, as below the dispatcher's autograd
            return call_kernel(None, args)

    Operator.__name__ = Operator.__qualname__ = f"rlhf_fast_{name}"
    private.name_backward(Operator, f"rlhf_fast_{name}Backward")
    if private.REDISPATCH:
        LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    else:
        _register_in_torch(name, setup_context, backward, positions)
    AUTOGRAD[name] = autograd


def _register_in_torch(name: str, setup_context: Callable, backward: Callable, positions: list[int]) -> None:
    """The slower registration, by public names alone."""

    def all_gradients(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ARGUMENTS[name])
        for i, grad in zip(positions, backward(ctx, [ctx.needs_input_grad[i] for i in positions], *grads), strict=True):
            gradients[i] = grad
        return tuple(gradients)

    def setup(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"rlhf_fast::{name}", all_gradients, setup_context=setup, lib=LIBRARY)


def register_saved_gradients(name: str, *inputs: str) -> None:
    """Autograd for an operator that returns its result and then, as further outputs, `grad_<input>` of each input.

    Only the first output is differentiable. The gradient is a constant of autograd's, so that `create_graph` is an
    error: a second derivative would lack what goes through it.
    """
    saved = [RESULTS[name].index(f"grad_{x}") for x in inputs]

    def setup_context(ctx: Context, args: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(output[i] for i in saved))
        mark_constants(ctx, output, saved)
        ctx.set_materialize_grads(False)

    def backward(
        ctx: Context, needed: tuple[bool, ...], upstream: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second(name, others)
        if upstream is None:
            return (None,) * len(saved)
        refuse_graph(name, ctx.nested)
        grads = ctx.saved_tensors
        if not _is_one(upstream):
            grads = [grad * upstream for grad in grads]
        return tuple([grad if need else None for grad, need in zip(grads, needed, strict=True)])

    register_autograd(name, setup_context, backward, inputs)


def register_consumed_gradients(name: str, *inputs: str) -> None:
    """As `register_saved_gradients`, for gradients too large to keep twice: the backward pass hands them over."""
    arguments = [ARGUMENTS[name].index(x) for x in inputs]
    results = [RESULTS[name].index(f"grad_{x}") for x in inputs]

    def setup_context(ctx: Context, args: tuple, output: tuple[Tensor, ...]) -> None:
        hold(ctx, [output[i] for i in results], [args[i] for i in arguments])
        mark_constants(ctx, output, results)

    def backward(
        ctx: Context, needed: tuple[bool, ...], upstream: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second(name, others)
        return hand_over(ctx, name, upstream, needed)

    register_autograd(name, setup_context, backward, inputs)


def hold(ctx: Context, gradients: list[Tensor], inputs: list[Tensor | None]) -> None:
    """Keep the gradients by these inputs, made in the forward pass, for `hand_over`."""
    ctx.gradients, ctx.nested = gradients, False
    ctx.dtypes = [None if x is None else x.dtype for x in inputs]
    ctx.set_materialize_grads(False)


def hand_over(ctx: Context, name: str, upstream: Tensor | None, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that `hold` kept, times the upstream gradient, in the dtypes of the inputs.

    An upstream gradient of 1 leaves them as they are; a second backward pass is an error.
    """
    if ctx.gradients is None:
        raise RuntimeError(f"{name}: the gradients were made in the forward pass and are gone after one backward")
    if upstream is None:
        return (None,) * len(ctx.gradients)
    refuse_graph(name, ctx.nested)
    gradients, ctx.gradients = ctx.gradients, None
    unscaled = _is_one(upstream)
    return tuple(
        (grad if unscaled else grad * upstream).to(dtype) if need else None
        for grad, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)
    )


def _is_one(upstream: Tensor) -> bool:
    """Known without waiting for a device, and while nothing is being traced."""
    known = type(upstream) is Tensor and upstream.dim() == 0 and upstream.is_cpu and not private.in_transform()
    return known and upstream.item() == 1.0


_NO_SECOND = "{}: second derivatives are not available; the reference back end has them"


def refuse_graph(name: str, nested: bool) -> None:
    """Raise RuntimeError in a backward pass that is itself to be differentiated (create_graph=True).

    nested: the forward pass ran under one of torch.func's transforms, which always ask for a graph. `refuse_second`
    finds out where one is used.
    """
    if torch.is_grad_enabled() and not nested:  # in a backward pass: create_graph=True
        raise RuntimeError(_NO_SECOND.format(name))


def mark_constants(ctx: Context, output: tuple[Tensor, ...], gradients: list[int], first: int = 1) -> None:
    """All results from number `first` on are constants of autograd's.

    gradients: the numbers of the results that the backward pass takes for derivatives. They are no constants under
    torch.func's transforms: a transform in a transform asks for the second derivative, which `refuse_second` sees.
    """
    ctx.nested = private.in_transform()
    kept = gradients if ctx.nested else ()
    ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i >= first and i not in kept))


def refuse_second(name: str, others: tuple[Tensor | None, ...]) -> None:
    """Raise RuntimeError where a gradient comes for one of the results that `mark_constants` has marked or left."""
    if any(x is not None for x in others):
        raise RuntimeError(_NO_SECOND.format(name))


def no_second_derivative(name: str) -> None:
    """Make differentiating a backward operator an error instead of a silent zero."""
    op = getattr(torch.ops.rlhf_fast, name).default

    def refuse(ctx: Context, *grads: Tensor | None) -> None:
        raise RuntimeError(_NO_SECOND.format(name))

    if not private.REDISPATCH:
        torch.library.register_autograd(f"rlhf_fast::{name}", refuse, lib=LIBRARY)
        return

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Context, keyset: Any, args: tuple, *_: Tensor) -> Any:
            with private.for_outer_transforms():
                return private.call_below_autograd(op, keyset, args)

        backward = staticmethod(refuse)

    def autograd(keyset: Any, *args: Any) -> Any:
        asking = [x for x in args if isinstance(x, Tensor) and x.requires_grad] if torch.is_grad_enabled() else []
        if asking:
            return private.apply(Refused, keyset, args, *asking)
        return private.call_below_autograd(op, keyset, args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
