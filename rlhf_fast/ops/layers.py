"""What a transformer's layer does between its matmuls: residual and RMS norm, and the gated middle of the MLP.

Each is one kernel that reads its inputs once in the forward and once in the backward pass, where plain PyTorch reads
them for every step of the formula. `rlhf_fast.lm.layers` uses them. On a GPU they are plain PyTorch, as in the
reference.
"""

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import FLOATS, check_device, expect
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

define("add_rms_norm(Tensor x, Tensor? delta, Tensor weight, float epsilon) -> (Tensor out, Tensor sum, Tensor scales)")
define(
    "add_rms_norm_backward(Tensor sum, Tensor weight, Tensor scales, Tensor grad_out, Tensor? grad_sum, "
    "bool by_weight) -> (Tensor grad_x, Tensor grad_weight)"
)
define("swiglu(Tensor gate, Tensor up) -> Tensor")
define("swiglu_backward(Tensor gate, Tensor up, Tensor grad_out) -> (Tensor grad_gate, Tensor grad_up)")


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """sum = x + delta, and sum / sqrt(mean(sum^2) + epsilon) * weight over the last dimension (arXiv 1910.07467).

    Plain PyTorch: `F.rms_norm(x + delta, weight.shape, weight, epsilon)`. This keeps the sum and one number per row for
    the backward pass, and rounds half precision once.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64. delta: the same, or None for a sum that is x itself.
        weight: [H] of that dtype. Gradients flow to all three.

    Returns:
        (sum, normed), both [..., H] of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    expect(x.dtype in FLOATS, "x", "dtype float32, bfloat16, float16 or float64", x.dtype)
    H = list(x.shape[-1:])
    expect(list(weight.shape) == H, "weight", f"shape {H} as the last dimension of x", list(weight.shape))
    if delta is not None:
        expect(delta.shape == x.shape, "delta", f"shape {list(x.shape)} as x", list(delta.shape))
    for name, other in (("delta", delta), ("weight", weight)):
        if other is not None:
            expect(other.dtype == x.dtype, name, f"dtype {x.dtype} as x", other.dtype)
            check_device(name, other, "x", x)
    if not has_kernel("add_rms_norm", x):
        return reference.add_rms_norm(x, delta, weight, epsilon)
    out, total, _ = call("add_rms_norm", x, delta, weight, epsilon)
    return (x if delta is None else total), out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up = gate / (1 + e^-gate) * up (arXiv 2002.05202), elementwise; keeps nothing but its arguments.

    Args:
        gate, up: any shape, one dtype: float32, bfloat16, float16 or float64. Gradients flow to both.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    expect(gate.dtype in FLOATS, "gate", "dtype float32, bfloat16, float16 or float64", gate.dtype)
    expect(up.shape == gate.shape, "up", f"shape {list(gate.shape)} as gate", list(up.shape))
    expect(up.dtype == gate.dtype, "up", f"dtype {gate.dtype} as gate", up.dtype)
    check_device("up", up, "gate", gate)
    if not has_kernel("swiglu", gate):
        return reference.swiglu(gate, up)
    return call("swiglu", gate, up)


@kernel("add_rms_norm", "cpu")
def _norm_cpu(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    x, delta, weight = contiguous(x, delta, weight)
    out, total, scales = _norm_fake(x, delta, weight, epsilon)
    _cpu.add_rms_norm(
        code(x), x.data_ptr(), pointer(delta), weight.data_ptr(), scales.numel(), x.shape[-1], epsilon,
        pointer(total), out.data_ptr(), scales.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, total, scales


@torch.library.register_fake("rlhf_fast::add_rms_norm", lib=LIBRARY)
def _norm_fake(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Without delta the sum is empty: an operator cannot return its argument."""
    out = x.new_empty(x.shape)
    total = x.new_empty(0) if delta is None else x.new_empty(x.shape)
    return out, total, x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


@kernel("add_rms_norm_backward", "cpu")
def _norm_backward_cpu(
    total: Tensor, weight: Tensor, scales: Tensor, grad_out: Tensor, grad_sum: Tensor | None, by_weight: bool
) -> tuple[Tensor, Tensor]:
    total, weight, scales, grad_out, grad_sum = contiguous(total, weight, scales, grad_out, grad_sum)
    grad_x, grad_weight = _norm_backward_fake(total, weight, scales, grad_out, grad_sum, by_weight)
    _cpu.add_rms_norm_backward(
        code(total), total.data_ptr(), weight.data_ptr(), scales.data_ptr(), grad_out.data_ptr(), pointer(grad_sum),
        scales.numel(), total.shape[-1], grad_x.data_ptr(), pointer(grad_weight if by_weight else None),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight


@torch.library.register_fake("rlhf_fast::add_rms_norm_backward", lib=LIBRARY)
def _norm_backward_fake(
    total: Tensor, weight: Tensor, scales: Tensor, grad_out: Tensor, grad_sum: Tensor | None, by_weight: bool
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape if by_weight else 0)


def _norm_setup(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, delta, weight, _ = inputs
    out, total, scales = output
    ctx.has_delta = delta is not None
    ctx.save_for_backward(total if ctx.has_delta else x, weight, scales)
    ctx.mark_non_differentiable(*((scales,) if ctx.has_delta else (total, scales)))
    ctx.set_materialize_grads(False)


def _norm_backward(
    ctx: Context, needed: tuple[bool, ...], grad_out: Tensor | None, grad_sum: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    by_x, by_delta, by_weight = needed
    if grad_out is None:
        return grad_sum if by_x else None, grad_sum if by_delta else None, None
    grad_x, grad_weight = torch.ops.rlhf_fast.add_rms_norm_backward(*ctx.saved_tensors, grad_out, grad_sum, by_weight)
    return grad_x if by_x else None, grad_x if by_delta else None, grad_weight if by_weight else None


register_autograd("add_rms_norm", _norm_setup, _norm_backward, differentiable=("x", "delta", "weight"))
no_second_derivative("add_rms_norm_backward")


@kernel("swiglu", "cpu")
def _swiglu_cpu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = contiguous(gate, up)
    out = torch.empty_like(gate)
    _cpu.swiglu(code(gate), gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), torch.get_num_threads())
    return out


@torch.library.register_fake("rlhf_fast::swiglu", lib=LIBRARY)
def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@kernel("swiglu_backward", "cpu")
def _swiglu_backward_cpu(gate: Tensor, up: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, grad_out = contiguous(gate, up, grad_out)
    grads = _swiglu_backward_fake(gate, up, grad_out)
    _cpu.swiglu_backward(
        code(gate), gate.data_ptr(), up.data_ptr(), grad_out.data_ptr(), gate.numel(), *(x.data_ptr() for x in grads),
        torch.get_num_threads(),
    )  # fmt: skip
    return grads


@torch.library.register_fake("rlhf_fast::swiglu_backward", lib=LIBRARY)
def _swiglu_backward_fake(gate: Tensor, up: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _swiglu_setup(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Context, needed: tuple[bool, ...], grad_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.rlhf_fast.swiglu_backward(*ctx.saved_tensors, grad_out)


register_autograd("swiglu", _swiglu_setup, _swiglu_backward, differentiable=("gate", "up"))
no_second_derivative("swiglu_backward")
