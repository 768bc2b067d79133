"""The linear bandit against closed forms, brute force and a plain loop over seeds."""

import math

import pytest
import torch

from rlhf_fast.lab.bandit import exact, experiment, linear
from rlhf_fast.lab.bandit.config import LinearBanditConfig
from rlhf_fast.lab.bandit.problem import (
    TRUE_THETA,
    differences,
    draw,
    features,
    optimality_gap,
    policy,
    quadrature,
    sampled_gaps,
    true_rewards,
)

SEEDS = range(2021, 2027)
BETA = 0.01
# E_s[max_a r(s, a)] in closed form: action 3 is best while tan(pi s) < 2, action 0 from there on.
BEST_REWARD = (2.5 + 1.5 * 5**0.5) / math.pi


def equal_weights(size):
    return torch.full((size,), 1 / size, dtype=torch.float64)


def config(**values):
    return LinearBanditConfig(out="unused", seeds=len(SEEDS), ratios=[0.5, 2.0], sizes=[], **values)


def test_features_and_rewards_by_hand():
    states = torch.tensor([0.0, 0.5], dtype=torch.float64)
    cosine, sine = [[1, 0], [2, 0], [3, 0], [4, 0]], [[0, 1], [0, 1 / 2], [0, 1 / 3], [0, 1 / 4]]
    expected = torch.tensor([cosine, sine], dtype=torch.float64)
    torch.testing.assert_close(features(states), expected, atol=1e-15, rtol=0)
    torch.testing.assert_close(features(states, "mismatched"), expected.flip(0), atol=1e-15, rtol=0)
    by_hand = torch.tensor([[1.0, 2, 3, 4], [2, 1, 2 / 3, 1 / 2]], dtype=torch.float64)
    torch.testing.assert_close(true_rewards(states), by_hand, atol=1e-15, rtol=0)


def test_quadrature():
    nodes, weights = quadrature()
    assert weights.sum().item() == pytest.approx(1, abs=1e-13)
    assert ((torch.pi * nodes).sin() @ weights).item() == pytest.approx(2 / math.pi, abs=1e-13)
    assert (nodes.diff() > 0).all()
    # 1.8634 is the published problem's exact best reward.
    assert pytest.approx(1.8634, abs=5e-5) == BEST_REWARD
    nodes, weights = quadrature(512)
    assert (true_rewards(nodes).amax(-1) @ weights).item() == pytest.approx(BEST_REWARD, abs=1e-7)


def test_gap_of_known_policies():
    uniform = torch.zeros(2, dtype=torch.float64)
    # E_s of the mean over actions: cos integrates to 0, sin to 2 / pi, and the mean of 2/(a+1) is 25/24.
    assert optimality_gap(uniform, "matched").item() == pytest.approx(BEST_REWARD - 25 / (12 * math.pi), abs=1e-6)
    assert optimality_gap(1e6 * torch.tensor(TRUE_THETA).double(), "matched").item() == pytest.approx(0, abs=1e-6)


def test_preferences_follow_bradley_terry():
    draws = draw(range(400), 50, 0)
    assert (draws.winners != draws.losers).all()
    rewards = true_rewards(draws.states)
    margin = (rewards.gather(-1, draws.winners[..., None]) - rewards.gather(-1, draws.losers[..., None]))[..., 0]
    # E[sign] and its variance follow from the absolute margin alone.
    p = torch.sigmoid(margin.abs())
    z = ((margin > 0).double() - p).sum() / (p * (1 - p)).sum().sqrt()
    assert abs(z.item()) < 3
    pairs = torch.bincount((draws.winners * 4 + draws.losers).flatten(), minlength=16).view(4, 4)
    counts = (pairs + pairs.T)[torch.triu_indices(4, 4, 1).unbind()].double()
    assert ((counts - 20000 / 6).abs() < 4 * (20000 * 5 / 36) ** 0.5).all()


def test_draws_are_nested_and_a_seeds_own():
    small, large = draw([7], 5, 3), draw([6, 7], 9, 20)
    for name in ("states", "winners", "losers"):
        assert torch.equal(getattr(small, name)[0], getattr(large, name)[1, :5])
    assert torch.equal(small.new_states[0], large.new_states[1, :3])
    assert torch.equal(small.initial[0], large.initial[1])
    assert ((large.initial >= 0) & (large.initial < 1)).all()


def test_fit_is_the_maximum_of_the_likelihood():
    draws = draw(SEEDS, 20, 0)
    rows = differences(features(draws.states), draws.winners, draws.losers)
    fit = linear.fit_preferences(rows, torch.ones(1, 20).double(), equal_weights(20)[None])
    theta = fit.theta.clone().requires_grad_()
    loss = -torch.nn.functional.logsigmoid((rows @ theta[..., None])[..., 0]).mean(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    assert gradient.norm(dim=-1).max() < 1e-10 and not fit.separable.any()


def test_separable_preferences_are_told():
    rows = torch.tensor([[[1.0, 0.0], [0.5, 0.2], [0, 1]], [[1.0, 0.0], [-1.0, 0.1], [0, -1]]]).double()
    fit = linear.fit_preferences(rows, torch.ones(1, 3).double(), equal_weights(3)[None])
    assert fit.separable.tolist() == [True, False] and fit.theta.isfinite().all()


@pytest.mark.parametrize("setting", ["matched", "mismatched"])
def test_gradient_and_hessian_of_the_objective(setting):
    draws = draw([1, 2], 6, 0)
    rows, rewards = features(draws.states, setting), true_rewards(draws.states)
    weights = equal_weights(6)
    theta = torch.tensor([[[0.3, -0.2], [2.0, 1.0]], [[0.0, 0.5], [-1.0, 0.4]]]).double()

    def value(theta):
        probability = (rows[:, None] @ theta[:, :, None, :, None])[..., 0].softmax(-1)
        terms = probability * (rewards[:, None] - 0.3 * (4 * probability).log())
        return terms.sum(-1).mean(-1)

    found, gradient, hessian = exact.objective(rows, rewards, weights, 0.3, theta)
    torch.testing.assert_close(found, value(theta), atol=1e-12, rtol=0)
    variable = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(variable).sum(), variable)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    full = torch.autograd.functional.hessian(lambda t: value(t).sum(), theta)
    blocks = torch.stack([torch.stack([full[s, k, :, s, k] for k in range(2)]) for s in range(2)])
    torch.testing.assert_close(hessian, blocks, atol=1e-10, rtol=0)


def test_matched_optima_are_the_same_and_in_closed_form():
    """theta_DPO = theta_RMB = theta_RMB+ = psi / beta; max J = beta E_s log Z(s)."""
    run = experiment.run(config(mode="exact"), 20)
    optimum = run.reward.theta / BETA
    for theta in run.thetas.values():
        torch.testing.assert_close(theta, optimum, atol=0, rtol=1e-8)
    assert run.largest_gradient < 1e-10
    rows = features(run.draws.states)
    rewards = (rows @ run.reward.theta[:, None, :, None])[..., 0]
    found = exact.maximise(rows, rewards, equal_weights(20), BETA)
    log_z = BETA * ((rewards / BETA).logsumexp(-1) - math.log(4))
    torch.testing.assert_close(found.value, log_z.mean(-1), atol=1e-8, rtol=0)


def test_matched_gap_is_all_reward_error():
    """Exact actions or states change nothing; the true reward leaves what beta costs, the same for all."""
    setup = config(mode="exact")
    run = experiment.run(setup, 20)
    gaps, sources = experiment.gaps_of(setup, run.thetas), experiment.error_sources(setup, run)
    left = optimality_gap(torch.tensor(TRUE_THETA).double() / BETA, "matched")
    for name, pieces in sources.items():
        for piece in ("actions", "states"):
            torch.testing.assert_close(pieces[piece], gaps[name], atol=1e-8, rtol=0)
        for piece in ("reward", "all"):
            torch.testing.assert_close(pieces[piece], left.expand(len(SEEDS)), atol=1e-8, rtol=0)


def test_mismatched_optimum_beats_a_fine_search():
    draws = draw([2021, 2022, 2023], 20, 0)
    rows, rewards = features(draws.states, "mismatched"), true_rewards(draws.states)
    weights = equal_weights(20)
    found = exact.maximise(rows, rewards, weights, BETA)
    assert found.gradient.max() < 1e-10
    angles = torch.linspace(0, 2 * math.pi, 2000).double()
    grid = torch.logspace(0, 3.5, 40).double()[:, None, None] * torch.stack((angles.cos(), angles.sin()), -1)
    best = torch.stack([exact.objective(rows, rewards, weights, BETA, x.expand(3, -1, 2))[0].amax(1) for x in grid])
    assert (found.value >= best.amax(0) - 1e-12).all()


@pytest.mark.parametrize("setting", ["matched", "mismatched"])
def test_published_updates_against_a_loop(setting):
    """Two seeds together give what each gives alone in float64, from the formulas as written."""
    draws = draw([3, 4], 8, 0)
    rows = features(draws.states, setting)
    psi = torch.tensor([0.7, 1.5]).double()
    rewards = features(draws.states) @ psi
    together = (
        linear.dpo(rows, draws.winners, draws.losers, draws.initial[:, 0], BETA),
        linear.rmb_po(rows, rewards, draws.initial[:, 1], BETA),
    )
    for seed in range(2):
        for found, start, steps in ((together[0], 0, 200), (together[1], 1, 1000)):
            theta, squares = draws.initial[seed, start], 0.0
            for _ in range(steps):
                probability = (rows[seed] @ theta).softmax(-1)
                gradient = torch.zeros(2).double()
                for i in range(8):
                    phi, pi = rows[seed, i], probability[i]
                    if start == 0:
                        win, lose = draws.winners[seed, i], draws.losers[seed, i]
                        z = BETA * ((pi[win] + 1e-6).log() - (pi[lose] + 1e-6).log())
                        gradient -= BETA * torch.sigmoid(-z) * (phi[win] - phi[lose]) / 8
                    else:
                        signal = rewards[seed, i] - BETA * (4 * pi).log()
                        gradient -= ((pi * signal)[:, None] * (phi - pi @ phi)).sum(0) / 8
                squares = squares + gradient @ gradient
                theta = theta - gradient / squares**0.5
            torch.testing.assert_close(found[seed], theta, atol=1e-3, rtol=0)  # float32 against float64


def test_sampled_evaluation_is_unbiased():
    theta = torch.tensor([[1.0, 3.0]]).double().expand(200, 2)
    (gaps,) = sampled_gaps([theta], range(200), "mismatched", 500)
    exact_gap = optimality_gap(theta[0], "mismatched")
    assert abs((gaps.mean() - exact_gap) / (gaps.std() / 200**0.5)) < 3
    assert policy(theta[0], torch.rand(3).double(), "matched").sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_new_states_only():
    both, new = (experiment.run(config(pref_states=x), 20).thetas for x in (True, False))
    assert torch.equal(both["dpo"], new["dpo"]) and torch.equal(both["rmb_po"], new["rmb_po"])
    assert (both["rmb_po_plus@2"] != new["rmb_po_plus@2"]).any()


def test_grid_screening_against_the_objective():
    """One seed's float32 values on a grid, its logits far below the largest one included, against float64."""
    draws = draw([5], 300, 0)  # more directions than are taken at a time
    rows, rewards = features(draws.states, "mismatched"), true_rewards(draws.states)
    angles = torch.linspace(0, 2 * math.pi, 300).double()
    circle, radii = torch.stack((angles.cos(), angles.sin()), -1), torch.tensor([0.5, 30.0, 3000.0]).double()
    weights = equal_weights(300)
    inputs = (rows[0].float(), rewards[0].float(), circle.float())
    found = exact._rings(*inputs, radii, weights.float(), BETA)
    expected = torch.stack([exact.objective(rows, rewards, weights, BETA, (r * circle)[None])[0][0] for r in radii])
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)
    assert (found.double() - expected).abs().mean() < 1e-5
