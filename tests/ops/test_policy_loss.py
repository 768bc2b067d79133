import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import ppo_loss, ppo_value_loss, reinforce_loss
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error, poisoned, ragged_mask

DTYPES = list(VALUE_TOLERANCE)
REDUCTIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant"]


def weights(mask, reduction, normalizer):
    """The factor of each token in the loss: the definition of the reductions."""
    w = mask.double()
    if reduction == "sequence_mean":
        w = w / mask.sum(1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = mask.sum() if reduction == "token_mean" else mask.shape[0]
    return w / normalizer


def ppo_truth(logprobs, old, advantages, low, high, dual_clip):
    """Value and slope of each token's loss, case by case."""
    r = (logprobs.double() - old.double()).exp()
    A = advantages.double().expand_as(r)
    up, down, far = (A >= 0) & (r > 1 + high), (A < 0) & (r < 1 - low), (A < 0) & (r > dual_clip)
    value = torch.where(
        up, -A * (1 + high), torch.where(down, -A * (1 - low), torch.where(far, -A * dual_clip, -A * r))
    )
    slope = torch.where(up | down | far, 0.0, -A * r)
    return value, slope, r, (up & (A > 0)) | down


KL = {
    "k1": (lambda d: d, torch.ones_like),
    "k2": (lambda d: d**2 / 2, lambda d: d),
    "k3": (lambda d: torch.expm1(-d) + d, lambda d: -torch.expm1(-d)),
    "abs": (torch.abs, torch.sign),
}


class TestPPO:
    def test_hand_computed(self, kernels):
        """r = 3/2, 3/2, 1/2, 1/2, A = 1, -1, 1, -1, clip 0.2: losses -1.2, 1.5, -0.5, 0.8; slopes 0, 1.5, -0.5, 0."""
        x = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
        old, advantages = torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        mask = torch.ones(1, 4, dtype=torch.bool)
        out = ppo_loss(x, old, advantages, mask)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(0.6 / 4, abs=1e-6)
        assert error(x.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]) / 4) < 1e-6
        assert out.clip_fraction.item() == 0.5
        assert out.ratio_mean.item() == pytest.approx(1.0) and out.ratio_max.item() == pytest.approx(1.5)
        kl = sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5)) / 4
        assert out.approx_kl.item() == pytest.approx(kl, abs=1e-6)
        dual = ppo_loss(x, old, advantages, mask, dual_clip=1.4)
        assert dual.loss.item() == pytest.approx((-1.2 + 1.4 - 0.5 + 0.8) / 4, abs=1e-6)
        asymmetric = ppo_loss(x, old, advantages, mask, clip=(0.3, 0.6))
        assert asymmetric.loss.item() == pytest.approx((-1.5 + 1.5 - 0.5 + 0.7) / 4, abs=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("per_token", [True, False])
    def test_matches_float64(self, kernels, dtype, reduction, per_token):
        B, T = 7, 67
        mask = ragged_mask(B, T)
        logprobs, old = (torch.randn(B, T).mul(0.5).to(dtype) for _ in range(2))
        ref, entropy = torch.randn(B, T).to(dtype), torch.rand(B, T).to(dtype)
        advantages = torch.randn((B, T) if per_token else B).to(dtype)
        normalizer = 55.0 if reduction == "constant" else None
        x, h = (poisoned(t, mask).requires_grad_() for t in (logprobs, entropy))
        out = ppo_loss(
            x, poisoned(old, mask), poisoned(advantages, mask) if per_token else advantages, mask,
            clip=(0.2, 0.3), dual_clip=2.0, ref_logprobs=poisoned(ref, mask), kl_coef=0.3, kl_estimator="k3",
            entropy=h, entropy_coef=0.01, reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
        out.loss.backward()
        value, slope, r, clipped = ppo_truth(
            logprobs, old, advantages if per_token else advantages[:, None], 0.2, 0.3, 2.0
        )
        w = weights(mask, reduction, normalizer)
        d = logprobs.double() - ref.double()
        kl, kl_slope = KL["k3"]
        truth = dict(policy_loss=(w * value).sum(), kl=(w * kl(d)).sum(), entropy=(w * entropy.double()).sum())
        truth["loss"] = truth["policy_loss"] + 0.3 * truth["kl"] - 0.01 * truth["entropy"]
        truth |= dict(clip_fraction=clipped[mask].double().mean(), ratio_mean=r[mask].mean(), ratio_max=r[mask].max())
        truth["approx_kl"] = (r - 1 - r.log())[mask].mean()
        for name, expected in truth.items():
            assert error(getattr(out, name), expected) <= VALUE_TOLERANCE[dtype], name
        assert error(x.grad, w * (slope + 0.3 * kl_slope(d))) <= GRADIENT_TOLERANCE[dtype]
        assert error(h.grad, -0.01 * w) <= GRADIENT_TOLERANCE[dtype]
        assert torch.all(x.grad[~mask] == 0) and torch.all(h.grad[~mask] == 0)
        assert not any(getattr(out, name).requires_grad for name in truth if name != "loss")

    @pytest.mark.parametrize("estimator", list(KL))
    def test_estimators(self, kernels, estimator):
        x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
        ref, mask = torch.randn(3, 9, dtype=torch.float64), torch.ones(3, 9, dtype=torch.bool)
        out = ppo_loss(x, x.detach(), x.detach() * 0, mask, ref_logprobs=ref, kl_coef=2.0, kl_estimator=estimator)
        out.loss.backward()
        value, slope = KL[estimator]
        d = x.detach() - ref
        assert error(out.loss, 2 * value(d).mean()) < 1e-12
        assert error(x.grad, 2 * slope(d) / 27) < 1e-12

    def test_log_ratios_are_clamped(self, kernels):
        """At +-1000 the loss stays finite, e^20 at most, and the gradient is 0; at +-19.9 it is not."""
        x = torch.tensor([[1000.0, -1000.0, 19.9, -19.9]], requires_grad=True)
        out = ppo_loss(
            x, torch.zeros(1, 4), -torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool),
            clip=(0.9, 0.2), ref_logprobs=torch.zeros(1, 4), kl_coef=1.0,
        )  # fmt: skip
        out.loss.backward()
        assert out.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-5)
        k3 = [math.exp(-d) - 1 + d for d in (20, -20, 19.9, -19.9)]
        policy = [math.exp(20), 0.1, math.exp(19.9), 0.1]
        assert out.loss.item() == pytest.approx(sum(policy + k3) / 4, rel=1e-5)
        assert x.grad[0, :2].tolist() == [0, 0]
        assert x.grad[0, 2:].tolist() == pytest.approx([math.exp(19.9) / 4, (1 - math.exp(19.9)) / 4], rel=1e-5)

    @pytest.mark.parametrize("distance", [1e-3, 0.1, 0.49])
    def test_policies_close_to_each_other(self, kernels, distance):
        """No log-ratio beyond 1/2, and in the first row, which then takes another way, a single one."""
        mask = ragged_mask(3, 300)
        old = -torch.rand(3, 300)
        x = old + distance * (2 * torch.rand(3, 300) - 1)
        x[0, 290] = old[0, 290] + 2.5
        mask[0, 290] = True
        advantages = torch.randn(3, 300)
        leaf = poisoned(x, mask).requires_grad_()
        out = ppo_loss(leaf, poisoned(old, mask), poisoned(advantages, mask), mask)
        out.loss.backward()
        value, slope, r, _ = ppo_truth(x, old, advantages, 0.2, 0.2, math.inf)
        d = x.double() - old.double()
        kl = (torch.expm1(d) - d)[mask].mean().item()
        assert error(out.loss, value[mask].mean()) < 1e-6
        assert error(leaf.grad, torch.where(mask, slope, 0.0) / mask.sum()) < 1e-7
        assert out.ratio_mean.item() == pytest.approx(r[mask].mean().item(), rel=1e-6)
        assert out.ratio_max.item() == pytest.approx(math.exp(2.5), rel=1e-6)
        assert out.approx_kl.item() == pytest.approx(kl, rel=1e-5)

    @pytest.mark.parametrize("where", range(3))
    @pytest.mark.parametrize("loss", [ppo_loss, ppo_value_loss])
    def test_nan_is_not_lost(self, kernels, loss, where):
        inputs = list(torch.randn(3, 2, 40) / 10)
        mask = torch.ones(2, 40, dtype=torch.bool)
        inputs[where][1, 7] = math.nan
        assert math.isnan(loss(*inputs, mask).loss.item())
        mask[1, 7] = False
        assert math.isfinite(loss(*inputs, mask).loss.item())

    def test_on_policy_is_reinforce(self, kernels):
        x = torch.randn(4, 9, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        advantages, mask = torch.randn(4, 9), ragged_mask(4, 9)
        ppo_loss(x, x.detach(), advantages, mask).loss.backward()
        reinforce_loss(y, advantages, mask).backward()
        assert error(x.grad, y.grad) < 1e-7

    @pytest.mark.parametrize("options", [{}, dict(dual_clip=1.5, reduction="sequence_mean", normalizer=3.0)])
    def test_gradcheck(self, kernels, options):
        torch.manual_seed(3)
        x, h, old, ref = torch.randn(4, 3, 5, dtype=torch.float64).mul(0.6).unbind()
        mask = torch.rand(3, 5) < 0.8
        advantages = torch.randn(3, 5, dtype=torch.float64)

        def loss(x, h):
            coefficients = dict(ref_logprobs=ref, kl_coef=0.2, entropy=h, entropy_coef=0.1)
            return ppo_loss(x, old, advantages, mask, **coefficients, **options).loss

        one_direction = kernels == "triton"  # of all, for its interpreter is slow
        assert torch.autograd.gradcheck(loss, (x.requires_grad_(), h.requires_grad_()), fast_mode=one_direction)

    def test_no_gradient_wanted(self, kernels):
        """Under no_grad, and where nothing asks for one, the loss is a constant; a constant advantage stays one."""
        x, mask = torch.randn(2, 5), torch.ones(2, 5, dtype=torch.bool)
        advantages = torch.randn(2, 5, requires_grad=True)
        assert not ppo_loss(x, x, advantages, mask).loss.requires_grad
        with torch.no_grad():
            assert not ppo_loss(x.clone().requires_grad_(), x, advantages, mask).loss.requires_grad
        entropy = torch.rand(2, 5, requires_grad=True)
        ppo_loss(x, x, advantages, mask, entropy=entropy, entropy_coef=0.5).loss.backward()
        assert error(entropy.grad, torch.full((2, 5), -0.05)) < 1e-7 and advantages.grad is None

    def test_upstream_gradient(self, kernels):
        x, mask = torch.randn(2, 5, requires_grad=True), torch.ones(2, 5, dtype=torch.bool)
        advantages = torch.randn(2)
        (one,) = torch.autograd.grad(ppo_loss(x, x.detach(), advantages, mask).loss, x)
        (three,) = torch.autograd.grad(3 * ppo_loss(x, x.detach(), advantages, mask).loss, x)
        assert error(three, 3 * one) < 1e-7


class TestValueLoss:
    def test_hand_computed(self, kernels):
        """old 0, clip 0.2. V = 1, R = 0: max(1, 0.04)/2. V = 1, R = 2: max(1, 3.24)/2, clipped. V = .1, R = 1: .81/2"""
        v = torch.tensor([[1.0, 1.0, 0.1, torch.nan]], requires_grad=True)
        returns = torch.tensor([[0.0, 2.0, 1.0, torch.nan]])
        mask = torch.tensor([[True, True, True, False]])
        out = ppo_value_loss(v, torch.zeros(1, 4), returns, mask, clip=0.2)
        out.loss.backward()
        assert out.loss.item() == pytest.approx((1 + 3.24 + 0.81) / 6, abs=1e-6)
        assert error(v.grad, torch.tensor([[1.0, 0.0, -0.9, 0.0]]) / 3) < 1e-6
        assert out.clip_fraction.item() == pytest.approx(1 / 3)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_float64(self, kernels, dtype):
        mask = ragged_mask(6, 51)
        v, old, R = (torch.randn(6, 51).to(dtype) for _ in range(3))
        x = poisoned(v, mask).requires_grad_()
        out = ppo_value_loss(x, poisoned(old, mask), poisoned(R, mask), mask, clip=0.3)
        out.loss.backward()
        v, old, R = v.double(), old.double(), R.double()
        inside = (v - old).abs() <= 0.3
        a, b = (v - R) ** 2, (old + (v - old).clamp(-0.3, 0.3) - R) ** 2
        n = mask.sum()
        assert error(out.loss, torch.maximum(a, b)[mask].sum() / 2 / n) <= VALUE_TOLERANCE[dtype]
        assert error(out.clip_fraction, (b > a)[mask & ~inside].sum().double() / n) <= VALUE_TOLERANCE[dtype]
        slope = torch.where(inside | (a > b), v - R, 0.0) * mask / n
        assert error(x.grad, slope) <= GRADIENT_TOLERANCE[dtype]

    def test_gradcheck(self, kernels):
        v, old, R = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
        mask = torch.rand(4, 5) < 0.8
        assert torch.autograd.gradcheck(lambda v: ppo_value_loss(v, old, R, mask).loss, v.requires_grad_())

    def test_without_clipping(self, kernels):
        v, old, R = torch.randn(3, 4, 5).unbind()
        mask = torch.ones(4, 5, dtype=torch.bool)
        out = ppo_value_loss(v, old, R, mask, clip=math.inf)
        assert error(out.loss, (v - R).square().mean() / 2) < 1e-6 and out.clip_fraction == 0


class TestReinforce:
    def test_remax_algorithm_one(self, kernels):
        """ReMax, Algorithm 1: -(log_probs.sum(-1) * rewards).mean()."""
        logprobs, rewards = torch.randn(4, 6, requires_grad=True), torch.randn(4)
        loss = reinforce_loss(logprobs, rewards, torch.ones(4, 6, dtype=torch.bool), reduction="sequence_sum")
        loss.backward()
        assert error(loss, -(logprobs.detach().double().sum(-1) * rewards).mean()) < 1e-6
        assert error(logprobs.grad, (-rewards / 4)[:, None].expand(4, 6)) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("per_token", [True, False])
    def test_matches_float64(self, kernels, dtype, reduction, per_token):
        mask = ragged_mask(6, 51)
        logprobs, advantages = torch.randn(6, 51).to(dtype), torch.randn((6, 51) if per_token else 6).to(dtype)
        normalizer = 40.0 if reduction == "constant" else None
        x = poisoned(logprobs, mask).requires_grad_()
        junk = poisoned(advantages, mask) if per_token else advantages
        loss = reinforce_loss(x, junk, mask, reduction=reduction, normalizer=normalizer)
        loss.backward()
        A = advantages.double() if per_token else advantages.double()[:, None]
        w = weights(mask, reduction, normalizer)
        assert error(loss, -(w * A * logprobs.double()).sum()) <= VALUE_TOLERANCE[dtype]
        assert error(x.grad, -w * A) <= GRADIENT_TOLERANCE[dtype]

    def test_gradcheck(self, kernels):
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        advantages, mask = torch.randn(3, dtype=torch.float64), torch.rand(3, 5) < 0.7
        assert torch.autograd.gradcheck(lambda x: reinforce_loss(x, advantages, mask, reduction="sequence_mean"), x)


LOSSES = {
    "ppo": lambda x, mask, **o: ppo_loss(x, x.detach() * 0.9, x.detach().sin(), mask, **o).loss,
    "reinforce": lambda x, mask, **o: reinforce_loss(x, x.detach().sin(), mask, **o),
    "value": lambda x, mask, **o: ppo_value_loss(x, x.detach() * 0.5, x.detach().cos(), mask, **o).loss,
}


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up(kernels, name, as_tensor):
    """With the global number of tokens as normalizer, micro-batches sum to the whole batch, gradients too."""
    x, mask = torch.randn(8, 21), ragged_mask(8, 21)
    normalizer = mask.sum() if as_tensor else mask.sum().item()
    whole = x.clone().requires_grad_()
    loss = LOSSES[name](whole, mask)
    loss.backward()
    parts = x.clone().requires_grad_()
    total = sum(LOSSES[name](parts[rows], mask[rows], normalizer=normalizer) for rows in (slice(0, 3), slice(3, 8)))
    total.backward()
    assert error(total, loss.detach()) < 1e-6 and error(parts.grad, whole.grad) < 1e-6


@pytest.mark.parametrize("reduction", ["sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_micro_batches_of_sequences_add_up(kernels, name, reduction):
    x, mask = torch.randn(8, 21), ragged_mask(8, 21)
    whole = LOSSES[name](x, mask, reduction=reduction)
    parts = [LOSSES[name](x[i : i + 2], mask[i : i + 2], reduction=reduction, normalizer=8) for i in range(0, 8, 2)]
    assert error(sum(parts), whole) < 1e-6


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_nothing_counts(kernels, name, shape):
    x = torch.full(shape, torch.nan, requires_grad=True)
    loss = LOSSES[name](x, torch.zeros(shape, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.all(x.grad == 0)
    nowhere = torch.zeros((), dtype=torch.int64)  # nor in the other micro-batches
    assert LOSSES[name](x, torch.zeros(shape, dtype=torch.bool), normalizer=nowhere).item() == 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_strides(kernels, name):
    base = torch.randn(9, 10)
    for view in (base.t(), base[::2, ::3], base[:1].expand(4, 10)):
        mask = torch.rand(view.shape[::-1]).t() < 0.7
        x, y = view.detach().requires_grad_(), view.contiguous().requires_grad_()
        a, b = LOSSES[name](x, mask), LOSSES[name](y, mask.contiguous())
        assert error(a, b.detach()) < 1e-6
        a.backward()
        b.backward()
        assert error(x.grad, y.grad) < 1e-7


@given(scale=st.floats(-3, 3))
def test_loss_is_linear_in_the_advantage(scale):
    x, advantages, mask = (
        torch.randn(3, 7, dtype=torch.float64),
        torch.randn(3, 7, dtype=torch.float64),
        ragged_mask(3, 7),
    )
    assert error(reinforce_loss(x, advantages * scale, mask), scale * reinforce_loss(x, advantages, mask)) < 1e-12


x, mask, per_row = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo_loss(x, x[:1], x, mask), r"old_logprobs: expected shape \[2, 3\] as logprobs, got \[1, 3\]"),
        (lambda: ppo_loss(x, x, x[:, :2], mask), r"advantages: expected shape \[2, 3\] as logprobs, got \[2, 2\]"),
        (lambda: ppo_loss(x, x, x[0], mask), r"advantages: expected shape \[2\], one per row of logprobs, got \[3\]"),
        (lambda: ppo_loss(x, x, x, mask, ref_logprobs=x[0]), r"ref_logprobs: expected shape \[2, 3\]"),
        (lambda: ppo_loss(x, x, x, mask, entropy=x.long()), "entropy: expected dtype .* got torch.int64"),
        (lambda: ppo_loss(x, x, x, mask.byte()), "mask: expected a bool tensor .* got torch.uint8"),
        (lambda: ppo_loss(x, x, x, mask[0]), r"mask: expected shape \[2, 3\] as logprobs, got \[3\]"),
        (lambda: ppo_loss(x[0], x[0], x[0], mask[0]), r"logprobs: expected shape \[B, T\], got \[3\]"),
        (lambda: ppo_loss(x, x, x.to("meta"), mask), "advantages: expected device cpu as logprobs, got meta"),
        (lambda: ppo_loss(x, x, x, mask, clip=-0.1), "clip: expected bounds 0 <= low < 1 and high >= 0, got -0.1"),
        (lambda: ppo_loss(x, x, x, mask, clip=(1.0, 0.2)), r"clip: expected bounds .* got \(1.0, 0.2\)"),
        (lambda: ppo_loss(x, x, x, mask, dual_clip=1.0), "dual_clip: expected a number > 1 or None, got 1.0"),
        (lambda: ppo_loss(x, x, x, mask, kl_coef=0.1), "ref_logprobs: expected a tensor, as kl_coef is not 0"),
        (lambda: ppo_loss(x, x, x, mask, entropy_coef=0.1), "entropy: expected a tensor, as entropy_coef is not 0"),
        (lambda: ppo_loss(x, x, x, mask, kl_estimator="k4"), "kl_estimator: expected one of k1, k2, k3, abs, got 'k4'"),
        (lambda: ppo_loss(x, x, x, mask, reduction="mean"), "reduction: expected one of token_mean, .* got 'mean'"),
        (lambda: ppo_loss(x, x, x, mask, reduction="constant"), "normalizer: expected a number, as reduction is"),
        (lambda: ppo_loss(x, x, x, mask, normalizer=0), "normalizer: expected a finite number > 0, got 0"),
        (lambda: ppo_loss(x, x, x, mask, normalizer=per_row), r"normalizer: .* 0-dim tensor, got shape \[2\]"),
        (lambda: ppo_value_loss(x, x, x[:1], mask), r"returns: expected shape \[2, 3\] as values, got \[1, 3\]"),
        (lambda: ppo_value_loss(x, x, x, mask, clip=0.0), "clip: expected a number > 0, got 0.0"),
        (lambda: ppo_value_loss(x, x, x, x), "mask: expected a bool tensor"),
        (lambda: ppo_value_loss(x, x, x, mask, normalizer=-1), "normalizer: expected a finite number > 0, got -1"),
        (lambda: reinforce_loss(x, per_row[:1], mask), r"advantages: expected shape \[2\], .* got \[1\]"),
        (lambda: reinforce_loss(x, x, mask, reduction="sum"), "reduction: expected one of"),
        (lambda: reinforce_loss(x, x.long(), mask), "advantages: expected dtype .* got torch.int64"),
        (lambda: reinforce_loss(x, 1.0, mask), "advantages: expected a tensor, got float"),
    ],
)
def test_errors(kernels, call, message):
    with pytest.raises(ValueError, match=message):
        call()
