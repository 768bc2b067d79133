"""The exact policy gradient, and the exact mean and variance of its estimators by enumeration, for one prompt.

    REINFORCE   s(y) (w(y) - b)                                     b = 0
    ReMax       the same with b = w(greedy completion)              arXiv 2310.10505, Algorithm 1
    RLOO(k)     mean_i s(y_i) (w(y_i) - mean_{j != i} w(y_j))       arXiv 2402.14740

with s(y) = grad log pi(y), y ~ pi, and w the reward, or the reward less beta log(pi / ref) for the gradient of
J = E[r] - beta KL(pi || ref). An estimate is of one draw, RLOO's of one group of k draws. The mean of n independent
estimates has an n-th of its variance. Left out: clipped and off-policy estimators.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.exact.optimum import implicit_rewards
from rlhf_fast.ops.checks import expect


class Moments(NamedTuple):
    """Of an estimator of the gradient by D parameters."""

    mean: Tensor  # [D]
    variance: Tensor  # [D]
    total_variance: Tensor  # 0-dim, the sum over D: the trace of the covariance


def score_functions(logprobs: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """grad_theta log pi(y) of every completion, [N, D]; D counts all parameters, flattened and in order.

    logprobs: [N], with the graph that leads to the parameters. One backward pass a completion.
    """
    expect(logprobs.dim() == 1 and logprobs.requires_grad, "logprobs", "shape [N] with a graph", list(logprobs.shape))
    parameters = list(parameters)
    rows = []
    for logprob in logprobs:
        gradients = torch.autograd.grad(
            logprob, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def policy_gradient(
    logprobs: Tensor, scores: Tensor, rewards: Tensor, *, ref_logprobs: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """grad J = sum_y pi(y) s(y) (r(y) - beta log(pi(y) / ref(y))), [D]; the KL's own term sum_y pi s beta is 0.

    logprobs, rewards, ref_logprobs: [N]; scores: [N, D] of `score_functions`. Raises ValueError for beta without ref.
    """
    return moments(logprobs, scores * shaped_rewards(logprobs, rewards, ref_logprobs, beta)[:, None]).mean


def shaped_rewards(logprobs: Tensor, rewards: Tensor, ref_logprobs: Tensor | None, beta: float) -> Tensor:
    """w = r - beta log(pi / ref), [N], detached: the weights whose REINFORCE gradient is that of J.

    Raises ValueError for beta without ref_logprobs.
    """
    expect(ref_logprobs is not None or beta == 0, "ref_logprobs", "a tensor, as beta is not 0", None)
    if ref_logprobs is None or beta == 0:
        return rewards
    return rewards - implicit_rewards(logprobs.detach(), ref_logprobs, beta)


def moments(logprobs: Tensor, estimates: Tensor) -> Moments:
    """Mean and variance, over y ~ pi, of the estimator whose value is estimates[y].

    logprobs: [N]; estimates: [N, D]. Raises ValueError for other shapes.
    """
    expect(estimates.dim() == 2 and len(estimates) == len(logprobs), "estimates", f"shape [{len(logprobs)}, D]",
           list(estimates.shape))  # fmt: skip
    p_N = logprobs.detach().exp()
    mean_D = p_N @ estimates
    return _moments(mean_D, p_N @ (estimates - mean_D).square())


def reinforce_moments(logprobs: Tensor, scores: Tensor, weights: Tensor, *, baseline: float | Tensor = 0.0) -> Moments:
    """Moments of s(y) (w(y) - baseline). ReMax's baseline is weights[greedy(logprobs, completions)].

    logprobs, weights: [N]; scores: [N, D].
    """
    return moments(logprobs, scores * (weights - baseline)[:, None])


def optimal_baseline(logprobs: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """The constant baseline with the least total variance, E[|s|^2 w] / E[|s|^2], 0-dim."""
    p_N = logprobs.detach().exp() * scores.square().sum(1)
    return (p_N @ weights) / p_N.sum()


def rloo_moments(logprobs: Tensor, scores: Tensor, weights: Tensor, *, group_size: int) -> Moments:
    """Moments of the mean over one group of k independent draws of s(y_i) (w(y_i) - mean of the others' w).

    This mean is the U-statistic with the kernel h(y, z) = (s(y) - s(z)) (w(y) - w(z)) / 2, so that by Hoeffding

        Var = (4 (k - 2) Var(E[h | y]) + 2 Var(h)) / (k (k - 1))

    and both variances are moments of one completion: no tuples are enumerated.

    logprobs, weights: [N]; scores: [N, D]; group_size: at least 2, or ValueError.
    """
    k = group_size
    expect(k >= 2, "group_size", "at least 2", k)
    p_N = logprobs.detach().exp()
    w_N1 = (weights - p_N @ weights)[:, None]  # h is the same for w plus a constant; centred weights lose no digits
    mean_D = p_N @ (scores * w_N1)
    var_w = p_N @ w_N1.square()
    conditional_ND = (scores * w_N1 + mean_D) / 2
    first_D = p_N @ (conditional_ND - mean_D).square()
    second_D = (p_N @ (scores * w_N1).square() + (p_N @ scores.square()) * var_w) / 2
    return _moments(mean_D, (4 * (k - 2) * first_D + 2 * second_D) / (k * (k - 1)))


def _moments(mean_D: Tensor, variance_D: Tensor) -> Moments:
    return Moments(mean_D, variance_D, variance_D.sum())
