import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import kl_penalty, shape_rewards
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error, poisoned, ragged_mask

ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: torch.expm1(-d) + d,
    "abs": lambda d: d.abs(),
}
SLOPES = {"k1": torch.ones_like, "k2": lambda d: d, "k3": lambda d: -torch.expm1(-d), "abs": torch.sign}


def test_hand_computed(kernels):
    """d = log 2: k1 = log 2, k2 = log^2(2) / 2, k3 = 1/2 - 1 + log 2."""
    d = torch.tensor([math.log(2.0)])
    ref = torch.tensor([-3.0])
    values = [kl_penalty(ref + d, ref, name).item() for name in ("k1", "k2", "k3", "abs")]
    assert values == pytest.approx([math.log(2), math.log(2) ** 2 / 2, math.log(2) - 0.5, math.log(2)], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_is_the_kl(kernels, estimator):
    """DPO paper eq. 4: with pi_ref = (.5, .3, .2), r = (0, 1, 2), beta = 1 the optimum has KL .3228342793."""
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    optimum = ref * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).exp() / 2.7932957683
    kl = (optimum * kl_penalty(optimum.log(), ref.log(), estimator)).sum().item()
    assert kl == pytest.approx(0.3228342793, abs=1e-9)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
def test_matches_float64(kernels, estimator, dtype):
    a, b = (torch.randn(5, 33).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(5, 33)
    d = (a.detach().double() - b.detach().double()).requires_grad_()
    kl = kl_penalty(a, b, estimator)
    (kl * upstream).sum().backward()
    assert error(kl, ESTIMATORS[estimator](d)) <= VALUE_TOLERANCE[dtype]
    assert error(a.grad, upstream * SLOPES[estimator](d)) <= GRADIENT_TOLERANCE[dtype]
    assert error(b.grad, -upstream * SLOPES[estimator](d)) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_gradcheck(kernels, estimator):
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl_penalty(a, b, estimator), (a, b))


@given(d=st.floats(-30, 30, width=32))
def test_k3_is_never_negative(d):
    assert kl_penalty(torch.tensor([d]), torch.tensor([0.0]), "k3").item() >= 0


def test_k3_near_zero_keeps_its_digits(kernels):
    """d^2 / 2 to first order: expm1 rather than exp - 1."""
    d = torch.tensor([1e-4, -1e-4])
    assert kl_penalty(d, torch.zeros(2), "k3").tolist() == pytest.approx([5e-9, 5e-9], rel=1e-2)


def test_strides_and_empty(kernels):
    a, b = torch.randn(6, 4), torch.randn(4, 6)
    assert torch.equal(kl_penalty(a.t(), b), a.t() - b)
    assert torch.equal(kl_penalty(a[:, :1].expand(6, 4), a), a[:, :1] - a)
    assert kl_penalty(torch.empty(0, 3), torch.empty(0, 3)).shape == (0, 3)


class TestShapeRewards:
    def test_hand_computed(self, kernels):
        """kl_coef 0.1, score 2 on the last True place; the second row's score 9 is clipped to 5."""
        logprobs = torch.tensor([[-1.0, -2.0, torch.nan], [-1.0, -1.0, -1.0]])
        ref = torch.tensor([[-2.0, -1.0, torch.inf], [-1.0, -3.0, -1.5]])
        mask = torch.tensor([[True, True, False], [True, True, True]])
        rewards = shape_rewards(torch.tensor([2.0, 9.0]), logprobs, ref, mask, kl_coef=0.1, clip=5.0)
        assert error(rewards, torch.tensor([[-0.1, 2.1, 0.0], [0.0, -0.2, 4.95]])) < 1e-6

    def test_left_padding_and_holes(self, kernels):
        mask = torch.tensor([[False, True, False, True, False], [False] * 5])
        zeros = torch.zeros(2, 5)
        rewards = shape_rewards(torch.tensor([3.0, 7.0]), zeros, zeros, mask, kl_coef=1.0)
        assert rewards.tolist() == [[0, 0, 0, 3, 0], [0] * 5]

    @pytest.mark.parametrize("estimator", list(ESTIMATORS))
    @pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
    def test_matches_float64(self, kernels, estimator, dtype):
        mask = ragged_mask(5, 37)
        scores = (torch.randn(5) * 3).to(dtype)
        a, b = (torch.randn(5, 37).to(dtype) for _ in range(2))
        truth = -0.3 * ESTIMATORS[estimator](a.double() - b.double()) * mask
        for row in range(5):
            if mask[row].any():
                truth[row, mask[row].nonzero().max()] += scores[row].double().clamp(-2, 2)
        rewards = shape_rewards(
            scores, poisoned(a, mask), poisoned(b, mask), mask, kl_coef=0.3, estimator=estimator, clip=2.0
        )
        assert error(rewards, truth) <= VALUE_TOLERANCE[dtype]

    def test_is_a_constant(self, kernels):
        x = torch.randn(2, 3, requires_grad=True)
        scores = torch.randn(2, requires_grad=True)
        mask = torch.ones(2, 3, dtype=torch.bool)
        assert not shape_rewards(scores, x, x, mask, kl_coef=0.1).requires_grad

    def test_no_rows(self, kernels):
        empty = torch.empty(0, 3)
        assert shape_rewards(torch.empty(0), empty, empty, empty.bool(), kl_coef=0.1).shape == (0, 3)


x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_penalty(x, x, "k9"), "estimator: expected one of k1, k2, k3, abs, got 'k9'"),
        (lambda: kl_penalty(x, x[:1]), r"ref_logprobs: expected shape \[2, 3\] as logprobs, got \[1, 3\]"),
        (lambda: kl_penalty(x.long(), x), "logprobs: expected dtype .* got torch.int64"),
        (lambda: kl_penalty(x, x.to("meta")), "ref_logprobs: expected device cpu as logprobs, got meta"),
        (lambda: kl_penalty(x, 0.0), "ref_logprobs: expected a tensor, got float"),
        (lambda: shape_rewards(x[0], x, x, mask, kl_coef=0.1), r"scores: expected shape \[2\], one per row .* \[3\]"),
        (lambda: shape_rewards(x[:, 0].long(), x, x, mask, kl_coef=0.1), "scores: expected a floating point tensor"),
        (lambda: shape_rewards(x[:, 0], x, x, mask.int(), kl_coef=0.1), r"mask: expected a bool tensor .* torch.int32"),
        (lambda: shape_rewards(x[:, 0], x, x, mask[:1], kl_coef=0.1), r"mask: expected shape \[2, 3\] .* \[1, 3\]"),
        (lambda: shape_rewards(x[:, 0], x[0], x[0], mask[0], kl_coef=0.1), r"logprobs: expected shape \[B, T\]"),
        (lambda: shape_rewards(x[:, 0], x, x, mask, kl_coef=0.1, clip=0.0), "clip: expected a number > 0 or None"),
        (lambda: shape_rewards(x[:, 0], x, x, mask, kl_coef=0.1, estimator="kl"), "estimator: expected one of"),
    ],
)
def test_errors(kernels, call, message):
    with pytest.raises(ValueError, match=message):
        call()
