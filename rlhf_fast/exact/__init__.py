"""Exact preference optimisation: language models so small that every completion can be enumerated, in float64.

    policies      all completions of a vocabulary and length; a tabular policy; any causal LM over them
    optimum       the closed-form optimum of reward less KL, and the frontier of reward against KL
    preferences   Bradley-Terry, the population DPO loss and its minimiser
    gradients     the exact policy gradient; mean and variance of REINFORCE, ReMax and RLOO
    two_armed     the same in closed form for a bandit of two arms

The functions take log-probabilities and rewards [..., N] of the N completions, whatever model they came from. Leading
axes are prompts (or seeds), computed independently. Left out: anything sampled.
"""

from rlhf_fast.exact.gradients import (
    Moments,
    moments,
    optimal_baseline,
    policy_gradient,
    reinforce_moments,
    rloo_moments,
    score_functions,
    shaped_rewards,
)
from rlhf_fast.exact.optimum import (
    Frontier,
    beta_at_kl,
    expected_reward,
    frontier,
    implicit_rewards,
    kl,
    log_partition,
    objective,
    optimum,
)
from rlhf_fast.exact.policies import Completions, TabularPolicy, causal_lm_logprobs, completions, greedy
from rlhf_fast.exact.preferences import bradley_terry, dpo_minimiser, dpo_population_loss

__all__ = [
    "Completions",
    "Frontier",
    "Moments",
    "TabularPolicy",
    "beta_at_kl",
    "bradley_terry",
    "causal_lm_logprobs",
    "completions",
    "dpo_minimiser",
    "dpo_population_loss",
    "expected_reward",
    "frontier",
    "greedy",
    "implicit_rewards",
    "kl",
    "log_partition",
    "moments",
    "objective",
    "optimal_baseline",
    "optimum",
    "policy_gradient",
    "reinforce_moments",
    "rloo_moments",
    "score_functions",
    "shaped_rewards",
]
