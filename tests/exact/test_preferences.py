"""DPO's population loss against the reward model's, the closed-form gradient and hand vectors; its exact minimiser."""

import math

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import exact
from tests.support.worlds import close, random_logprobs, random_rewards


def test_bradley_terry_by_hand():
    p = exact.bradley_terry(torch.tensor([0.0, math.log(3.0)], dtype=torch.float64))
    close(p, [[0.5, 0.25], [0.75, 0.5]])


def test_policies_have_the_preferences_of_their_rewards():
    """DPO eq. 6: the partition function cancels."""
    ref, rewards = random_logprobs(2, 12), random_rewards(2, 12)
    implied = exact.implicit_rewards(exact.optimum(ref, rewards, 0.2), ref, 0.2)
    close(exact.bradley_terry(implied), exact.bradley_terry(rewards))


def test_loss_is_the_reward_model_s_of_the_implicit_rewards():
    """Summed pair by pair with the project's own losses."""
    N, beta = 9, 0.3
    ref, policy, preferences = random_logprobs(N), random_logprobs(N, seed=1), exact.bradley_terry(random_rewards(N))
    first, second = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    weights = ref.exp()[first] * ref.exp()[second] * preferences[first, second]
    loss = exact.dpo_population_loss(policy, ref, preferences, beta)
    pairs = rf.dpo_loss(policy[first], policy[second], ref[first], ref[second], beta=beta).losses
    close(loss, weights @ pairs)
    implied = exact.implicit_rewards(policy, ref, beta)
    reward_losses = torch.stack(
        [rf.reward_loss(implied[i, None], implied[j, None]).loss for i, j in zip(first, second, strict=True)]
    )
    close(loss, weights @ reward_losses)


def test_gradient_in_closed_form():
    """DPO eq. 7's gradient: -beta E[sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l))]."""
    N, beta = 9, 0.3
    ref, preferences = random_logprobs(N), exact.bradley_terry(random_rewards(N))
    policy = random_logprobs(N, seed=1).requires_grad_()
    exact.dpo_population_loss(policy, ref, preferences, beta).backward()
    implied = exact.implicit_rewards(policy.detach(), ref, beta)
    pairs = ref.exp()[:, None] * ref.exp() * preferences * (implied - implied[:, None]).sigmoid()
    close(policy.grad, -beta * (pairs.sum(1) - pairs.sum(0)))


@pytest.mark.parametrize("chosen, rejected, weight", [(2.0, 0.0, 0.4502), (0.0, 4.0, 0.5987), (20.0, 0.0, 0.1192)])
def test_gradient_weights_by_hand(chosen, rejected, weight):
    """One pair, beta 0.1, log-ratios as given: the gradient is -beta times the weight."""
    policy = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    always_first = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    zeros, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    exact.dpo_population_loss(policy, zeros, always_first, 0.1, pair_weights=ones).backward()
    close(policy.grad / 0.1, [-weight, weight], tolerance=5e-5)


@pytest.mark.parametrize("chosen, rejected, loss", [(-12.0, -10.0, 0.7981), (-9.0, -10.0, 0.6444)])
def test_loss_by_hand(chosen, rejected, loss):
    policy, ref = torch.tensor([chosen, rejected]).double(), torch.full((2,), -11.0).double()
    if chosen == -9.0:  # log-ratios 1 and 0
        ref = torch.full((2,), -10.0).double()
    always_first, ones = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double(), torch.ones(2, 2).double()
    close(exact.dpo_population_loss(policy, ref, always_first, 0.1, pair_weights=ones), loss, tolerance=5e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_minimiser_is_the_optimum_of_the_rewards(weighted):
    N, beta = 40, 0.4
    ref, rewards = random_logprobs(N), 2 * random_rewards(N)
    preferences = exact.bradley_terry(rewards)
    weights = random_rewards(N, N, seed=7).square()
    weights = weights + weights.T if weighted else None
    best = exact.dpo_minimiser(ref, preferences, beta, pair_weights=weights)
    close(best, exact.optimum(ref, rewards, beta))


def test_gradient_in_a_policy_s_own_parameters_is_zero_at_the_optimum():
    completions = exact.completions(3, 3)
    ref, rewards = random_logprobs(27), random_rewards(27)
    policy = exact.TabularPolicy(completions)
    policy.set_logprobs(exact.optimum(ref, rewards, 0.5))
    exact.dpo_population_loss(policy(), ref, exact.bradley_terry(rewards), 0.5).backward()
    close(policy.logits.grad, torch.zeros_like(policy.logits), tolerance=1e-12)


def test_minimiser_of_preferences_that_no_rewards_explain():
    """Rock beats paper beats scissors beats rock, 3 to 1, and rock beats scissors' twin: no gradient is left."""
    wins = torch.tensor([[0, 3, 1, 1], [1, 0, 3, 0], [3, 1, 0, 2], [0, 1, 0, 0]]).double()
    ref = random_logprobs(4)
    best = exact.dpo_minimiser(ref, wins / 3, 0.5, pair_weights=torch.ones(4, 4).double())
    logprobs = best.clone().requires_grad_()
    exact.dpo_population_loss(logprobs, ref, wins / 3, 0.5, pair_weights=torch.ones(4, 4).double()).backward()
    close(logprobs.grad, torch.zeros(4), tolerance=1e-12)


def test_separable_preferences_have_no_minimiser():
    first_wins = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64)
    with pytest.raises(ValueError, match="preferences: expected a chain of preferences from any completion to any"):
        exact.dpo_minimiser(random_logprobs(2), first_wins, 0.1)


def test_bad_input():
    with pytest.raises(ValueError, match=r"preferences: expected shape \[3, 3\], got \[3\]"):
        exact.dpo_population_loss(random_logprobs(3), random_logprobs(3), torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="pair_weights: expected a symmetric matrix"):
        lopsided = torch.eye(3, dtype=torch.float64).roll(1, 0)
        exact.dpo_minimiser(random_logprobs(3), torch.full((3, 3), 0.5).double(), 0.1, pair_weights=lopsided)
    with pytest.raises(ValueError, match="beta: expected a finite number > 0, got -1"):
        exact.dpo_minimiser(random_logprobs(3), torch.zeros(3, 3), -1)
    with pytest.raises(ValueError, match=r"ref_logprobs: expected shape \[N\], got \[2, 3\]"):
        exact.dpo_minimiser(random_logprobs(2, 3), torch.zeros(2, 3, 3), 0.1)


def test_cpo_is_dpo_with_a_uniform_reference_and_the_likelihood_of_the_chosen():
    """Over all pairs in their proportions; lengths are 1, because a completion is one action here."""
    N, beta, alpha = 9, 0.3, 0.4
    policy, preferences = random_logprobs(N, seed=1).requires_grad_(), exact.bradley_terry(random_rewards(N))
    uniform = torch.full((N,), -math.log(N), dtype=torch.float64)
    first, second = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    weights = preferences[first, second] / N**2
    options = dict(beta=beta, loss_type="cpo", cpo_alpha=alpha, mean_chosen_length=1.0)
    loss = weights @ rf.dpo_loss(policy[first], policy[second], **options).losses
    chosen = preferences.sum(1) / N**2
    close(loss, exact.dpo_population_loss(policy, uniform, preferences, beta) - alpha * chosen @ policy)
    mine, theirs = (torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (loss, -alpha * chosen @ policy))
    (dpo,) = torch.autograd.grad(exact.dpo_population_loss(policy, uniform, preferences, beta), policy)
    close(mine, dpo + theirs)


def test_sft_alone_is_least_at_the_distribution_of_the_chosen_answers():
    N = 7
    preferences = exact.bradley_terry(random_rewards(N))
    first, second = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    weights = preferences[first, second] / preferences.sum()
    logits = (weights.view(N, N).sum(1)).log().requires_grad_()
    policy = logits.log_softmax(-1)
    loss = weights @ rf.dpo_loss(policy[first], policy[second], loss_type="sft", mean_chosen_length=1.0).losses
    close(torch.autograd.grad(loss, logits)[0], torch.zeros(N), tolerance=1e-12)


def test_simpo_and_orpo_prefer_by_the_mean_of_a_token():
    """Two answers with one log-prob, of 2 and of 4 tokens: the longer answer has the larger average."""
    logps = torch.full((1,), -2.0, dtype=torch.float64)
    lengths = dict(chosen_lengths=torch.tensor([4]), rejected_lengths=torch.tensor([2]))
    simpo = rf.dpo_loss(logps, logps, beta=2.0, loss_type="simpo", simpo_gamma=0.0, **lengths).losses
    close(simpo, [math.log1p(math.exp(-2.0 * 0.5))])
    odds = math.exp(-0.5) / (1 - math.exp(-0.5)) / (math.exp(-1) / (1 - math.exp(-1)))
    close(rf.dpo_loss(logps, logps, beta=2.0, loss_type="orpo", **lengths).losses, [0.5 + 2 * math.log1p(1 / odds)])
