"""Losses of pairs without a reference, bco_pair and sft, and mixtures of several losses, against float64 formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import dpo_loss, linear_dpo_loss, linear_token_logprobs
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error

S = F.logsigmoid
NEW = ["bco_pair", "sft", "cpo", "simpo", "orpo"]


def plain(name, chosen, rejected, refs, lengths, beta, smoothing=0.0, gamma=0.5, alpha=1.0):
    """The losses as TRL's trainers write them, in float64: (losses, chosen rewards, rejected rewards)."""
    c, r = chosen - refs[0], rejected - refs[1]
    W, L = chosen / lengths[0], rejected / lengths[1]
    sft = -chosen / lengths[0].mean()
    rewards = c, r
    if name == "sigmoid":
        loss = -S(beta * (c - r)) * (1 - smoothing) - S(-beta * (c - r)) * smoothing
    elif name == "bco_pair":
        loss = -S(beta * c) - S(-beta * r)
    elif name == "sft":
        loss, rewards = sft, (chosen, rejected)
    elif name == "cpo":
        h = beta * (chosen - rejected)
        loss, rewards = -S(h) * (1 - smoothing) - S(-h) * smoothing + alpha * sft, (chosen, rejected)
    elif name == "simpo":
        h = beta * (W - L - gamma / beta)
        loss, rewards = -S(h) * (1 - smoothing) - S(-h) * smoothing, (W, L)
    else:
        odds = (W - L) - (torch.log1p(-W.exp()) - torch.log1p(-L.exp()))
        loss, rewards = sft - beta * S(odds), (W, L)
    return loss, beta * rewards[0], beta * rewards[1]


def pairs(B, dtype=torch.float32):
    logps = [(-torch.rand(B) * 20 - 0.5).to(dtype) for _ in range(4)]
    return logps, [torch.randint(1, 9, (B,)) for _ in range(2)]


def named(logps, lengths):
    return dict(
        zip(("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), logps, strict=True),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )


MIXTURES = {
    "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "cpo-simpo": dict(loss_type=["simpo", "sft"], simpo_gamma=1.5),
    "cpo without likelihood": dict(loss_type="cpo", cpo_alpha=0.0, label_smoothing=0.1),
    "two likelihoods": dict(loss_type=["orpo", "cpo"], loss_weights=[0.5, 2.0], cpo_alpha=0.3),
    **{name: dict(loss_type=name) for name in NEW},
}


def truth(options, logps, lengths, beta):
    names, weights = options["loss_type"], options.get("loss_weights")
    names = [names] if isinstance(names, str) else names
    smoothing, gamma = options.get("label_smoothing", 0.0), options.get("simpo_gamma", 0.5)
    made = [
        plain(name, *logps[:2], logps[2:], lengths, beta, smoothing, gamma, options.get("cpo_alpha", 1.0))
        for name in names
    ]
    total = sum(weight * losses for weight, (losses, _, _) in zip(weights or [1.0] * len(names), made, strict=True))
    return total, made[0][1].detach(), made[0][2].detach()


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(kernels, name, dtype):
    logps, lengths = pairs(19, dtype)
    leaves = [x.clone().requires_grad_() for x in logps[:2]]
    out = dpo_loss(**named([*leaves, *logps[2:]], lengths), beta=0.3, **MIXTURES[name])
    upstream = torch.rand(19)
    (out.losses * upstream).sum().backward()
    wide = [x.double().requires_grad_() for x in logps]
    losses, *rewards = truth(MIXTURES[name], wide, [x.double() for x in lengths], 0.3)
    grads = torch.autograd.grad((losses * upstream).sum(), wide[:2], allow_unused=True)
    assert error(out.losses, losses.detach()) <= VALUE_TOLERANCE[dtype]
    for got, expected in zip(out[1:], rewards, strict=True):
        assert error(got, expected) <= VALUE_TOLERANCE[dtype]
    for leaf, grad in zip(leaves, grads, strict=True):
        got, expected = (torch.zeros(19) if x is None else x for x in (leaf.grad, grad))
        assert error(got, expected) <= 2 * GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("logp", [-1e-9, -1e-6, -0.5, -900.0])
def test_extreme_answers_stay_finite(kernels, name, logp):
    """A certain chosen or rejected answer, and one of no probability to speak of."""
    for chosen, rejected in ((logp, -2.0), (-2.0, logp), (logp, logp)):
        c, r = (torch.tensor([x], requires_grad=True) for x in (chosen, rejected))
        zero, one = torch.zeros(1), torch.ones(1)
        losses = dpo_loss(**named([c, r, zero, zero], [one, one]), beta=0.5, loss_type=name).losses
        losses.sum().backward()
        assert all(torch.isfinite(x).all() for x in (losses, c.grad, r.grad if r.grad is not None else one))


def test_orpo_by_hand(kernels):
    """Average log-probs log 0.8 and log 0.5: odds 4 and 1, so -log sigmoid(log 4) = log 1.25."""
    c, r = torch.tensor([2 * math.log(0.8)]), torch.tensor([3 * math.log(0.5)])
    out = dpo_loss(
        c, r, beta=0.1, loss_type="orpo", chosen_lengths=torch.tensor([2]), rejected_lengths=torch.tensor([3])
    )
    assert out.losses.item() == pytest.approx(-math.log(0.8) + 0.1 * math.log(1.25), abs=1e-6)
    assert out.chosen_rewards.item() == pytest.approx(0.1 * math.log(0.8), abs=1e-6)


def test_micro_batches_add_up(kernels):
    """The likelihood's denominator is that of the whole batch."""
    logps, lengths = pairs(8)
    options = dict(loss_type=["sigmoid", "sft"], mean_chosen_length=lengths[0].double().mean())
    whole = dpo_loss(**named(logps, lengths), **options).losses
    halves = [
        dpo_loss(**named([x[h] for x in logps], [x[h] for x in lengths]), **options).losses
        for h in (slice(0, 3), slice(3, 8))
    ]
    assert error(torch.cat(halves), whole) < 1e-6
    sft = dpo_loss(**named(logps, lengths), loss_type="sft").losses.mean()
    assert sft.item() == pytest.approx(-(logps[0].sum() / lengths[0].sum()).item(), rel=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_from_hidden_states(name):
    """The fused head counts the tokens itself, and gives loss and gradients of log-probs that are computed first."""
    B, T, H, V = 3, 11, 5, 30
    ids = torch.randint(V, (2 * B, T)).masked_fill(torch.rand(2 * B, T) < 0.3, -100)
    hidden, weight = torch.randn(2 * B, T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    refs = [-torch.rand(B, dtype=torch.float64) * 9 for _ in range(2)]
    lengths = (ids != -100).sum(1).chunk(2)
    chosen, rejected = linear_token_logprobs(*leaves, ids).logprobs.sum(1).chunk(2)
    options = dict(beta=0.4, **MIXTURES[name])
    expected = dpo_loss(**named([chosen, rejected, *refs], lengths), **options)
    truth = torch.autograd.grad(expected.losses.mean(), leaves)
    for budget in (None, 1):
        out = linear_dpo_loss(*leaves, ids, *refs, memory_budget=budget, **options)
        assert error(out.losses, expected.losses.detach()) < 1e-12
        assert error(out.chosen_rewards, expected.chosen_rewards) < 1e-12
        got = torch.autograd.grad(out.loss, leaves)
        assert max(error(a, b) for a, b in zip(got, truth, strict=True)) < 1e-12


def test_compiles():
    def step(chosen, rejected, lengths):
        options = dict(loss_type=("simpo", "sft"), loss_weights=(1.0, 0.5))
        return dpo_loss(chosen, rejected, chosen_lengths=lengths, rejected_lengths=lengths, **options).losses.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        c, r = (-torch.arange(1.0, 5.0).view(2, 2).exp()).unbind()
        c = c.requires_grad_()
        loss = function(c, r, torch.tensor([3, 4]))
        loss.backward()
        results.append((loss.detach(), c.grad))
    torch.testing.assert_close(*results)


b = torch.full((2,), -1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type=[]), r"loss_type: expected a name, or several, got \[\]"),
        (dict(loss_type=["sft", "sft"]), r"loss_type: expected each name once, got \['sft', 'sft'\]"),
        (dict(loss_type="aot"), "loss_type: expected one of sigmoid, .* orpo, got 'aot'"),
        (
            dict(loss_type=["cpo", "sft"], loss_weights=[1.0]),
            r"loss_weights: expected a finite number for each of 2 losses",
        ),
        (dict(loss_type="cpo", loss_weights=[math.nan]), "loss_weights: expected a finite number for each of 1 losses"),
        (dict(loss_type="simpo"), "chosen_lengths: expected a tensor, as simpo divides by it, got None"),
        (dict(loss_type="orpo", mean_chosen_length=3.0), "chosen_lengths: expected a tensor, as orpo divides by it"),
        (dict(loss_type="sft"), "mean_chosen_length: expected a number, or chosen_lengths, as sft divides by it"),
        (dict(loss_type="sft", mean_chosen_length=0.0), "mean_chosen_length: expected a finite number > 0, got 0.0"),
        (
            dict(loss_type=["cpo", "bco_pair"], mean_chosen_length=2.0),
            "ref_chosen_logps: expected a tensor, as reference",
        ),
        (dict(loss_type="bco_pair", label_smoothing=0.1), "label_smoothing: expected 0, as bco_pair has none, got 0.1"),
        (dict(loss_type="simpo", simpo_gamma=math.inf), "simpo_gamma: expected a finite number, got inf"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(b, b, **options)
