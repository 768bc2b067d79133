"""Weights for a sampler whose log-probs are not training's: by hand, in the clipped loss, exactly on a tree."""

import itertools
import math

import pytest
import torch

from rlhf_fast.ops import ppo_loss
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.online import Experience
from rlhf_fast.training.mismatch import Correction, weights
from rlhf_fast.training.stopped import Diverged
from rlhf_fast.training.tally import Tally

RATIOS = torch.tensor([[0.4, 1.0, 3.0], [1.5, 1.2, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
SAMPLED = torch.full((2, 3), -2.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[0.4, 1.0, 2.0], [1.5, 1.2, 0.0]]),
        ("token_mask", [[0.0, 1.0, 0.0], [1.5, 1.2, 0.0]]),
        ("sequence_truncate", [[1.2, 1.2, 1.2], [1.8, 1.8, 0.0]]),
        ("sequence_mask", [[1.2, 1.2, 1.2], [1.8, 1.8, 0.0]]),
    ],
)
def test_weights_by_hand(mode, expected):
    found = weights(SAMPLED + RATIOS.log(), SAMPLED, MASK, mode, 2.0)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    assert found.dtype == torch.float32
    tight = weights(SAMPLED + RATIOS.log(), SAMPLED, MASK, mode, 1.5)
    if mode.startswith("sequence"):
        second = {"sequence_truncate": 1.5, "sequence_mask": 0.0}[mode]
        torch.testing.assert_close(tight, torch.tensor([[1.2] * 3, [second, second, 0.0]]), atol=1e-6, rtol=0)


def test_no_weights_and_ratios_beyond_all_numbers():
    assert weights(SAMPLED, SAMPLED, MASK, "none", 2.0) is None
    far = SAMPLED + torch.tensor([[900.0, 900.0, 0.0], [-900.0, 0.0, 0.0]])
    assert weights(far, SAMPLED, MASK, "sequence_truncate", 2.0).tolist() == [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    assert weights(far, SAMPLED, MASK, "sequence_mask", 2.0).sum() == 0


def rollout(logprobs, sampled, mask) -> Rollout:
    ids = torch.zeros_like(mask, dtype=torch.long)
    done = torch.ones(len(mask), dtype=torch.bool)
    return Rollout(ids[:, :1], mask[:, :1], ids, mask, logprobs, torch.zeros_like(logprobs), done, None, sampled)


def test_metrics_by_hand_and_the_stop():
    tally, correction = Tally(), Correction("token_truncate", 2.0, 1.0)
    found = rollout(SAMPLED + RATIOS.log(), SAMPLED, MASK)
    used = correction.weights(found)
    correction.note(tally, found, used)
    metrics = correction.describe(tally.read())
    ratios = RATIOS[MASK]
    assert metrics["mismatch/mean"] == pytest.approx(float(ratios.log().abs().mean()))
    assert metrics["mismatch/max"] == pytest.approx(math.log(3))
    assert metrics["mismatch/kl"] == pytest.approx(float((ratios - 1 - ratios.log()).mean()))
    assert metrics["mismatch/ess"] == pytest.approx(float(ratios.sum() ** 2 / (5 * ratios.square().sum())))
    assert metrics["mismatch/cut"] == pytest.approx(1 / 5)
    assert metrics.keys() == {f"mismatch/{name}" for name in ("mean", "max", "kl", "ess", "cut")}
    correction.check(metrics)
    with pytest.raises(Diverged, match="differ by 0.521 nats a token, more than max_mismatch=0.5"):
        correction._replace(bound=0.5).check(metrics)
    with pytest.raises(Diverged, match="differ by nan"):
        correction.check({"mismatch/mean": math.nan})


def test_our_own_decoding_has_no_mismatch():
    tally, correction = Tally(), Correction("none", 2.0, 1.0)
    local = rollout(SAMPLED, None, MASK)
    correction.note(tally, local, None)
    assert tally.read() == {} and correction.weights(local) is None


def test_a_weighed_advantage_is_a_weighed_clipped_loss():
    g = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(4, 6, generator=g, dtype=torch.float64) * 0.3 for _ in range(3))
    mask = torch.rand(4, 6, generator=g) < 0.8
    w = torch.rand(4, 6, generator=g, dtype=torch.float64) + 0.1
    experience = Experience(*[None] * 5, weights=w)  # pyright: ignore[reportArgumentType]
    leaf = new.clone().requires_grad_()
    out = ppo_loss(leaf, old, experience.weighed(advantages), mask, clip=0.2)
    out.loss.backward()
    other = new.clone().requires_grad_()
    ratio = (other - old).exp()
    each = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    loss = (w * each)[mask].mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(leaf.grad, other.grad)
    plain = ppo_loss(new, old, advantages, mask, clip=0.2)
    assert out.clip_fraction == plain.clip_fraction and out.approx_kl == plain.approx_kl
    per_row = torch.randn(4, generator=g, dtype=torch.float64)
    assert torch.equal(experience.weighed(per_row), per_row[:, None] * w)


@pytest.mark.parametrize("mode", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_bias_of_the_gradient_on_a_tree(mode):
    """E_mu[sum_t w_t grad log pi(y_t) R(y)] over all 27 completions of three tokens, beside the gradient of E_pi[R]."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1 + 3 + 9, 3, generator=g, dtype=torch.float64, requires_grad=True)
    moved = (logits + 0.15 * torch.randn(logits.shape, generator=g, dtype=torch.float64)).detach()
    paths = list(itertools.product(range(3), repeat=3))
    nodes = torch.tensor([[0, 1 + a, 4 + 3 * a + b] for a, b, _ in paths])
    tokens, rewards = torch.tensor(paths), torch.randn(27, generator=g, dtype=torch.float64)

    def taken(z):
        return z.log_softmax(-1)[nodes].gather(2, tokens[..., None])[..., 0]

    pi, mu = taken(logits), taken(moved)
    (true,) = torch.autograd.grad((pi.sum(1).exp() * rewards).sum(), logits, retain_graph=True)

    def bias(cap):
        w = weights(pi, mu, torch.ones(27, 3, dtype=torch.bool), mode, cap)
        w = torch.ones(27, 3) if w is None else w
        (found,) = torch.autograd.grad(
            (mu.sum(1).exp()[:, None] * w.double() * pi * rewards[:, None]).sum(), logits, retain_graph=True
        )
        return float((found - true).norm() / true.norm())

    wide = bias(1e6)
    if mode == "none":
        assert wide > 0.08
    elif mode.startswith("sequence"):
        assert wide < 1e-6  # exact importance weights
    else:  # tokens before and after are still the sampler's
        assert 1e-3 < wide < 0.9 * bias_without(pi, mu, rewards, true, logits)
    if mode.endswith("truncate"):
        assert bias(1.05) > wide


def bias_without(pi, mu, rewards, true, logits) -> float:
    (found,) = torch.autograd.grad((mu.sum(1).exp()[:, None] * pi * rewards[:, None]).sum(), logits, retain_graph=True)
    return float((found - true).norm() / true.norm())
