"""PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Stiennon et al. 2020).

Four models: policy, value, reward, reference. The reward is the score on the EOS token less the KL penalty on every
token; advantages are GAE's, whitened over the rollout; several epochs of minibatches with clipped policy and value
losses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.config import PPOConfig
from rlhf_fast.models import load_scorer, token_values
from rlhf_fast.ops import gae, ppo_value_loss, shape_rewards, whiten
from rlhf_fast.rollout import Rollout
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.training import Learner, Run, micro_batches, resume_directory


class Targets(NamedTuple):
    """What a rollout is trained towards, all [B, T] fp32 and fixed over its epochs."""

    advantages: Tensor  # whitened
    returns: Tensor
    values: Tensor  # of the value model that saw the rollout first


def train(config: PPOConfig) -> None:
    """Train `config.model` by PPO; the policy goes to `config.output_dir`, the value model to its folder `value`."""
    if config.batch_size % config.minibatches:
        raise ValueError(f"minibatches: expected a divisor of batch_size={config.batch_size}, got {config.minibatches}")
    online = Online(config, "PPO", updates_per_round=config.epochs * config.minibatches)
    resumed = resume_directory(config)
    from_reward = config.reward if online.reward.model is not None else config.model
    value_model = load_scorer(resumed / "value" if resumed else config.value_model or from_reward, head="zero")
    critic = Learner(value_model.to(online.device), config, online.updates, learning_rate=config.value_learning_rate)

    def update(run: Run, experience: Experience) -> dict[str, float]:
        targets = advantages_and_returns(run, online, critic, experience)
        totals: dict[str, list[float]] = {}
        for epoch in range(config.epochs):
            order = torch.randperm(config.batch_size).to(online.device)
            for number, index in enumerate(order.chunk(config.minibatches)):
                part = Targets(*(x[index] for x in targets))
                untouched = epoch == 0 and number == 0  # the policy is still the one that sampled
                metrics = minibatch_update(run, online, critic, experience.rollout.rows(index), part, untouched)
                for name, value in metrics.items():
                    totals.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in totals.items()}

    online.run(update, learners={"value": critic})


def advantages_and_returns(run: Run, online: Online, critic: Learner, experience: Experience) -> Targets:
    config, rollout, mask = online.config, experience.rollout, experience.rollout.response_mask
    with run.meter.phase("value"), torch.no_grad(), critic.autocast():
        rows = micro_batches(len(mask), config.micro_batch_size)
        values = torch.cat([token_values(critic.model, rollout.rows(r).sequences) for r in rows])
    rewards = shape_rewards(experience.scores, rollout.logprobs, experience.ref_logprobs, mask, kl_coef=online.kl.coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    return Targets(whiten(advantages, mask), returns, values)


def minibatch_update(
    run: Run, online: Online, critic: Learner, rollout: Rollout, targets: Targets, untouched: bool
) -> dict[str, float]:
    """One optimizer step of policy and value model; denominators are the minibatch's token count."""
    config, mask = online.config, rollout.response_mask
    tokens = mask.sum()
    metrics = dict.fromkeys(
        (
            "loss/policy_avg",
            "loss/value_avg",
            "policy/clipfrac_avg",
            "policy/approxkl_avg",
            "policy/entropy_avg",
            "val/ratio",
            "val/clipfrac_avg",
        ),
        0.0,
    )
    drift = 0.0
    for rows in micro_batches(len(mask), config.micro_batch_size):
        part, target = rollout.rows(rows), Targets(*(x[rows] for x in targets))
        share = (part.response_mask.sum() / tokens).item()
        with run.meter.phase("policy_update"):
            with online.learner.autocast():
                policy = online.objectives.ppo(
                    part.sequences, part.logprobs, target.advantages, clip=config.clip, normalizer=tokens
                )
            policy.loss.backward()
        if untouched:
            drift = max(drift, online.check_drift(policy.logprobs, part))
        with run.meter.phase("value_update"):
            with critic.autocast():
                values = token_values(critic.model, part.sequences)
            value = ppo_value_loss(
                values,
                target.values,
                target.returns,
                part.response_mask,
                clip=config.value_clip,
                normalizer=tokens,
            )
            value.loss.backward()
        metrics["loss/policy_avg"] += policy.loss.item()
        metrics["loss/value_avg"] += value.loss.item()
        metrics["policy/clipfrac_avg"] += share * policy.clip_fraction.item()
        metrics["policy/approxkl_avg"] += share * policy.approx_kl.item()
        metrics["policy/entropy_avg"] += (policy.token_entropy.sum() / tokens).item()
        metrics["val/ratio"] += share * policy.ratio_mean.item()
        metrics["val/clipfrac_avg"] += share * value.clip_fraction.item()
    with run.meter.phase("optimizer"):
        metrics["grad_norm"] = online.learner.step()
        metrics["grad_norm/value"] = critic.step()
    return metrics | ({"val/logprob_drift": drift} if untouched else {})
