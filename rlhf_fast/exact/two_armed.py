"""The softmax bandit of two arms in closed form: when does the greedy baseline lower the variance of REINFORCE?

pi(arm 1) = p, rewards r1 > r2 > 0, gradient with respect to arm 1's logit (arm 2's is its negative):

    Var(b) = p (1 - p) ((r1 - b)(1 - p) + (r2 - b) p)^2         of (1[a = arm 1] - p)(r_a - b), a ~ pi

It is 0 at b = r1 (1 - p) + r2 p. With the greedy arm's reward as baseline (ReMax) it is less than with b = 0
(REINFORCE) as long as

    p < r1 / (2 (r1 - r2)) = 1/2 + r2 / (2 (r1 - r2))

that is until the better arm dominates, and always where r1 <= 2 r2 (Proposition 3 of arXiv 2310.10505; r1 in
place of r2 in the last numerator would make the bound vacuous).

The mean over a group of k draws with RLOO's leave-one-out baselines is (r1 - r2) n (k - n) / (k (k - 1)), where n
of the draws are arm 1. Its variance depends on the difference of the rewards alone:

    Var(RLOO) = (r1 - r2)^2 p (1 - p) ((k - 2)(1 - 4 p (1 - p)) + 1 - 2 p (1 - p)) / (k (k - 1))

Var(b) is of one draw, so compare it with k Var(RLOO). As k grows, k Var(RLOO) falls to Var(b) at the expected reward,
which is a value model's baseline.
"""

from rlhf_fast.ops.checks import expect


def variance(p: float, r1: float, r2: float, baseline: float = 0.0) -> float:
    """Var(b) of one draw, per logit (both have the same). Raises ValueError for p outside [0, 1]."""
    expect(0 <= p <= 1, "p", "a probability", p)
    return p * (1 - p) * ((r1 - baseline) * (1 - p) + (r2 - baseline) * p) ** 2


def optimal_baseline(p: float, r1: float, r2: float) -> float:
    """The baseline with which the variance is 0."""
    expect(0 <= p <= 1, "p", "a probability", p)
    return r1 * (1 - p) + r2 * p


def mean_baseline(p: float, r1: float, r2: float) -> float:
    """The expected reward, the baseline of a value model that has converged."""
    expect(0 <= p <= 1, "p", "a probability", p)
    return p * r1 + (1 - p) * r2


def greedy_baseline(p: float, r1: float, r2: float) -> float:
    """The likelier arm's reward; the first arm's in a tie."""
    expect(0 <= p <= 1, "p", "a probability", p)
    return r1 if p >= 0.5 else r2


def rloo_variance(p: float, r1: float, r2: float, group_size: int) -> float:
    """The variance of the mean over one group of k = group_size draws, per logit. Raises ValueError for k < 2."""
    expect(0 <= p <= 1, "p", "a probability", p)
    expect(group_size >= 2, "group_size", "at least 2", group_size)
    pq, k = p * (1 - p), group_size
    return (r1 - r2) ** 2 * pq * ((k - 2) * (1 - 4 * pq) + 1 - 2 * pq) / (k * (k - 1))


def crossover(r1: float, r2: float) -> float:
    """The p above which the greedy baseline raises the variance; beyond 1, or infinite, where it never does.

    Raises ValueError unless r1 >= r2 > 0.
    """
    expect(r1 >= r2 > 0, "r2", f"in (0, r1 = {r1}]", r2)
    return r1 / (2 * (r1 - r2)) if r1 > r2 else float("inf")
