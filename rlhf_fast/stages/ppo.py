"""PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Stiennon et al. 2020).

There are four models: policy, value, reward, reference. With LoRA the reference is the policy's base. With `share_base`
all four models stand on this base. With `critic: shared` the value model is a head on the policy's trunk. The reward is
the score at the last token, less the KL penalty at every token. Advantages are GAE's (arXiv 1506.02438), whitened over
the rollout. Several epochs of minibatches follow, with clipped policy and value losses. `value_lam` and
`length_adaptive_alpha` are those of VAPO (arXiv 2504.05118); `stages.clipped` has the other policy losses.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.config import PPOConfig
from rlhf_fast.lm.adapters import lora_of
from rlhf_fast.lm.forward import within
from rlhf_fast.lm.loading import load_scorer, value_head_on
from rlhf_fast.lm.passes import response_hidden
from rlhf_fast.lm.private import score_head
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.sharding import shard, whole
from rlhf_fast.lm.tokenizers import check_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import LinearPPOLoss, ValueLoss, gae, length_adaptive_lambda, ppo_value_loss, shape_rewards
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.clipped import denominator, loss_options
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.shares import Shares
from rlhf_fast.stages.updates import several_epochs, whiten_all
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.learner import Learner, take_step, training_passes
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.resume import resume_directory
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally


class Targets(NamedTuple):
    """The targets of a rollout, [B, T] fp32 each and fixed over its epochs."""

    advantages: Tensor  # whitened, then weighed where another engine has sampled
    returns: Tensor
    values: Tensor  # from the value model before its first step on the rollout
    ref_logprobs: Tensor  # of the reference


@writes_alone("output_dir")
@trusts_as_asked
def train(config: PPOConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` by PPO; the policy goes to `config.output_dir`, the value model to its folder `value`."""
    online = Online(config, "PPO", updates_per_round=config.epochs * config.minibatches)
    critic = load_critic(online)

    def update(run: Run, experience: Experience) -> dict[str, float]:
        targets = advantages_and_returns(run, online, critic, experience)
        assert experience.everyone is not None  # `run` has exchanged it
        tokens = experience.everyone.lengths.sum()  # of the round
        return several_epochs(online, experience, targets, partial(minibatch_update, run, online, critic, tokens))

    online.run(update, learners={"value": critic}, listeners=listeners)


def load_critic(online: Online[PPOConfig]) -> Learner:
    """The value model and its learner: a model of its own, on the policy's base (share_base), or a head on the policy.

    Raises ValueError where `critic: shared` meets a policy whose logits do not come from its hidden states.
    """
    config, resumed = online.config, resume_directory(online.config)
    saved = resumed / "value" if resumed else None
    if config.critic == "shared":
        if online.objectives.head is None:
            raise ValueError(f"critic: expected model, as no hidden states give the logits of {config.model}")
        model = value_head_on(online.policy, saved, config.shard)
    else:
        path = saved or config.value_model or value_start(online)
        check_tokenizer(path, online.tokenizer, "value_model")
        shared = online.policy if config.share_base else None
        lora, how = lora_of(config), config.shard
        with whole(shared):
            model = load_scorer(path, dtype=config.dtype, head="zero", lora=lora, shared=shared, shard=how)
            model.to(online.device)  # pyright: ignore[reportArgumentType]
            online.check_lengths(value_model=model)
            shard(model, config.shard_trained, checkpointing=config.gradient_checkpointing)
    trained = score_head(model).parameters() if config.critic == "shared" else None
    return Learner(model, config, online.updates, learning_rate=config.value_learning_rate, parameters=trained)


def value_start(online: Online) -> str:
    """The model that a value model starts from by default: the reward model where it reads the policy's tokens."""
    return online.reward.reading_spec or online.config.model


def advantages_and_returns(run: Run, online: Online[PPOConfig], critic: Learner, experience: Experience) -> Targets:
    """The targets of a rollout: values of the value model, rewards less the KL penalty, and GAE."""
    config, rollout, mask = online.config, experience.rollout, experience.rollout.response_mask
    scores = critic_scores(online, critic)
    with run.meter.phase("value"), torch.no_grad(), whole(scores.root), critic.autocast():
        rows = micro_batches(len(mask), config.micro_batch_size)
        values = torch.cat([scores.values(rollout.rows(r).sequences) for r in rows])
    in_reward = config.kl_in == "reward"
    rewards = shape_rewards(
        experience.scores,
        rollout.logprobs,
        experience.ref_logprobs,
        mask,
        kl_coef=online.kl.coef if in_reward else 0.0,
        estimator=config.estimator,
    )
    if config.whiten_rewards:
        rewards = whiten_all(online, rewards, mask, shift_mean=False)
    alpha, lam, value_lam = config.length_adaptive_alpha, config.lam, config.value_lam
    if alpha:
        lam, value_lam = length_adaptive_lambda(mask.sum(dim=1), alpha), lam if value_lam is None else value_lam
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=lam, value_lam=value_lam)
    return Targets(experience.weighed(whiten_all(online, advantages, mask)), returns, values, experience.ref_logprobs)


def minibatch_update(
    run: Run,
    online: Online[PPOConfig],
    critic: Learner,
    round_tokens: Tensor,
    rollout: Rollout,
    targets: tuple[Tensor, ...],
    shares: Shares,
    untouched: bool,
) -> dict[str, float]:
    """One optimizer step of policy and value model; the value loss's denominator is the minibatch's tokens.

    round_tokens: of the whole rollout of all processes. targets: the fields of `Targets`. shares, untouched: as in
    `several_epochs`.
    """
    tokens, tally = shares.tokens, Tally()
    backward = joint_backward if online.config.critic == "shared" else separate_backward
    for rows in training_passes(shares.rows, online.config.micro_batch_size, online.learner, critic):
        part, target = rollout.rows(rows), Targets(*(x[rows] for x in targets))
        policy, value = backward(run, online, critic, part, target, tokens, round_tokens)
        if untouched:
            online.note_drift(tally, policy.logprobs, part)
        share = (part.response_mask.sum() / tokens).double()
        tally.add("loss/policy_avg", policy.loss)
        tally.add("loss/value_avg", value.loss)
        tally.add("policy/clipfrac_avg", share * policy.clip_fraction)
        tally.add("policy/approxkl_avg", share * policy.approx_kl)
        tally.add("policy/entropy_avg", policy.token_entropy.sum() / tokens)
        tally.add("val/ratio", share * policy.ratio_mean)
        tally.add("val/clipfrac_avg", share * value.clip_fraction)
    with run.meter.phase("optimizer"):
        return take_step(tally, {"grad_norm": online.learner, "grad_norm/value": critic}, online.check_drift)


def separate_backward(
    run: Run, online: Online[PPOConfig], critic: Learner, part: Rollout, target: Targets, *tokens: Tensor
) -> tuple[LinearPPOLoss, ValueLoss]:
    """Policy and value model, each with a forward and a backward pass of its own."""
    with run.meter.phase("policy_update"):
        with online.learner.autocast():
            policy = policy_loss(online, part, target, *tokens)
        online.learner.backward(policy.loss)
    with run.meter.phase("value_update"):
        with critic.autocast():
            values = critic_scores(online, critic).values(part.sequences)
            value = value_loss(online, part, target, tokens[0], values)
        critic.backward(value.loss)
    return policy, value


def joint_backward(
    run: Run, online: Online[PPOConfig], critic: Learner, part: Rollout, target: Targets, *tokens: Tensor
) -> tuple[LinearPPOLoss, ValueLoss]:
    """One forward pass of the trunk that policy and value head share, and one backward pass of both losses."""
    scores = critic_scores(online, critic)

    def losses() -> tuple[LinearPPOLoss, ValueLoss]:
        hidden_BTH = response_hidden(online.policy, part.sequences)
        policy = policy_loss(online, part, target, *tokens, hidden=hidden_BTH)
        return policy, value_loss(online, part, target, tokens[0], scores.values_of(hidden_BTH))

    with run.meter.phase("policy_update"):
        with online.learner.autocast():
            policy, value = within(online.policy, losses)
        online.learner.backward(policy.loss + online.config.value_coef * value.loss)
    return policy, value


def critic_scores(online: Online[PPOConfig], critic: Learner) -> Scores:
    """The value model's passes, which enter by the policy where the value model is a head on the policy's trunk."""
    return Scores(critic.model, root=online.policy if online.config.critic == "shared" else None)


def policy_loss(
    online: Online[PPOConfig], part: Rollout, target: Targets, tokens: Tensor, round_tokens: Tensor, **hidden: Tensor
) -> LinearPPOLoss:
    """The policy loss of a micro-batch. tokens, round_tokens: of minibatch and rollout. hidden: of `Objectives.ppo`."""
    return online.objectives.ppo(
        part.sequences,
        part.logprobs,
        target.advantages,
        kept=part.kept,
        normalizer=denominator(online, tokens, round_tokens),
        **loss_options(online, target.advantages, target.ref_logprobs),
        **hidden,
    )


def value_loss(online: Online[PPOConfig], part: Rollout, target: Targets, tokens: Tensor, values: Tensor) -> ValueLoss:
    """The clipped value loss of a micro-batch. tokens: the denominator. values: [B, T], of the model in training."""
    return ppo_value_loss(
        values, target.values, target.returns, part.response_mask, clip=online.config.value_clip, normalizer=tokens
    )
