"""The methods of the exact study: each makes a policy's next step from the project's own operations.

Every function takes a policy that is to be trained and returns `update()`, one step of it. Online methods draw their
completions from the policy's exact distribution. Left out: prompts (there is one, the empty one) and schedules.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.exact import TabularPolicy, greedy
from rlhf_fast.lab.study.config import ExactStudyConfig
from rlhf_fast.lab.study.exact_world import World
from rlhf_fast.ops import (
    dpo_loss,
    gae,
    ppo_loss,
    ppo_value_loss,
    reinforce_loss,
    remax_returns,
    rloo_advantages,
    shape_rewards,
    whiten,
)

PPO_EPOCHS = 4
RLOO_GROUP = 4
KL_COEFS = (0.03, 0.1, 0.3)
KL_TARGETS = (0.5, 1.0, 2.0, 4.0)

Update = Callable[[], None]
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # log-probs: chosen, rejected, the reference's of both


def from_pairs(
    policy: TabularPolicy, world: World, pairs: Tensor, config: ExactStudyConfig, generator: torch.Generator, *,
    loss: PairLoss,
) -> Update:  # fmt: skip
    """Batches of preference pairs, drawn with replacement."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)

    def update() -> None:
        batch = pairs[torch.randint(len(pairs), (config.batch_size,), generator=generator)]
        logprobs = policy.token_logprobs(batch.flatten()).sum(-1).view(-1, 2)
        optimizer.zero_grad()
        loss(*logprobs.unbind(1), *world.ref_logprobs[batch].unbind(1)).backward()
        optimizer.step()

    return update


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, **options: Any) -> Tensor:
    """`dpo_loss` of the pairs, averaged."""
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options).losses.mean()


def unlikelihood(chosen: Tensor, rejected: Tensor, *ref: Tensor, alpha: float) -> Tensor:
    """-log pi(chosen) + alpha log pi(rejected); alpha 0 is fine-tuning on the preferred completions."""
    return (alpha * rejected - chosen).mean()


def reinforce(
    policy: TabularPolicy, world: World, scores: Tensor, config: ExactStudyConfig, generator: torch.Generator, *,
    baseline: str, kl_coef: float,
) -> Update:  # fmt: skip
    """REINFORCE ("none"), ReMax ("greedy") and RLOO ("group"): unbiased gradients of E[score] - kl_coef KL."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)

    def update() -> None:
        rows, logprobs, ref_logprobs, mask = _rollout(policy, world, config, generator)
        old = logprobs.detach()
        if baseline == "group":
            shaped = scores[rows] - kl_coef * (old - ref_logprobs).sum(1)
            weights = rloo_advantages(shaped, RLOO_GROUP)
        else:
            greedy_score = scores[greedy(policy(), world.completions)] if baseline == "greedy" else scores.new_zeros(())
            weights = remax_returns(
                scores[rows], greedy_score.expand(len(rows)), old, ref_logprobs, mask, kl_coef=kl_coef, variant="verl"
            )
        optimizer.zero_grad()
        reinforce_loss(logprobs, weights, mask, reduction="sequence_sum").backward()
        optimizer.step()

    return update


def ppo(
    policy: TabularPolicy, world: World, scores: Tensor, config: ExactStudyConfig, generator: torch.Generator, *,
    kl_target: float,
) -> Update:  # fmt: skip
    """Clipped updates with a table of values, GAE, and a KL coefficient steered to kl_target (arXiv 1909.08593)."""
    values = torch.zeros(policy.logits.shape[0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*policy.parameters(), values], lr=config.learning_rate)
    kl_coef = 0.1

    def update() -> None:
        nonlocal kl_coef
        rows, logprobs, ref_logprobs, mask = _rollout(policy, world, config, generator)
        old, old_values = logprobs.detach(), values.detach()[policy.nodes[rows]]
        rewards = shape_rewards(scores[rows], old, ref_logprobs, mask, kl_coef=kl_coef)
        advantages, returns = gae(rewards, old_values, mask)
        advantages = whiten(advantages, mask)
        for _ in range(PPO_EPOCHS):
            loss = ppo_loss(policy.token_logprobs(rows), old, advantages, mask).loss
            value_loss = ppo_value_loss(values[policy.nodes[rows]], old_values, returns, mask).loss
            optimizer.zero_grad()
            (loss + value_loss).backward()
            optimizer.step()
        error = (old - ref_logprobs).sum(1).mean().item() / kl_target - 1
        kl_coef *= 1 + 0.1 * max(-0.2, min(0.2, error))

    return update


def _rollout(
    policy: TabularPolicy, world: World, config: ExactStudyConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices [B] of sampled completions, their log-probs [B, T] with graph, the reference's, and their mask."""
    with torch.no_grad():
        rows = torch.multinomial(policy().exp(), config.batch_size, True, generator=generator)
    return rows, policy.token_logprobs(rows), world.ref_token_logprobs[rows], policy.mask[rows]


# method -> strength -> how it is trained; methods of OFFLINE take pairs, methods of ONLINE take scores
OFFLINE: dict[str, dict[str, Callable[..., Update]]] = {
    **{
        f"DPO {loss_type}".removesuffix(" sigmoid"): {
            f"beta {beta}": partial(from_pairs, loss=partial(dpo, beta=beta, loss_type=loss_type)) for beta in betas
        }
        for loss_type, betas in {
            "sigmoid": (0.05, 0.1, 0.3, 1.0),
            "ipo": (0.1, 0.3, 1.0),
            "hinge": (0.1, 0.3, 1.0),
        }.items()
    },
    "Unlikelihood": {
        f"alpha {alpha}": partial(from_pairs, loss=partial(unlikelihood, alpha=alpha))
        for alpha in (0.05, 0.1, 0.5, 1.0)
    },
    "Preferred-FT": {"": partial(from_pairs, loss=partial(unlikelihood, alpha=0.0))},
}
_PPO = {f"target {target}": partial(ppo, kl_target=target) for target in KL_TARGETS}
ONLINE: dict[str, dict[str, Callable[..., Update]]] = {
    "PPO": _PPO,
    "PPO-GT": _PPO,  # its scores are the true reward's
    **{
        name: {f"kl_coef {kl_coef}": partial(reinforce, baseline=baseline, kl_coef=kl_coef) for kl_coef in KL_COEFS}
        for name, baseline in {"ReMax": "greedy", "REINFORCE": "none", "RLOO": "group"}.items()
    },
}


def best_of(world: World, scores: Tensor, n: int) -> Tensor:
    """Log-probs [N], exact, of the best of n draws from the reference by score; ties share in proportion.

    P(the best has score s) = F(s)^n - F(s-)^n, F the distribution of one draw's score.
    """
    levels, level_N = scores.unique(return_inverse=True)
    p_N = world.ref_logprobs.exp()
    p_L = torch.zeros_like(levels).index_add(0, level_N, p_N)
    below = torch.cat([p_L.new_zeros(1), p_L.cumsum(0)[:-1]])
    best_L = (below + p_L) ** n - below**n
    return (best_L / p_L)[level_N].log() + world.ref_logprobs
