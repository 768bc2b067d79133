"""RMS norm of a sum, and the gated middle of an MLP, against float64; the compiled kernels' promises about bits."""

import pytest
import torch

from rlhf_fast.ops import reference
from rlhf_fast.ops.layers import add_rms_norm, swiglu
from tests.support.oracle import error

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPSILON = 1e-6


def slack(instruction_set, dtype):
    """Plain torch rounds halves after every step."""
    return TOLERANCE[dtype] * (8 if instruction_set == "reference" and dtype.itemsize == 2 else 1)


def leaves(*shapes, dtype):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def doubles(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def check_gradients(out, inputs, truth, true_inputs, grads, tolerance):
    """grads: of every output, or None where nothing flows back through it. Errors are relative to the largest."""
    used = [(a, b, g.to(a.dtype)) for a, b, g in zip(out, truth, grads, strict=True) if g is not None]
    mine = torch.autograd.grad([a for a, _, _ in used], inputs, [g for _, _, g in used])
    true = torch.autograd.grad([b for _, b, _ in used], true_inputs, [g.double() for _, _, g in used])
    for x, y in zip(mine, true, strict=True):
        largest = y.abs().max().clamp(min=1)
        assert x.dtype == out[0].dtype and error(x.double() / largest, y / largest) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(130, 64), (3, 5, 33), (1, 1), (257, 8), (2, 1000)], ids=str)
@pytest.mark.parametrize("flows", ["both", "normed", "sum"])
def test_norm_of_a_sum(instruction_set, dtype, shape, flows):
    inputs = leaves(shape, shape, shape[-1:], dtype=dtype)
    x, delta, weight = true_inputs = doubles(inputs)
    total = x + delta
    if instruction_set != "reference":
        total = total + (total.to(dtype).double() - total).detach()  # the sum is kept rounded, and what is normed is it
    normed = total / (total.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    out = add_rms_norm(*inputs, EPSILON)
    for mine, true in zip(out, (total, normed), strict=True):
        assert mine.dtype == dtype and error(mine, true) <= slack(instruction_set, dtype)
    grads = [torch.randn(shape) if flows in ("both", name) else None for name in ("sum", "normed")]
    if flows == "sum":
        inputs, true_inputs = inputs[:2], true_inputs[:2]  # the weight is not in it
    check_gradients(out, inputs, (total, normed), true_inputs, grads, slack(instruction_set, dtype))


def test_norm_without_delta(instruction_set):
    inputs = leaves((70, 48), (48,), dtype=torch.float32)
    total, normed = add_rms_norm(inputs[0], None, inputs[1], EPSILON)
    assert total is inputs[0]
    x, weight = doubles(inputs)
    true = x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    assert error(normed, true) <= 1e-6
    check_gradients([normed], inputs, [true], [x, weight], [torch.randn(70, 48)], 1e-5)


def test_norm_by_hand(instruction_set):
    """3 + 0, 0 + 4: mean square 12.5."""
    x, delta, weight = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([1.0, 2.0])
    total, normed = add_rms_norm(x, delta, weight, 0.0)
    assert total.tolist() == [[3, 4]]
    assert normed[0].tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])


def test_a_frozen_weight_gets_no_gradient():
    x, weight = leaves((9, 16), (16,), dtype=torch.float32)
    add_rms_norm(x, None, weight.detach(), EPSILON)[1].sum().backward()
    assert x.grad.abs().sum() > 0 and weight.grad is None
    add_rms_norm(x.detach(), x.detach(), weight, EPSILON)[1].sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(130, 64), (3, 7), (1,), (0, 5)], ids=str)
def test_swiglu(instruction_set, dtype, shape):
    gate, up = leaves(shape, shape, dtype=dtype)
    with torch.no_grad():
        gate.mul_(4)
    true_inputs = doubles([gate, up])
    truth = true_inputs[0] * torch.sigmoid(true_inputs[0]) * true_inputs[1]
    out = swiglu(gate, up)
    assert out.dtype == dtype and error(out, truth) <= slack(instruction_set, dtype)
    if gate.numel():
        check_gradients([out], [gate, up], [truth], true_inputs, [torch.randn(shape)], slack(instruction_set, dtype))


def test_swiglu_far_out(instruction_set):
    gate = torch.tensor([-300.0, -88.0, -20.0, 0.0, 20.0, 300.0, torch.nan], requires_grad=True)
    out = swiglu(gate, torch.full((7,), 2.0))
    (slope,) = torch.autograd.grad(out.sum(), gate)
    assert out[:-1].tolist() == pytest.approx([0, 0, -40 / (1 + 4.851652e8), 0, 40, 600], abs=1e-9)
    assert slope[:-1].tolist() == pytest.approx([0, 0, -7.832925e-8, 1, 2, 2], abs=1e-9)
    assert out[-1].isnan() and slope[-1].isnan()


def test_other_strides():
    x, delta, weight = leaves((64, 40), (64, 40), (64,), dtype=torch.float32)
    turned = add_rms_norm(x.t(), delta.t(), weight, EPSILON)
    straight = add_rms_norm(x.t().contiguous(), delta.t().contiguous(), weight, EPSILON)
    assert all(torch.equal(a, b) for a, b in zip(turned, straight, strict=True))
    assert torch.equal(swiglu(x.t(), delta.t()), swiglu(x, delta).t())


def test_bits_do_not_depend_on_threads():
    inputs = leaves((3000, 96), (3000, 96), (96,), dtype=torch.float32)
    grad, before = torch.randn(3000, 96), torch.get_num_threads()

    def results():
        total, out = add_rms_norm(*inputs, EPSILON)
        gated = swiglu(*inputs[:2])
        return [
            out,
            gated,
            *torch.autograd.grad([total, out], inputs, [grad, grad]),
            *torch.autograd.grad(gated, inputs[:2], grad),
        ]

    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(2)
        two = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_rotary_by_hand():
    """A quarter turn takes (1, 2) to (-2, 1), and the element in between stays with its own partner."""
    x = torch.tensor([[[1.0, 5.0, 2.0, 7.0]]])
    cosines, sines = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert reference.rotary(x, cosines, sines).flatten().tolist() == [-2, 5, 1, 7]


x = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_rms_norm(x.long(), None, x[0], 1e-6), "x: expected dtype float32, .* got torch.int64"),
        (lambda: add_rms_norm(x, x[:1], x[0], 1e-6), r"delta: expected shape \[2, 3\] as x, got \[1, 3\]"),
        (lambda: add_rms_norm(x, None, x[0, :2], 1e-6), r"weight: expected shape \[3\] .* got \[2\]"),
        (
            lambda: add_rms_norm(x, x.double(), x[0], 1e-6),
            "delta: expected dtype torch.float32 as x, got torch.float64",
        ),
        (lambda: add_rms_norm(x, None, x[0].to("meta"), 1e-6), "weight: expected device cpu as x, got meta"),
        (lambda: swiglu(x, x[:1]), r"up: expected shape \[2, 3\] as gate, got \[1, 3\]"),
        (lambda: swiglu(x, x.half()), "up: expected dtype torch.float32 as gate, got torch.float16"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
