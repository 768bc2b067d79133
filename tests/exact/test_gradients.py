"""The policy gradient against autograd; means and variances of the estimators against sums over every outcome."""

import itertools
import math

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import exact
from rlhf_fast.exact import two_armed
from tests.support.worlds import close, random_logprobs, random_rewards, random_tabular


class World:
    """A tabular policy, its score functions, a reference and rewards."""

    def __init__(self, vocab_size, length, seed=0):
        self.completions = exact.completions(vocab_size, length)
        self.policy = random_tabular(self.completions, seed=seed)
        self.logprobs = self.policy()
        self.scores = exact.score_functions(self.logprobs, self.policy.parameters())
        self.logprobs = self.logprobs.detach()
        self.ref, self.rewards = random_logprobs(len(self.logprobs), seed=9), random_rewards(len(self.logprobs)) + 2


@pytest.fixture(scope="module")
def world():
    return World(3, 3)


def test_score_functions_have_mean_zero(world):
    assert world.scores.shape == (27, 13 * 3)
    close(world.logprobs.exp() @ world.scores, torch.zeros(39), tolerance=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_policy_gradient_is_autograd_s(world, beta):
    value = exact.objective(world.policy(), world.ref, world.rewards, beta)
    (expected,) = torch.autograd.grad(value, world.policy.logits)
    got = exact.policy_gradient(world.logprobs, world.scores, world.rewards, ref_logprobs=world.ref, beta=beta)
    close(got, expected.flatten(), tolerance=1e-10)


@pytest.mark.parametrize("vocab_size, length", [(2, 4), (3, 3), (4, 4)])
def test_value_is_that_of_the_token_level_decision_process(vocab_size, length):
    """(P1) = (P2): backward induction over prefixes, reward at the end only, gives E[r]."""
    world = World(vocab_size, length)
    soft = world.policy.logits.softmax(-1)
    value = world.rewards
    for t in reversed(range(length)):  # the prefixes of one length stand together in the heap
        first = sum(vocab_size**s for s in range(t))
        value = (soft[first : first + vocab_size**t] * value.view(-1, vocab_size)).sum(-1)
    close(value[0], exact.expected_reward(world.logprobs, world.rewards), tolerance=1e-10)


def test_remax_is_unbiased_and_its_greedy_branch_carries_no_gradient(world):
    """Algorithm 1 by the project's own operations, one completion at a time, in the exact proportions."""
    beta, N = 0.3, 27
    greedy = exact.greedy(world.logprobs, world.completions)
    token_logprobs = world.policy.token_logprobs()
    # the reference's own conditionals
    ref = exact.TabularPolicy(world.completions)
    ref.set_logprobs(world.ref)
    mask = world.completions.mask
    for variant, expected in {
        "verl": exact.policy_gradient(world.logprobs, world.scores, world.rewards, ref_logprobs=world.ref, beta=beta),
        "no KL": exact.policy_gradient(world.logprobs, world.scores, world.rewards),
    }.items():
        weights = rf.remax_returns(
            world.rewards, world.rewards[greedy].expand(N), token_logprobs.detach(), ref.token_logprobs().detach(),
            mask, kl_coef=0.0 if variant == "no KL" else beta, variant="paper" if variant == "no KL" else variant,
        )  # fmt: skip
        weights = weights * world.logprobs.exp()[:, None]
        loss = rf.reinforce_loss(token_logprobs, weights, mask, reduction="constant", normalizer=1.0)
        (gradient,) = torch.autograd.grad(loss, world.policy.logits, retain_graph=True)
        close(-gradient.flatten(), expected, tolerance=1e-10)


def test_one_step_kl_is_not_the_objective_s_gradient(world):
    """Each token pays for its own log-ratio alone, not for those that follow from it."""
    token = world.policy.token_logprobs()
    ref = exact.TabularPolicy(world.completions)
    ref.set_logprobs(world.ref)
    zeros = torch.zeros(27, dtype=torch.float64)
    gradients = {}
    for variant in ("paper", "verl"):
        weights = rf.remax_returns(
            zeros, zeros, token.detach(), ref.token_logprobs().detach(), world.completions.mask, kl_coef=1.0,
            variant=variant,
        )  # fmt: skip
        loss = -(world.logprobs.exp()[:, None] * weights * token).sum()
        (gradients[variant],) = torch.autograd.grad(-loss, world.policy.logits, retain_graph=True)
    (kl_gradient,) = torch.autograd.grad(exact.kl(world.policy(), world.ref), world.policy.logits)
    close(gradients["verl"], -kl_gradient, tolerance=1e-10)
    earlier, last = slice(0, 4), slice(4, 13)  # prefixes of fewer than 2 tokens, and of 2: nothing follows their token
    close(gradients["paper"][last], -kl_gradient[last], tolerance=1e-10)
    assert (gradients["paper"][earlier] + kl_gradient[earlier]).abs().max() > 0.05


@pytest.mark.parametrize("reduction, scale", [("sequence_sum", 1.0), ("token_mean", 3.0)])
def test_algorithm_1_and_the_official_token_mean_differ_by_the_length(world, reduction, scale):
    advantages = world.rewards - 1.0
    token_logprobs = world.policy.token_logprobs()
    loss = rf.reinforce_loss(token_logprobs, advantages, world.completions.mask, reduction=reduction)
    close(loss * scale, -(advantages * world.policy()).mean(), tolerance=1e-10)


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_reinforce_moments_outcome_by_outcome(world, baseline):
    got = exact.reinforce_moments(world.logprobs, world.scores, world.rewards, baseline=baseline)
    outcomes = [
        (p, s * (r - baseline)) for p, s, r in zip(world.logprobs.exp(), world.scores, world.rewards, strict=True)
    ]
    _check_moments(got, outcomes)
    close(got.mean, exact.policy_gradient(world.logprobs, world.scores, world.rewards), tolerance=1e-10)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rloo_moments_over_every_group(k):
    """All N^k groups of k completions, with the project's own leave-one-out advantages."""
    world = World(2, 2)
    p = world.logprobs.exp()
    outcomes = []
    for group in itertools.product(range(4), repeat=k):
        rows = torch.tensor(group)
        advantages = rf.rloo_advantages(world.rewards[rows], k)
        outcomes.append((p[rows].prod(), (world.scores[rows] * advantages[:, None]).mean(0)))
    got = exact.rloo_moments(world.logprobs, world.scores, world.rewards, group_size=k)
    _check_moments(got, outcomes)
    close(got.mean, exact.policy_gradient(world.logprobs, world.scores, world.rewards), tolerance=1e-10)


def _check_moments(got, outcomes):
    mean = sum(p * g for p, g in outcomes)
    variance = sum(p * (g - mean) ** 2 for p, g in outcomes)
    close(got.mean, mean, tolerance=1e-10)
    close(got.variance, variance, tolerance=1e-10)
    close(got.total_variance, variance.sum(), tolerance=1e-10)


def test_optimal_baseline_is_where_the_variance_is_flat_and_least(world):
    best = exact.optimal_baseline(world.logprobs, world.scores, world.rewards)

    def total(baseline):
        return exact.reinforce_moments(world.logprobs, world.scores, world.rewards, baseline=baseline).total_variance

    p_squares = world.logprobs.exp() @ world.scores.square().sum(1)
    for offset in (-0.5, 0.1, 2.0):  # a parabola with this curvature
        close(total(best + offset), total(best) + p_squares * offset**2, tolerance=1e-9)


BANDITS = [
    (1.0, 0.5, 0.3, 0.15172, 0.02572),
    (1.0, 0.5, 0.9, 0.02722, 0.01822),
    (1.0, 0.1, 0.6, 0.05078, 0.06998),
    (3.0, 1.0, 0.8, 0.31360, 0.40960),
]


@pytest.mark.parametrize("r1, r2, p, plain, with_greedy", BANDITS)
def test_two_armed_bandit(r1, r2, p, plain, with_greedy):
    completions = exact.completions(2, 1)
    policy = exact.TabularPolicy(completions)
    policy.set_logprobs(torch.tensor([p, 1 - p], dtype=torch.float64).log())
    logprobs = policy()
    scores = exact.score_functions(logprobs, policy.parameters())
    rewards = torch.tensor([r1, r2], dtype=torch.float64)
    greedy = rewards[exact.greedy(logprobs, completions)].item()
    assert greedy == two_armed.greedy_baseline(p, r1, r2)
    for baseline, by_hand in ((0.0, plain), (greedy, with_greedy)):
        closed = two_armed.variance(p, r1, r2, baseline)
        assert closed == pytest.approx(by_hand, abs=1e-5)
        close(exact.reinforce_moments(logprobs, scores, rewards, baseline=baseline).variance, [closed, closed])
    best = two_armed.optimal_baseline(p, r1, r2)
    close(exact.optimal_baseline(logprobs, scores, rewards), best)
    assert two_armed.variance(p, r1, r2, best) == pytest.approx(0.0, abs=1e-30)
    assert (with_greedy < plain) == (p < two_armed.crossover(r1, r2))


@pytest.mark.parametrize("r1, r2", [(3.0, 1.0), (1.0, 0.1), (5.0, 2.0)])
def test_crossover_is_where_the_variances_meet(r1, r2):
    p = two_armed.crossover(r1, r2)
    assert 0.5 < p < 1
    assert two_armed.variance(p, r1, r2) == pytest.approx(two_armed.variance(p, r1, r2, r1), rel=1e-12)
    for side, lower in ((p - 0.01, True), (p + 0.01, False)):
        greedy = two_armed.greedy_baseline(side, r1, r2)
        assert (two_armed.variance(side, r1, r2, greedy) < two_armed.variance(side, r1, r2)) is lower


GRID = [(r1, r2, p) for r1, r2 in ((1.0, 0.5), (1.0, 0.1), (3.0, 1.0)) for p in (0.02, 0.3, 0.5, 0.6, 0.8, 0.97)]


@pytest.mark.parametrize("r1, r2, p", GRID)
def test_two_armed_bandit_over_every_draw(r1, r2, p):
    """Mean and variance of every estimator, from sums over the two arms and over all groups of them; at 1e-12."""
    draws = [(p, 1 - p, r1), (1 - p, -p, r2)]  # probability, score function of arm 1's logit, reward
    gradient = p * (1 - p) * (r1 - r2)
    for baseline_of in (lambda *_: 0.0, two_armed.greedy_baseline, two_armed.mean_baseline, two_armed.optimal_baseline):
        b = baseline_of(p, r1, r2)
        mean, variance = _two_moments([(q, s * (r - b)) for q, s, r in draws])
        assert mean == pytest.approx(gradient, abs=1e-12)
        assert two_armed.variance(p, r1, r2, b) == pytest.approx(variance, abs=1e-12)
    for k in (2, 3, 4):
        outcomes = []
        for group in itertools.product(draws, repeat=k):
            total = sum(r for _, _, r in group)
            estimate = sum(s * (r - (total - r) / (k - 1)) for _, s, r in group) / k
            outcomes.append((math.prod(q for q, _, _ in group), estimate))
        mean, variance = _two_moments(outcomes)
        assert mean == pytest.approx(gradient, abs=1e-12)
        assert two_armed.rloo_variance(p, r1, r2, k) == pytest.approx(variance, abs=1e-12)


def _two_moments(outcomes):
    mean = sum(p * g for p, g in outcomes)
    return mean, sum(p * (g - mean) ** 2 for p, g in outcomes)


def test_rloo_of_large_groups_has_the_value_baseline_s_variance():
    p, r1, r2, k = 0.3, 3.0, 1.0, 10**9
    value = two_armed.variance(p, r1, r2, two_armed.mean_baseline(p, r1, r2))
    assert k * two_armed.rloo_variance(p, r1, r2, k) == pytest.approx(value, rel=1e-8)


def test_the_greedy_baseline_always_helps_where_the_worse_arm_has_half_the_reward():
    assert two_armed.crossover(2.0, 1.0) == 1.0
    assert two_armed.crossover(1.0, 1.0) == float("inf")


def test_bad_input(world):
    with pytest.raises(ValueError, match="ref_logprobs: expected a tensor, as beta is not 0, got None"):
        exact.policy_gradient(world.logprobs, world.scores, world.rewards, beta=0.1)
    with pytest.raises(ValueError, match="group_size: expected at least 2, got 1"):
        exact.rloo_moments(world.logprobs, world.scores, world.rewards, group_size=1)
    with pytest.raises(ValueError, match=r"estimates: expected shape \[27, D\], got \[26, 39\]"):
        exact.moments(world.logprobs, world.scores[1:])
    with pytest.raises(ValueError, match=r"logprobs: expected shape \[N\] with a graph"):
        exact.score_functions(world.logprobs, world.policy.parameters())
    with pytest.raises(ValueError, match="p: expected a probability, got 1.1"):
        two_armed.variance(1.1, 1.0, 0.5)
    with pytest.raises(ValueError, match="group_size: expected at least 2, got 1"):
        two_armed.rloo_variance(0.5, 1.0, 0.5, 1)
    with pytest.raises(ValueError, match=r"r2: expected in \(0, r1 = 1.0\], got 2.0"):
        two_armed.crossover(1.0, 2.0)
