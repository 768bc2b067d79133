"""KTO against its formula in plain Python, worked cases, and what it shares with DPO's relatives."""

import math

import pytest
import torch

from rlhf_fast import dpo_loss, kto_loss, linear_kto_loss
from tests.support.oracle import VALUE_TOLERANCE, error

LOSS_TYPES = ("kto", "apo_zero_unpaired")


def s(x):
    return 1 / (1 + math.exp(-x))


def closed_form(gain, good, kl, beta, loss_type, weights):
    """The loss of one answer whose log-prob is ahead of the reference's by `gain`."""
    z = beta * max(kl, 0.0) if loss_type == "kto" else 0.0
    return weights[0] * (1 - s(beta * gain - z)) if good else weights[1] * (1 - s(z - beta * gain))


def test_worked_by_hand(kernels):
    """beta 0.5, KL 2: z = 1. A gain of 4 is a reward of 2; of -2, one of -1."""
    logps, ref = torch.tensor([-10.0, -10.0, -12.0, -12.0]), torch.tensor([-14.0, -14.0, -10.0, -10.0])
    labels = torch.tensor([True, False, True, False])
    out = kto_loss(logps, ref, labels, 2.0, beta=0.5)
    assert out.rewards.tolist() == [2.0, 2.0, -1.0, -1.0]
    # 1 - s(1), 1 - s(-1), 1 - s(-2), 1 - s(2)
    torch.testing.assert_close(out.losses, torch.tensor([0.26894142, 0.73105858, 0.88079708, 0.11920292]))
    weighted = kto_loss(logps, ref, labels, 2.0, beta=0.5, desirable_weight=0.5, undesirable_weight=3.0)
    torch.testing.assert_close(weighted.losses, out.losses * torch.tensor([0.5, 3.0, 0.5, 3.0]))


@pytest.mark.parametrize("dtype", VALUE_TOLERANCE)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kl", [0.7, -0.7, torch.tensor(1.5)])
def test_closed_forms(kernels, dtype, loss_type, kl):
    logps, ref = (torch.randn(19).mul(2).sub(20).to(dtype) for _ in range(2))
    labels, weights = torch.randn(19) > 0, (0.7, 1.3)
    out = kto_loss(logps, ref, labels, kl, beta=0.3, loss_type=loss_type, desirable_weight=0.7, undesirable_weight=1.3)
    gains = (logps.double() - ref.double()).tolist()
    truth = [
        closed_form(gain, good, float(kl), 0.3, loss_type, weights)
        for gain, good in zip(gains, labels.tolist(), strict=True)
    ]
    assert error(out.losses, torch.tensor(truth, dtype=torch.float64)) <= VALUE_TOLERANCE[dtype]
    assert error(out.rewards, 0.3 * torch.tensor(gains, dtype=torch.float64)) <= VALUE_TOLERANCE[dtype]
    assert out.losses.dtype == out.rewards.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(kernels, loss_type):
    logps = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref, labels = torch.randn(6, dtype=torch.float64), torch.arange(6) % 2 > 0
    kl = torch.tensor(0.8, dtype=torch.float64)
    options = dict(beta=0.5, loss_type=loss_type, desirable_weight=0.6, undesirable_weight=1.4)
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, ref, labels, kl, **options).losses, logps)


def test_the_gradient_in_float32_by_central_differences(kernels):
    logps, ref = torch.randn(7).requires_grad_(), torch.randn(7)
    labels = torch.arange(7) % 3 > 0
    kto_loss(logps, ref, labels, 0.5, beta=0.3, undesirable_weight=2.0).losses.sum().backward()
    step = 1e-6
    for i in range(7):
        at = [
            closed_form(logps[i].item() - ref[i].item() + d, labels[i].item(), 0.5, 0.3, "kto", (1.0, 2.0))
            for d in (step, -step)
        ]
        assert logps.grad[i].item() == pytest.approx((at[0] - at[1]) / 2 / step, abs=1e-6)


def test_a_good_and_a_bad_answer_are_apo_zero_of_the_pair(kernels):
    """With z = 0 the losses of a chosen and of a rejected answer add up to the paired loss."""
    chosen, rejected, ref = torch.randn(5), torch.randn(5), torch.randn(2, 5)
    pair = dpo_loss(chosen, rejected, *ref, beta=0.4, loss_type="apo_zero").losses
    labels = torch.arange(10) < 5
    both = kto_loss(torch.cat([chosen, rejected]), ref.flatten(), labels, None, beta=0.4, loss_type=LOSS_TYPES[1])
    torch.testing.assert_close(both.losses.view(2, 5).sum(0), pair)


@pytest.mark.parametrize("gain", [500.0, -500.0, 5000.0, -5000.0])
def test_huge_log_ratios(kernels, gain):
    logps = torch.tensor([gain, gain], requires_grad=True)
    losses = kto_loss(logps, torch.zeros(2), torch.tensor([True, False]), 3.0).losses
    losses.sum().backward()
    expected = [0.0, 1.0] if gain > 0 else [1.0, 0.0]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12) and torch.isfinite(logps.grad).all()


def test_gradients_flow_to_the_policy_only(kernels):
    logps, ref, kl = (torch.randn(4, requires_grad=True) for _ in range(3))
    labels = torch.tensor([True, False, True, False])
    out = kto_loss(logps, ref, labels, kl.abs().mean())
    out.losses.sum().backward()
    assert ref.grad is None and kl.grad is None and not out.rewards.requires_grad
    assert torch.equal(logps.grad < 0, labels)  # good answers gain


def test_empty_and_strided(kernels):
    empty = torch.empty(0, requires_grad=True)
    losses = kto_loss(empty, torch.empty(0), torch.empty(0, dtype=torch.bool), 0.1).losses
    losses.sum().backward()
    assert losses.shape == empty.grad.shape == (0,)
    both, labels = torch.randn(10, 2), torch.arange(20).view(10, 2) % 3 > 0
    strided = kto_loss(both[:, 0], both[:, 1], labels[:, 0], 0.1).losses
    assert torch.equal(strided, kto_loss(*both.t().contiguous(), labels[:, 0].contiguous(), 0.1).losses)


def test_micro_batches_add_up():
    """With the batch's KL and number of answers: an answer longer than a chunk, a row without one, and halves."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 50, 8, dtype=torch.float64, requires_grad=True), torch.randn(301, 8).double()
    ids, ref, labels = torch.randint(301, (4, 50)), torch.randn(4).double() - 280, torch.tensor([1, 0, 0, 1]).bool()
    ids[2], ids[0, 40:], kl = -100, -100, torch.tensor(1.2)
    whole = linear_kto_loss(hidden, weight, ids, ref, labels, kl)
    logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    logps = torch.where(ids >= 0, logprobs, 0.0).sum(1)
    exact = kto_loss(logps, ref, labels, kl)
    torch.testing.assert_close(whole.loss, exact.losses.mean())
    for mine, theirs in zip(whole[1:], (*exact, logps), strict=True):
        torch.testing.assert_close(mine, theirs.detach())
    parts = [
        linear_kto_loss(hidden[i], weight, ids[i], ref[i], labels[i], kl, normalizer=4.0, memory_budget=1).loss
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    gradients = (torch.autograd.grad(x, hidden)[0] for x in (sum(parts), whole.loss))
    first = next(gradients)
    torch.testing.assert_close(first, next(gradients))
    torch.testing.assert_close(first, torch.autograd.grad(exact.losses.mean(), hidden)[0])


b, good = torch.zeros(2), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type: expected one of kto, apo_zero_unpaired, got 'dpo'"),
        ({"beta": 0.0}, "beta: expected a finite number > 0, got 0.0"),
        ({"desirable_weight": -1.0}, "desirable_weight: expected a number >= 0, got -1.0"),
        ({"undesirable_weight": -0.5}, "undesirable_weight: expected a number >= 0, got -0.5"),
        ({"ref_logps": b[:1]}, r"ref_logps: expected shape \[2\] as logps, got \[1\]"),
        ({"labels": b}, r"labels: expected a bool tensor \(True = counts\), got torch.float32"),
        ({"labels": good[:1]}, r"labels: expected shape \[2\] as logps, got \[1\]"),
        ({"kl": None}, "kl: expected a number or a 0-dim tensor, as loss_type is kto, got None"),
        ({"kl": b}, r"kl: expected a number or a 0-dim tensor, got shape \[2\]"),
        ({"logps": b.long()}, "logps: expected dtype .* got torch.int64"),
        ({"logps": torch.zeros(2, 3), "ref_logps": torch.zeros(2, 3)}, r"logps: expected shape \[B\], got \[2, 3\]"),
    ],
)
def test_errors(kernels, change, message):
    arguments = dict(logps=b, ref_logps=b, labels=good, kl=0.1) | change
    with pytest.raises(ValueError, match=message):
        kto_loss(**arguments)
