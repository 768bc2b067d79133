"""token_kl on logits of every size: float32 logits of 1e8 are exact numbers, and so is the KL that they say."""

import pytest
import torch

from rlhf_fast import linear_token_kl, token_kl
from rlhf_fast.ops.dispatch import _cpu
from tests.support.oracle import GRADIENT_TOLERANCE, error, kl_truth

ROWS, V = 6, 333
SCALES = [1.0, 1e3, 1e4, 1e6, 1e8]


def pairs(scale, dtype=torch.float32):
    """(policy, reference): who is sure of a token; both unlike; a policy far from 0; a reference that lacks a token."""
    rows, k = torch.arange(ROWS), torch.arange(ROWS) * 7
    logits, ref_logits = torch.randn(2, ROWS, V, dtype=torch.float64)
    sure, ref_sure, lacking = logits.clone(), ref_logits.clone(), ref_logits.clone()
    sure[rows, k], ref_sure[rows, k], lacking[rows, k] = scale, scale, -scale
    likes = logits.clone()
    likes[rows, k] += 3
    cases = {
        "the policy is sure": (sure, ref_logits),
        "the reference is sure": (logits, ref_sure),
        "both are sure": (logits * scale, ref_logits * scale),
        "the policy is far from 0": (logits + scale, ref_logits),
        "the reference lacks a likely token": (likes, lacking),
    }
    return {name: (z.to(dtype), z_ref.to(dtype)) for name, (z, z_ref) in cases.items()}


def check(logits, ref_logits, ids, tolerance, relative=1e-5, **options):
    """The KL to `relative` of float64, and its gradient."""
    x = logits.clone().requires_grad_()
    out = token_kl(x, ref_logits, ids, **options)
    (gradient,) = torch.autograd.grad(out.kl.sum(), x)
    zero = torch.zeros(ids.shape)
    truth = kl_truth(logits, ref_logits, ids, zero, zero, torch.ones(ids.shape), **options)
    assert ((out.kl.double() - truth[2]).abs() <= relative * truth[2].clamp(min=0.1)).all()
    assert error(gradient, truth[4]) <= tolerance
    assert error(out.logprobs, truth[0]) <= 1e-5 and error(out.ref_logprobs, truth[3]) <= 1e-5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", pairs(1.0))
def test_scales(kernels, case, scale):
    logits, ref_logits = pairs(scale)[case]
    for ids in (logits.argmax(-1), torch.full((ROWS,), 250)):
        check(logits, ref_logits, ids, 1e-5)


@pytest.mark.parametrize("case", pairs(1.0))
def test_half_precision(kernels, case):
    logits, ref_logits = pairs(1e6, torch.bfloat16)[case]
    check(logits, ref_logits, torch.full((ROWS,), 250), GRADIENT_TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("case", pairs(1.0))
def test_every_instruction_set(case):
    widest = _cpu.isa()
    try:
        for isa in _cpu.isas():
            _cpu.set_isa(isa)
            check(*pairs(1e6)[case], torch.arange(ROWS), 1e-5)
    finally:
        _cpu.set_isa(widest)


def test_float64(kernels):
    """KL = -log q(k) = log sum e^z_ref - z_ref_k, because the policy is sure of k."""
    logits, ref_logits = pairs(1e38, torch.float64)["the policy is sure"]
    k = torch.arange(ROWS) * 7
    out = token_kl(logits, ref_logits, torch.full((ROWS,), 250))
    torch.testing.assert_close(out.kl, -ref_logits.log_softmax(-1)[torch.arange(ROWS), k], rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.3, 7.0])
def test_temperature(kernels, temperature):
    for case in ("the policy is sure", "the policy is far from 0"):
        logits, ref_logits = pairs(1e6)[case]
        check(logits, ref_logits, torch.full((ROWS,), 250), 1e-5, temperature=temperature)


def test_a_mask_of_the_least_number(kernels):
    """What a float can say, a token of p at -3.4e38 in the reference, is not cut off at some bound."""
    logits, ref_logits = torch.zeros(2, 300), torch.zeros(2, 300)
    logits[:, 1], ref_logits[:, 1] = -8.0, torch.finfo(torch.float32).min
    check(logits, ref_logits, torch.tensor([0, 5]), 1e-5)


def test_many_chunks_off_the_centre(kernels):
    """The likeliest token has by far the lowest log-ratio: about its own, the others' would lose all digits."""
    logits, ref_logits = torch.randn(2, 3, 40_000) / 10
    logits[:, 39_000] += 3
    ref_logits[:, 39_000] = -1e7
    check(logits, ref_logits, torch.tensor([39_000, 2, 39_999]), 1e-5)


def test_linear_token_kl():
    """The last layers' own logits are the reference: hidden states are single numbers, so that no product rounds."""
    logits, ref_logits = pairs(1e6)["the policy is sure"]
    eye, ids = torch.eye(ROWS), torch.full((ROWS,), 250)
    weight = logits.t().contiguous().requires_grad_()
    out = linear_token_kl(eye, weight, eye, ref_logits.t().contiguous(), ids)
    out.kl.sum().backward()
    truth = kl_truth(logits, ref_logits, ids, *torch.zeros(2, ROWS), torch.ones(ROWS))
    assert error(out.kl, truth[2]) <= 1e-5 and error(weight.grad.t(), truth[4]) <= 1e-5


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("impossible", [False, True])
def test_a_broken_row_has_no_finite_gradient(kernels, side, broken, impossible):
    """NaN where the policy can give no token, too. The other rows keep theirs."""
    pair = torch.randn(2, 3, 70)
    if impossible:
        pair[0, 1, 11] = -200.0
    pair[side, 1, 11] = broken
    x = pair[0].clone().requires_grad_()
    out = token_kl(x, pair[1], torch.arange(3))
    (gradient,) = torch.autograd.grad(out.kl.sum(), x)
    assert out.kl[1].isnan() and not gradient[1].isfinite().all()
    assert out.kl[::2].isfinite().all() and gradient[::2].isfinite().all()
