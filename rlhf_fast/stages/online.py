"""What the online methods share: rollouts, scores, reference log-probs, the plain policy-gradient step, PPO's epochs.

A round is: sample a batch of completions; score them; take the reference's log-probs; let the method turn these into an
update. Old-policy log-probs come from decoding itself. Every first training pass over a rollout is compared with them,
and the run stops when they disagree: a silent mismatch would bias every ratio and gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.config import OnlineConfig
from rlhf_fast.data.encoding import PromptExample, encode_prompts, epoch_batches, load_rows, pad_id, pad_left
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.offload import place, visiting
from rlhf_fast.lm.tokenizers import check_tokenizer, load_tokenizer
from rlhf_fast.ops import kl_penalty
from rlhf_fast.rollout.generate import Rollout, eos_token_ids, generate
from rlhf_fast.training.batches import micro_batches, seed_everything
from rlhf_fast.training.evaluation import check_prompts, make_evaluator, prompt_columns
from rlhf_fast.training.learner import Learner, autocast
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.resume import load_policy_and_reference
from rlhf_fast.training.rewards import Reward
from rlhf_fast.training.run import Run


class Experience(NamedTuple):
    """One round's data: B completions, T response tokens."""

    rollout: Rollout
    scores: Tensor  # [B], missing-EOS penalty taken off
    greedy_scores: Tensor | None  # [B], ReMax's baseline
    ref_logprobs: Tensor  # [B, T]


class KLController:
    """Weight of the KL penalty: fixed, or adapted towards a target (arXiv 1909.08593, section 2.2)."""

    def __init__(self, coef: float, target: float | None, horizon: float) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_completion: float, completions: int) -> None:
        if self.target is not None:
            error = max(-0.2, min(0.2, kl_per_completion / self.target - 1))
            self.coef *= 1 + error * completions / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]


class Online:
    """Models, prompts and reward of an online method, and the loop over rounds.

    samples: completions per prompt. greedy: also decode each prompt's greedy completion, in the same batch.
    greedy_length: tokens of a greedy completion at most; default: as many as of a sampled one.
    updates_per_round: optimizer steps the method takes on each rollout.
    """

    def __init__(
        self,
        config: OnlineConfig,
        name: str,
        *,
        samples: int = 1,
        greedy: bool = False,
        greedy_length: int | None = None,
        updates_per_round: int = 1,
    ) -> None:
        self.config, self.name, self.samples = config, name, samples
        self.greedy, self.greedy_length = greedy, greedy_length
        self.device = default_device()
        self.tokenizer = load_tokenizer(config.model)
        if config.reference is not None:
            check_tokenizer(config.reference, self.tokenizer, "reference")
        rows = load_rows(config.train_data, "prompt")
        data = encode_prompts(rows, self.tokenizer, config.max_prompt_length)
        self.prompts, self.truncated = data.examples, data.truncated
        self.prompts_per_round = config.batch_size // samples
        if len(self.prompts) < self.prompts_per_round:
            raise ValueError(
                f"train_data: expected at least {self.prompts_per_round} prompts (one round), got {len(self.prompts)}"
            )
        self.policy, reference = load_policy_and_reference(config, self.device)
        self.reference = place(reference, self.device, config.offload)
        with visiting(self.reference):
            self.objectives, self.reference_objectives = (
                Objectives(model, temperature=config.temperature, fused=config.fused_head)
                for model in (self.policy, self.reference)
            )
        self.reward = Reward(
            config.reward,
            self.tokenizer,
            self.device,
            micro_batch_size=config.micro_batch_size,
            max_prompt_length=config.max_prompt_length,
            shared=self.policy if config.share_base else None,
            offload=config.offload,
        )
        self.check_lengths(model=self.policy, reference=self.reference, reward=self.reward.reader)
        self.evaluator = make_evaluator(config, self.tokenizer, self.device, self.reference, self.reward)
        self.updates = config.steps * updates_per_round
        self.learner = Learner(self.policy, config, self.updates)
        self.drift_bound = config.max_logprob_drift
        if self.drift_bound is None:  # seen on small models: 1e-6 to 1e-5 in fp32, 0.03 to 0.06 in bf16
            self.drift_bound = 0.5 if config.bf16 else 0.01
        self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)

    def run(
        self,
        update: Callable[[Run, Experience], dict[str, float]],
        *,
        learners: dict[str, Learner] | None = None,
    ) -> None:
        """Collect and update for config.steps rounds; `learners` are trained models besides the policy."""
        with Run(
            self.config,
            self.name,
            self.config.steps,
            learners={"policy": self.learner, **(learners or {})},
            tokenizer=self.tokenizer,
            frozen={"reference": self.reference, "reward": self.reward.model},
            states={"kl": self.kl},
            evaluator=self.evaluator,
            show=("objective/scores", "objective/kl", "val/logprob_drift"),
        ) as run:
            run.note(prompts=len(self.prompts), truncated_prompts=self.truncated)
            for step in run.steps():
                experience = self.collect(run.meter, step)
                metrics = {**self._describe(experience), **update(run, experience)}
                metrics |= {"lr": self.learner.lr, "episode": step * self.config.batch_size}
                self.kl.update(metrics["objective/kl"], self.config.batch_size)
                del experience  # else it is there, kept sets and all, while the next one is sampled
                run.end_step(step, metrics)
            run.finish()

    def check_lengths(self, **models: PreTrainedModel | None) -> None:
        """ValueError unless every one of `models` (role -> model) can read this run's prompts and completions."""
        check_prompts(self.prompts, self.config.max_response_length, self.tokenizer, **models)

    def collect(self, meter: Meter, step: int) -> Experience:
        """Sample, score and take the reference's log-probs for round `step`."""
        prompts = self._round_prompts(step)
        ids, mask = (x.to(self.device) for x in pad_left([p.prompt_ids for p in prompts], pad_id(self.tokenizer)))
        seed = seed_everything(self.config.seed, step)
        with autocast(self.device, self.config.bf16), torch.no_grad():
            with meter.phase("rollout"):
                rollout, greedy = generate(
                    self.policy,
                    ids,
                    mask,
                    max_new_tokens=self.config.max_response_length,
                    eos_ids=eos_token_ids(self.policy, self.tokenizer),
                    pad_id=pad_id(self.tokenizer),
                    temperature=self.config.temperature,
                    top_k=self.config.top_k,
                    top_p=self.config.top_p,
                    samples=self.samples,
                    greedy=self.greedy,
                    greedy_max_new_tokens=self.greedy_length,
                    seed=seed,
                )
            with meter.phase("scoring"):
                columns = prompt_columns([p for p in prompts for _ in range(self.samples)])
                scores = self._score(rollout, columns)
                greedy_scores = self._score(greedy, prompt_columns(prompts)) if greedy is not None else None
            with meter.phase("reference"), visiting(self.reference):
                ref_logprobs = torch.cat(
                    [
                        self.reference_objectives.logprobs(part.sequences, kept=part.kept).logprobs
                        for part in map(rollout.rows, micro_batches(len(scores), self.config.micro_batch_size))
                    ]
                )
        return Experience(rollout, scores, greedy_scores, ref_logprobs)

    def several_epochs(
        self, experience: Experience, targets: tuple[Tensor, ...], minibatch_update: Callable[..., dict[str, float]]
    ) -> dict[str, float]:
        """config.epochs passes over a rollout in config.minibatches steps each; returns the mean of their metrics.

        minibatch_update(rollout, targets, untouched) takes one optimizer step on the rows it is given; untouched: the
        policy is still the one that sampled.
        """
        totals: dict[str, list[float]] = {}
        for epoch in range(self.config.epochs):
            order = torch.randperm(self.config.batch_size).to(self.device)
            for number, index in enumerate(order.chunk(self.config.minibatches)):
                part = tuple(x[index] for x in targets)
                metrics = minibatch_update(experience.rollout.rows(index), part, epoch == 0 and number == 0)
                for name, value in metrics.items():
                    totals.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def policy_gradient_step(
        self, run: Run, experience: Experience, advantages: Tensor, *, reduction: str = "token_mean"
    ) -> dict[str, float]:
        """One optimizer step on reinforce_loss(advantages [B] or [B, T]); the denominator is the whole batch's."""
        rollout = experience.rollout
        total = rollout.response_mask.sum() if reduction == "token_mean" else torch.tensor(len(advantages))
        loss = drift = 0.0
        for rows in micro_batches(len(advantages), self.config.micro_batch_size):
            part = rollout.rows(rows)
            with run.meter.phase("policy_update"):
                with self.learner.autocast():
                    out = self.objectives.reinforce(
                        part.sequences, advantages[rows], kept=part.kept, reduction=reduction, normalizer=total
                    )
                out.loss.backward()
            drift = max(drift, self.check_drift(out.logprobs, part))
            loss += out.loss.item()
        with run.meter.phase("optimizer"):
            grad_norm = self.learner.step()
        return {"loss/policy_avg": loss, "val/logprob_drift": drift, "grad_norm": grad_norm}

    def check_drift(self, logprobs: Tensor, rollout: Rollout) -> float:
        """Largest |training-time - decode-time| log-prob; raises past config.max_logprob_drift.

        Call before the first optimizer step on a rollout, while both come from the same weights.
        """
        drift = (logprobs.detach() - rollout.logprobs).abs().max().item()
        if not drift <= self.drift_bound:
            raise RuntimeError(
                f"decode-time and training-time log-probs differ by {drift:.3g}, more than max_logprob_drift="
                f"{self.drift_bound}; the policy would be trained on another distribution than it sampled"
            )
        return drift

    def _score(self, rollout: Rollout, columns: dict[str, list]) -> Tensor:
        return self.reward(rollout, columns) - self.config.missing_eos_penalty * (~rollout.finished).float()

    def _round_prompts(self, step: int) -> list[PromptExample]:
        per_epoch = len(self.prompts) // self.prompts_per_round
        epoch, index = divmod(step - 1, per_epoch)
        batches = epoch_batches(len(self.prompts), self.prompts_per_round, self.config.seed, epoch)
        return [self.prompts[i] for i in batches[index]]

    def _describe(self, experience: Experience) -> dict[str, float]:
        rollout, mask = experience.rollout, experience.rollout.response_mask
        kl_B = kl_penalty(rollout.logprobs, experience.ref_logprobs, "k1").where(mask, 0.0).sum(dim=1)
        non_score = -self.kl.coef * kl_B.mean().item()
        scores = experience.scores.mean().item()
        metrics = {
            "objective/kl": kl_B.mean().item(),
            "objective/entropy": rollout.entropy.sum(dim=1).mean().item(),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": scores + non_score,
            "objective/scores": scores,
            "objective/kl_coef": self.kl.coef,
            "objective/length": mask.sum(dim=1).float().mean().item(),
            "val/num_eos_tokens": rollout.finished.sum().item(),
        }
        if experience.greedy_scores is not None:
            metrics["objective/greedy_scores"] = experience.greedy_scores.mean().item()
        return metrics
