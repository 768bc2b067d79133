"""The closed-form optimum against vectors worked out by hand, its identities, and other policies that must lose."""

import math

import pytest
import torch

from rlhf_fast import exact
from tests.support.worlds import close, random_logprobs, random_rewards

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REWARDS = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
HAND = {  # beta: Z, the optimum, and where known its KL, reward and objective
    0.5: (13.6363468363, (0.03666671, 0.16255943, 0.80077385), (0.9154754944, 1.7641071419, 1.3063693946)),
    1.0: (2.7932957683, (0.17900002, 0.29194350, 0.52905648), (0.3228342793, 1.3500564569, 1.0272221777)),
    2.0: (1.5382727469, (0.32503989, 0.32154011, 0.35342001), None),
}


@pytest.mark.parametrize("beta", HAND)
def test_hand_vectors(beta):
    z, probabilities, point = HAND[beta]
    best = exact.optimum(REF, REWARDS, beta)
    close(exact.log_partition(REF, REWARDS, beta).exp(), z)
    close(best.exp(), probabilities)
    if point:
        kl, reward, value = point
        close(exact.kl(best, REF), kl)
        close(exact.expected_reward(best, REWARDS), reward)
        close(exact.objective(best, REF, REWARDS, beta), value)


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_objective_is_the_optimum_s_less_the_kl_to_it(beta):
    ref, rewards, policy = random_logprobs(3, 40), random_rewards(3, 40), random_logprobs(3, 40, seed=1)
    best = exact.optimum(ref, rewards, beta)
    value = beta * exact.log_partition(ref, rewards, beta)
    close(exact.objective(policy, ref, rewards, beta), value - beta * exact.kl(policy, best))
    close(exact.objective(best, ref, rewards, beta), value)


def test_implicit_rewards_of_the_optimum_are_the_rewards():
    ref, rewards = random_logprobs(2, 30), random_rewards(2, 30)
    implied = exact.implicit_rewards(exact.optimum(ref, rewards, 0.3), ref, 0.3)
    close(implied + 0.3 * exact.log_partition(ref, rewards, 0.3)[:, None], rewards)
    # the one representative of its class of the form beta log pi / ref has a partition function of 1
    close(exact.log_partition(ref, implied, 0.3), torch.zeros(2))


def test_rewards_may_be_shifted_per_prompt():
    ref, rewards, shift = random_logprobs(3, 20), random_rewards(3, 20), random_rewards(3, 1, seed=5) * 100
    close(exact.optimum(ref, rewards + shift, 0.7), exact.optimum(ref, rewards, 0.7))
    close(exact.bradley_terry(rewards + shift), exact.bradley_terry(rewards))


def test_limits_of_beta():
    rewards = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
    close(exact.optimum(REF, rewards, 1e-3).exp(), (0.0, 0.6, 0.4))
    close(exact.optimum(REF, rewards, 1e12), REF)


def test_completions_that_the_reference_never_writes():
    ref = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64).log()
    best = exact.optimum(ref, REWARDS, 1.0)
    close(best.exp(), (0.25 / (0.25 + 0.75 * math.e), 0.75 * math.e / (0.25 + 0.75 * math.e), 0.0))
    close(exact.kl(ref, ref), 0.0)
    assert exact.kl(REF, ref) == math.inf
    # and with the best completion out of reach the frontier ends at the best one that is within
    close(exact.kl(best, ref), 0.75 * math.e / (0.25 + 0.75 * math.e) - math.log(0.25 + 0.75 * math.e))
    with pytest.raises(ValueError, match=r"target_kl: expected between 0 and 0\.287682"):
        exact.beta_at_kl(ref, REWARDS, 0.3)


def test_frontier_has_more_reward_than_any_policy_of_its_kl():
    ref, rewards = random_logprobs(3, 25), random_rewards(3, 25)
    for seed in range(20):
        policy = random_logprobs(3, 25, seed=seed, spread=1.0)
        target = exact.kl(policy, ref).mean().item()
        beta = exact.beta_at_kl(ref, rewards, target)
        point = exact.frontier(ref, rewards, [beta])
        close(point.kl, [target])
        assert point.reward.item() > exact.expected_reward(policy, rewards).mean().item()


@pytest.mark.parametrize("beta", [0.2, 1.0, 30.0])
def test_beta_at_kl_inverts_the_frontier(beta):
    ref, rewards = random_logprobs(3, 25), random_rewards(3, 25)
    assert exact.beta_at_kl(ref, rewards, exact.frontier(ref, rewards, [beta]).kl.item()) == pytest.approx(beta, 1e-8)


def test_slope_of_the_frontier_is_beta():
    ref, rewards = random_logprobs(30), random_rewards(30)
    points = exact.frontier(ref, rewards, [0.5 * (1 - 1e-4), 0.5 * (1 + 1e-4)])
    slope = (points.reward[0] - points.reward[1]) / (points.kl[0] - points.kl[1])
    close(slope, 0.5, tolerance=1e-7)


def test_bad_input():
    with pytest.raises(ValueError, match="beta: expected a finite number > 0, got 0"):
        exact.optimum(REF, REWARDS, 0)
    with pytest.raises(ValueError, match=r"rewards: expected shape \[3\] as ref_logprobs, got \[2\]"):
        exact.log_partition(REF, REWARDS[:2], 1.0)
    with pytest.raises(ValueError, match="target_kl: expected between 0 and 1.60944"):
        exact.beta_at_kl(REF, REWARDS, 0.0)
