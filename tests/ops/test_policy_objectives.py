"""PPO's relatives: GSPO, CISPO and SAPO, and the KL term by the ratio, against float64 formulas."""

import math

import pytest
import torch

from rlhf_fast import linear_ppo_loss, linear_token_logprobs, ppo_loss
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error, poisoned, ragged_mask


def plain(logprobs, old, advantages, mask, options):
    """The loss as TRL's GRPO trainer writes it, token by token, in float64; (loss, gradient, share of cut ratios)."""
    x, old = (torch.where(mask, t.double(), 0.0) for t in (logprobs, old))
    x.requires_grad_()
    A = torch.where(mask, advantages.double() if advantages.dim() == 2 else advantages.double()[:, None], 0.0)
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = x - old
    mean = (log_ratio * mask).sum(1, keepdim=True) / counts
    level = options.get("importance_sampling_level", "token")
    if level == "sequence":
        log_ratio = mean.expand_as(x)
    elif level == "sequence_token":
        log_ratio = mean.detach() + x - x.detach()
    r, objective = log_ratio.exp(), options["objective"]
    cut = torch.zeros_like(mask)
    if objective == "cispo":
        cut = r > options["clip"]
        loss = -r.clamp(max=options["clip"]).detach() * A * x
    elif objective == "sapo":
        pos, neg = options["sapo_temperature"]
        tau = torch.where(A > 0, pos, neg)
        loss = -torch.sigmoid(tau * (r - 1)) * 4 / tau * A
    else:
        low, high = options["clip"]
        loss = -torch.min(r * A, r.clamp(1 - low, 1 + high) * A)
        cut = (A > 0) & (r > 1 + high) | (A < 0) & (r < 1 - low)
    if "ref_logprobs" in options:
        d = x - torch.where(mask, options["ref_logprobs"].double(), 0.0)
        kl = {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d}[options["kl_estimator"]]
        loss = loss + options["kl_coef"] * kl * (r if options.get("use_bias_correction_kl") else 1)
    means = (loss * mask).sum(1) / counts.squeeze(1)
    total = {
        "token_mean": (loss * mask).sum() / mask.sum(),
        "sequence_mean": means.mean(),
        "sequence_sum": (loss * mask).sum(1).mean(),
        "constant": (loss * mask).sum() / options.get("normalizer", 1.0),
    }[options["reduction"]]
    (grad,) = torch.autograd.grad(total, x)
    return total.detach(), grad, (cut & mask).sum().double() / mask.sum()


SEQUENCE, EACH = dict(importance_sampling_level="sequence"), dict(importance_sampling_level="sequence_token")
CASES = {
    "gspo": dict(objective="clip", clip=(0.02, 0.03), reduction="sequence_mean", **SEQUENCE),
    "gspo, tokens": dict(objective="clip", clip=(0.2, 0.3), reduction="token_mean", **SEQUENCE),
    "gspo-token": dict(objective="clip", clip=(0.1, 0.1), reduction="sequence_mean", **EACH),
    "luspo": dict(objective="clip", clip=(0.1, 0.2), reduction="sequence_sum", **SEQUENCE),
    "cispo": dict(objective="cispo", clip=1.5, reduction="token_mean"),
    "cispo, sequence": dict(objective="cispo", clip=1.02, reduction="token_mean", **SEQUENCE),
    "sapo": dict(objective="sapo", sapo_temperature=(1.0, 1.05), reduction="sequence_mean"),
    "sapo, hot": dict(objective="sapo", sapo_temperature=(7.0, 0.5), reduction="token_mean", **EACH),
    "dr_grpo": dict(objective="clip", clip=(0.2, 0.28), reduction="constant", normalizer=7 * 64.0),
    "k1 by the ratio": dict(objective="clip", clip=(0.2, 0.2), reduction="token_mean", kl_estimator="k1")
    | dict(use_bias_correction_kl=True),
    "k3 by the ratio": dict(objective="cispo", clip=2.0, reduction="sequence_mean", kl_estimator="k3")
    | dict(use_bias_correction_kl=True),
}


@pytest.mark.parametrize("name", list(CASES))
def test_matches_float64(kernels, name):
    """Random inputs in float32 of two lengths, one longer than a kernel's block; junk at masked places."""
    options = dict(CASES[name])
    by_row = options.get("importance_sampling_level") == "sequence"
    for B, T in ((7, 21), (3, 600)):
        mask = ragged_mask(B, T)
        logprobs = -torch.rand(B, T) * 3
        old, ref = (logprobs + torch.randn(B, T) * 0.5 for _ in range(2))
        advantages = torch.randn(B) if by_row else torch.randn(B, T)
        if "kl_estimator" in options or name == "gspo":
            options |= dict(ref_logprobs=poisoned(ref, mask), kl_coef=0.3)
            options.setdefault("kl_estimator", "k2")
        leaf = poisoned(logprobs, mask).requires_grad_()
        junk = advantages if by_row else poisoned(advantages, mask)
        out = ppo_loss(leaf, poisoned(old, mask), junk, mask, **options)
        out.loss.backward()
        loss, grad, cut = plain(logprobs, old, advantages, mask, options)
        assert error(out.loss, loss) <= VALUE_TOLERANCE[torch.float32]
        assert error(leaf.grad, grad) <= GRADIENT_TOLERANCE[torch.float32]
        assert error(out.clip_fraction, cut) <= VALUE_TOLERANCE[torch.float32]
        assert torch.all(leaf.grad[~mask] == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_dtypes(kernels, dtype, objective):
    mask = ragged_mask(4, 9)
    logprobs, old = ((-torch.rand(4, 9)).to(dtype) for _ in range(2))
    advantages = torch.randn(4).to(dtype)
    options = dict(objective=objective, importance_sampling_level="sequence", reduction="token_mean")
    options |= {"clip": dict(clip=(0.1, 0.1)), "cispo": dict(clip=1.1), "sapo": dict(sapo_temperature=(2.0, 3.0))}[
        objective
    ]
    leaf = logprobs.clone().requires_grad_()
    out = ppo_loss(leaf, old, advantages, mask, **options)
    out.loss.backward()
    loss, grad, _ = plain(logprobs, old, advantages, mask, options)
    assert error(out.loss, loss) <= VALUE_TOLERANCE[dtype]
    assert error(leaf.grad, grad) <= GRADIENT_TOLERANCE[dtype]


def test_hand_computed(kernels):
    """Ratios 3/2 and 1/2 of a row have the sequence ratio sqrt(3/4)."""
    x, mask = torch.tensor([[1.5, 0.5]]).log().requires_grad_(), torch.ones(1, 2, dtype=torch.bool)
    old, one = torch.zeros(1, 2), torch.ones(1)
    s = math.sqrt(0.75)
    out = ppo_loss(x, old, one, mask, importance_sampling_level="sequence", clip=0.2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-s, rel=1e-6)
    assert x.grad[0].tolist() == pytest.approx([-s / 2] * 2, rel=1e-6)
    assert out.ratio_mean.item() == pytest.approx(s, rel=1e-6)
    cut = ppo_loss(x, old, -one, mask, importance_sampling_level="sequence", clip=0.1)
    assert cut.loss.item() == pytest.approx(0.9, rel=1e-6) and cut.clip_fraction == 1
    cispo = ppo_loss(x, old, one, mask, objective="cispo", clip=1.2)
    assert cispo.loss.item() == pytest.approx(-(1.2 * math.log(1.5) + 0.5 * math.log(0.5)) / 2, rel=1e-6)
    sapo = ppo_loss(x, old, torch.tensor([[1.0, -1.0]]), mask, objective="sapo", sapo_temperature=(1.0, 2.0))
    gates = 4 / (1 + math.exp(-0.5)), 2 / (1 + math.exp(1.0))
    assert sapo.loss.item() == pytest.approx((gates[1] - gates[0]) / 2, rel=1e-6)


def test_far_policies_stay_finite(kernels):
    """Log-ratios of +-1000: CISPO's weight is cut, SAPO's gate is shut or open, and neither has a gradient there."""
    x = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    old, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    cispo = ppo_loss(x, old, torch.ones(1), mask, objective="cispo")
    (grad,) = torch.autograd.grad(cispo.loss, x)
    assert cispo.loss.item() == pytest.approx(-(5 * 1000 - math.exp(-20) * 1000) / 2, rel=1e-5)
    assert grad[0].tolist() == pytest.approx([-2.5, -math.exp(-20) / 2], rel=1e-5)
    for a in (1.0, -1.0):
        sapo = ppo_loss(x, old, torch.full((1,), a), mask, objective="sapo", sapo_temperature=(80.0, 80.0))
        (grad,) = torch.autograd.grad(sapo.loss, x)
        assert sapo.loss.item() == pytest.approx(-a * 4 / 80 / 2, rel=1e-5) and grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("options", [dict(objective="cispo"), dict(objective="sapo")])
def test_nan_is_not_lost(kernels, options, where):
    inputs = list(torch.randn(3, 2, 40) / 10)
    mask = torch.ones(2, 40, dtype=torch.bool)
    inputs[where][1, 7] = math.nan
    assert math.isnan(ppo_loss(*inputs, mask, **options).loss.item())
    mask[1, 7] = False
    assert math.isfinite(ppo_loss(*inputs, mask, **options).loss.item())


@pytest.mark.parametrize("options", [dict(objective="sapo"), dict(objective="clip", use_bias_correction_kl=True)])
def test_gradcheck(kernels, options):
    x, old, ref = torch.randn(3, 2, 3, dtype=torch.float64).mul(0.6).unbind()
    mask, advantages = torch.rand(2, 3) < 0.8, torch.randn(2, 3, dtype=torch.float64)
    loss = lambda x: ppo_loss(x, old, advantages, mask, ref_logprobs=ref, kl_coef=0.2, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", ["gspo", "gspo-token", "cispo, sequence", "cispo", "sapo", "k3 by the ratio"])
@pytest.mark.parametrize("budget", [None, 1])
def test_from_hidden_states(name, budget):
    """The fused head gives the loss and gradients of log-probs computed first, in chunks smaller than a row too."""
    options = dict(CASES[name])
    B, T, H, V = 5, 37, 6, 40
    mask, ids = ragged_mask(B, T), torch.randint(V, (B, T))
    hidden, weight = torch.randn(B, T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    bias = torch.randn(V, dtype=torch.float64)
    by_row = options.get("importance_sampling_level") == "sequence"
    advantages = torch.randn(B) if by_row else torch.randn(B, T)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    h, w, b = leaves
    logprobs = linear_token_logprobs(h, w, ids.masked_fill(~mask, -100), bias=b).logprobs
    old = logprobs.detach() + torch.randn(B, T) * 0.3
    options |= dict(ref_logprobs=old - 0.1, kl_coef=0.2)
    plain = ppo_loss(logprobs, old, advantages.double(), mask, **options)
    truth = torch.autograd.grad(plain.loss, leaves)
    out = linear_ppo_loss(h, w, ids, old, advantages, mask, bias=b, memory_budget=budget, **options)
    got = torch.autograd.grad(out.loss, leaves)
    assert error(out.loss, plain.loss.detach()) < 1e-12 and error(out.ratio_max, plain.ratio_max) < 1e-12
    assert max(error(a, b) for a, b in zip(got, truth, strict=True)) < 1e-12


x, mask, per_row = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(objective="gspo"), "objective: expected one of clip, cispo, sapo, got 'gspo'"),
        (dict(importance_sampling_level="row"), "importance_sampling_level: expected one of token, sequence, seq"),
        (dict(importance_sampling_level="sequence"), r"advantages: expected shape \[B\] at .* got \[2, 3\]"),
        (dict(objective="sapo", clip=0.2), "clip: expected None, as sapo has no bounds, got 0.2"),
        (dict(objective="cispo", clip=(0.2, 0.3)), r"clip: expected one number for cispo, .* got \(0.2, 0.3\)"),
        (dict(objective="cispo", clip=0.0), "clip: expected a number > 0 for cispo, the largest ratio, got 0.0"),
        (dict(objective="cispo", dual_clip=2.0), "dual_clip: expected None, as cispo has none, got 2.0"),
        (dict(objective="sapo", sapo_temperature=1.0), "sapo_temperature: expected two numbers, .* got 1.0"),
        (
            dict(objective="sapo", sapo_temperature=(1.0, 0.0)),
            r"sapo_temperature: expected numbers in \(0, 80\], got 0",
        ),
        (dict(use_bias_correction_kl=1), "use_bias_correction_kl: expected True or False, got 1"),
        (
            dict(use_bias_correction_kl=True, importance_sampling_level="sequence_token"),
            'use_bias_correction_kl: expected False at another importance_sampling_level than "token", got True',
        ),
    ],
)
def test_errors(options, message):
    for call in (
        lambda: ppo_loss(x, x, x, mask, **options),
        lambda: linear_ppo_loss(torch.zeros(2, 3, 4), torch.zeros(5, 4), x.long(), x, x, mask, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()
