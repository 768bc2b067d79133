"""What all online methods share: the models, rollouts, scores, reference log-probs, and the loop over rounds.

A round samples a batch of completions, scores them and takes the reference's log-probs. The method then makes an update
of them. The old policy's log-probs come from decoding. The first training pass over a rollout is compared with these
log-probs, and the run stops where they disagree, because a silent mismatch would bias every ratio and gradient.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.config import OnlineConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import PromptExample, epoch_batches, pad_id
from rlhf_fast.data.rows import load_rows
from rlhf_fast.lm.balance import leave_out
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.offload import place, visiting
from rlhf_fast.lm.room import EVALUATIONS, INSTEAD, PASSES, ROLLOUTS, check_room
from rlhf_fast.lm.sharding import shard, shard_frozen, whole, whole_bytes
from rlhf_fast.lm.tokenizers import check_tokenizer, load_tokenizer
from rlhf_fast.ops import kl_penalty, soft_overlong_punishment
from rlhf_fast.ranks import current
from rlhf_fast.rollout.generate import Generation, Rollout, settle
from rlhf_fast.rollout.samplers import Samplers
from rlhf_fast.stages.dynamic import Drawn, even, replaced
from rlhf_fast.stages.kl import KLController
from rlhf_fast.stages.rounds import rounds
from rlhf_fast.stages.shares import Everyone, Shares
from rlhf_fast.training.batches import micro_batches, seed_everything, step_seed
from rlhf_fast.training.evaluation import check_prompts, make_evaluator, prompt_columns, scored_prompts
from rlhf_fast.training.learner import Learner, autocast
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.mismatch import correction_of, rescored
from rlhf_fast.training.resume import load_policy_and_reference
from rlhf_fast.training.rewards import Answers, Reward, Scored
from rlhf_fast.training.run import Run
from rlhf_fast.training.stopped import Diverged
from rlhf_fast.training.tally import Tally


class Experience(NamedTuple):
    """One round's data: B completions, T response tokens."""

    rollout: Rollout
    scores: Tensor  # [B], less the penalty for a missing EOS
    greedy_scores: Tensor | None  # [B], ReMax's baseline
    ref_logprobs: Tensor  # [B, T]
    parts: dict[str, Tensor]  # of several rewards: name -> scores [B] float64, NaN where it does not judge
    weights: Tensor | None = None  # [B, T] fp32, of each token's policy loss, where another engine has sampled
    batches: int = 1  # that were sampled to get these completions
    everyone: Everyone | None = None  # where `Online.run` has exchanged it

    def weighed(self, advantages: Tensor) -> Tensor:
        """Advantages [B] or [B, T] times `weights`.

        A clipped loss min(r A, clip(r) A) times w >= 0 is the clipped loss of w A.
        """
        if self.weights is None:
            return advantages
        return (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)) * self.weights


_DRIFT, _MEAN_DRIFT = "val/logprob_drift", "val/logprob_drift_mean"  # the largest, and the mean, in nats a token
_DRIFT_SUM, _DRIFT_TOKENS = "val/logprob_drift_sum", "val/logprob_drift_tokens"  # what the mean is made of


Config = TypeVar("Config", bound=OnlineConfig)


class Online(Generic[Config]):
    """Models, prompts and reward of an online method, and the loop over rounds.

    samples: completions per prompt. greedy: also decode each prompt's greedy completion, in the same batch.
    greedy_length: tokens of a greedy completion at most; default: the limit of sampled completions.
    updates_per_round: optimizer steps that the method takes on each rollout.
    Raises ValueError where there are fewer prompts than a round takes, and where a model cannot read a row.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        *,
        samples: int = 1,
        greedy: bool = False,
        greedy_length: int | None = None,
        updates_per_round: int = 1,
    ) -> None:
        self.config, self.name, self.samples = config, name, samples
        self.greedy = greedy
        self.device, self.ranks = default_device(), current()
        self.tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
        if config.reference is not None:
            check_tokenizer(config.reference, self.tokenizer, "reference")
        rows = load_rows(config.train_data, "prompt", config.columns)
        data = scored_prompts(rows, self.tokenizer, config.max_prompt_length, config.chat_template_kwargs)
        self.prompts, self.truncated = data.examples, data.truncated
        self.prompts_per_round = config.batch_size // samples
        if self.prompts_per_round < self.ranks.size:
            raise ValueError(
                f"batch_size: expected at least a prompt for each of {self.ranks.size} processes, got "
                f"{config.batch_size} completions of {self.prompts_per_round} prompts"
            )
        if len(self.prompts) < self.prompts_per_round:
            raise ValueError(
                f"train_data: expected at least {self.prompts_per_round} prompts (one round), got {len(self.prompts)}"
            )
        self.policy, reference = load_policy_and_reference(config, self.device)
        leave_out(self.policy, "an online stage")
        self.reference = place(reference, self.device, config.offload and config.shard == "none")
        with visiting(self.reference):
            self.objectives, self.reference_objectives = (
                Objectives(model, temperature=config.temperature, fused=config.fused_head)
                for model in (self.policy, self.reference)
            )
        if config.vllm_url is None:
            settle(self.policy)  # before the first round, whose memory is that of every round
        # before more models are loaded
        shard(self.policy, config.shard_trained, checkpointing=config.gradient_checkpointing)
        self._check_room()
        shard_frozen(self.reference, self.policy, config.shard, offload=config.offload)
        self.reward = Reward(
            config.reward,
            self.tokenizer,
            self.device,
            weights=config.reward_weights,
            micro_batch_size=config.micro_batch_size,
            max_prompt_length=config.max_prompt_length,
            shared=self.policy if config.share_base else None,
            offload=config.offload,
            dtype=config.frozen_weights,
            timeout=config.reward_timeout,
            shard=config.shard,
        )
        self.reward.check(prompt_columns(self.prompts))
        self.samplers, self.correction = Samplers(config, self.tokenizer, config.output_dir), correction_of(config)
        self.sampler = self.samplers(
            self.policy,
            [prompt.prompt_ids for prompt in self.prompts],
            max_new_tokens=config.max_response_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            greedy_max_new_tokens=greedy_length,
        )
        self.check_lengths(model=self.policy, reference=self.reference, **self.reward.readers)
        self.evaluator = make_evaluator(config, self.tokenizer, self.device, self.reference, self.reward, self.samplers)
        self.updates = config.steps * updates_per_round
        self.learner = Learner(self.policy, config, self.updates)
        self.drift_bound = self._drift_bound()
        self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.rounds = rounds(self.sampler, self.question, ahead=config.rollouts_ahead, last=config.steps)

    def run(
        self,
        update: Callable[[Run, Experience], dict[str, float]],
        *,
        learners: dict[str, Learner] | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """Collects and updates for config.steps rounds.

        update: takes the optimizer steps of a round and returns the metrics. learners: role -> trained model besides
            the policy.
        """
        trained = {"policy": self.learner, **(learners or {})}
        frozen = {"reference": self.reference, **self.reward.models}
        later = sum(learner.bytes_to_come for learner in trained.values())
        self._check_room(later)
        for role, model in {**{role: learner.model for role, learner in trained.items()}, **frozen}.items():
            if role != "policy":
                check_room(whole_bytes(model), role, PASSES, self.device, later=later)
        if self.evaluator is not None:
            both = whole_bytes(self.policy, self.reference)
            check_room(both, "policy and reference", EVALUATIONS, self.device, later=later)
        with (
            closing(self.rounds),
            Run(
                self.config,
                self.name,
                self.config.steps,
                learners=trained,
                tokenizer=self.tokenizer,
                frozen=frozen,
                states={"kl": self.kl, **self.rounds.states},
                evaluator=self.rounds.guard(self.evaluator),
                show=("objective/scores", "objective/kl", _DRIFT),
                listeners=listeners,
            ) as run,
        ):
            run.note(prompts=len(self.prompts), truncated_prompts=self.truncated)
            for step in run.steps():
                experience = self.collect(run.meter, step)
                for listener in run.listeners:
                    listener.collected(step, experience)
                described, everyone = self._describe(experience)
                metrics = {**described, **update(run, experience._replace(everyone=everyone))}
                self.samplers.changed()
                metrics |= {"lr": self.learner.lr, "episode": step * self.config.batch_size}
                self.kl.update(metrics["objective/kl"], self.config.batch_size)
                del experience  # else it would take memory while the next round is sampled
                with run.meter.phase("rollout"):
                    self.rounds.settle(step)
                run.end_step(step, metrics)
            run.finish()

    def _check_room(self, later: int = 0) -> None:
        """NoRoom where the policy cannot be made whole for rollouts. later: bytes of the optimizers' states to come."""
        if self.config.sampler == "local":
            copy = whole_bytes(self.policy)
            check_room(copy, "policy", ROLLOUTS, self.device, later=later, instead=INSTEAD)

    def check_lengths(self, **models: PreTrainedModel | None) -> None:
        """ValueError unless every one of `models` (role -> model) can read this run's prompts and completions."""
        check_prompts(self.prompts, self.config.max_response_length, self.tokenizer, **models)

    def collect(self, meter: Meter, step: int) -> Experience:
        """Samples, scores and takes the reference's log-probs for round `step`."""
        seed_everything(self.config.seed, step)
        with autocast(self.device, self.config.bf16), torch.no_grad():
            with meter.phase("rollout"):
                generation = self.rounds.take(step)
            drawn, batches = self._judged(meter, generation, self._round_prompts(step)), 1
            for more in range(1, getattr(self.config, "max_num_gen_batches", 1)):
                if not self.ranks.sum(even(drawn.scores, self.samples).sum()):
                    break
                with meter.phase("rollout"):
                    generation = self.sampler(**self.question(step, more))
                found = self._judged(meter, generation, self._round_prompts(step, more))
                drawn = replaced(drawn, found, self.samples, pad_id(self.tokenizer), self.ranks)
                batches += 1
            rollout = drawn.rollout
            if self.samplers.remote:
                with meter.phase("rescoring"), whole(self.policy):
                    rollout = rescored(rollout, self.objectives, self.config.micro_batch_size)
            with meter.phase("reference"), visiting(self.reference):
                ref_logprobs = torch.cat(
                    [
                        self.reference_objectives.logprobs(part.sequences, kept=part.kept).logprobs
                        for part in map(rollout.rows, micro_batches(len(drawn.scores), self.config.micro_batch_size))
                    ]
                )
        weights = self.correction.weights(rollout)
        return Experience(rollout, *drawn[1:3], ref_logprobs, drawn.parts, weights, batches)

    def _judged(self, meter: Meter, generation: Generation, every: list[PromptExample]) -> Drawn:
        """This process's completions with their scores. every: the prompts of all processes."""
        (rollout, greedy), prompts = generation, [*self.ranks.share(every)]
        with meter.phase("scoring"):
            columns = prompt_columns([p for p in prompts for _ in range(self.samples)])
            scores, parts = self._score(rollout, columns)
            greedy_scores = self._score(greedy, prompt_columns(prompts)).scores if greedy is not None else None
        return Drawn(rollout, scores, greedy_scores, parts)

    def note_drift(self, tally: Tally, logprobs: Tensor, rollout: Rollout) -> None:
        """Tallies the largest and the mean |training-time - decode-time| log-prob of a micro-batch, for `check_drift`.

        Call it before the first optimizer step on a rollout, while both log-probs come from the same weights.
        """
        drift_BT = (logprobs.detach() - rollout.logprobs).abs()
        tally.raise_to(_DRIFT, drift_BT.max())
        tally.add(_DRIFT_SUM, torch.where(rollout.response_mask, drift_BT, 0.0).sum())
        tally.add(_DRIFT_TOKENS, rollout.response_mask.sum())

    def note_mean_drift(self, tally: Tally, logps: Tensor, rollout: Rollout) -> None:
        """`note_drift` of the mean over a completion's tokens, where only summed log-probs [B] are known.

        logps: [B], summed over the tokens of each completion.
        """
        decoded_B, tokens_B = rollout.logprobs.sum(dim=1), rollout.response_mask.sum(dim=1)
        drift_B = (logps.detach() - decoded_B).abs()
        tally.raise_to(_DRIFT, (drift_B / tokens_B).max())
        tally.add(_DRIFT_SUM, drift_B.sum())
        tally.add(_DRIFT_TOKENS, tokens_B.sum())

    def check_drift(self, metrics: dict[str, float]) -> None:
        """Makes the mean drift of a step's sums in `metrics`. Diverged where a drift is past its bound.

        The mean is of all tokens of a step, because a micro-batch may hold a single short completion.
        """
        if _DRIFT in metrics:
            metrics[_MEAN_DRIFT] = metrics.pop(_DRIFT_SUM) / max(1.0, metrics.pop(_DRIFT_TOKENS))
        key, bound, name = self.drift_bound
        if key in metrics and not metrics[key] <= bound:
            raise Diverged(
                f"decode-time and training-time log-probs differ by {metrics[key]:.3g}, more than {name}={bound}; the "
                "policy would be trained on another distribution than it sampled",
                remedy="a larger max_logprob_drift",
            )

    def own_rows(self, rows: Tensor) -> Tensor:
        """Which of a round's completions are this process's, as indices into its rollout, on the device.

        rows: numbers of completions among those of all processes, int64.
        """
        first, last = self._place(self.ranks.rank)
        return (rows[(rows >= first) & (rows < last)] - first).to(self.device)

    def shares(self, experience: Experience, rows: Tensor) -> Shares:
        """What the processes have of these completions. rows: as in `own_rows`."""
        assert experience.everyone is not None  # `run` has exchanged it
        places = map(self._place, range(self.ranks.size))
        counts = [int(((rows >= first) & (rows < last)).sum()) for first, last in places]
        return Shares(counts, experience.everyone.lengths[rows.to(self.device)].sum())

    def _place(self, rank: int) -> tuple[int, int]:
        """The numbers of the first completion of a process, and of the first one behind its completions."""
        part = self.ranks.part(self.prompts_per_round, rank)
        return part.start * self.samples, part.stop * self.samples

    def _drift_bound(self) -> tuple[str, float, str]:
        """The metric that is checked, its largest right value, and the name of the bound.

        In fp32 no token may drift by more than 0.01, where the drift of right paths is 1e-6 to 1e-4. In bf16 the
        largest drift says little, because an unlikely token of a large vocabulary drifts by half a nat: SmolLM2-135M's
        drifts are 0.03 on average, 0.13 at the 99th percentile and up to 0.5. So the mean is checked there.
        """
        if self.config.max_logprob_drift is not None:
            return _DRIFT, self.config.max_logprob_drift, "max_logprob_drift"
        if self.config.bf16 or self.config.dtype == "bf16":
            return _MEAN_DRIFT, 0.1, "the mean's bound in bf16 (max_logprob_drift sets a bound for single tokens)"
        return _DRIFT, 0.01, "max_logprob_drift"

    def _score(self, rollout: Rollout, columns: dict[str, list]) -> Scored:
        scored = self.reward.judge(Answers(self.tokenizer, columns, rollout=rollout))
        scores_B = scored.scores - self.config.missing_eos_penalty * (~rollout.finished).float()
        if self.config.soft_punish_cache:
            lengths_B = rollout.response_mask.sum(dim=1)
            longest, cache = self.config.max_response_length, self.config.soft_punish_cache
            scores_B = scores_B + soft_overlong_punishment(lengths_B, longest, cache).to(scores_B)
        return scored._replace(scores=scores_B)

    def question(self, step: int, more: int = 0) -> dict[str, Any]:
        """What round `step` asks of a sampler for this process's prompts. more: as in `_round_prompts`."""
        every = self._round_prompts(step, more)
        ids, earlier = ([p.prompt_ids for p in part] for part in (self.ranks.share(every), self.ranks.earlier(every)))
        seed = (step_seed(self.config.seed, step) + more) % 2**63
        return {"prompts": ids, "earlier": earlier, "seed": seed, "samples": self.samples, "greedy": self.greedy}

    def _round_prompts(self, step: int, more: int = 0) -> list[PromptExample]:
        """The prompts of round `step`. more: the number of the batch; each has a shuffled order of its own."""
        per_epoch = len(self.prompts) // self.prompts_per_round
        epoch, index = divmod(step - 1, per_epoch)
        batches = epoch_batches(len(self.prompts), self.prompts_per_round, self.config.seed + more, epoch)
        return [self.prompts[i] for i in batches[index]]

    def _describe(self, experience: Experience) -> tuple[dict[str, float], Everyone]:
        """The metrics of a rollout, as means over the completions of all processes; `Experience.everyone`."""
        rollout, mask, tally = experience.rollout, experience.rollout.response_mask, Tally()
        kl_B = kl_penalty(rollout.logprobs, experience.ref_logprobs, "k1").where(mask, 0.0).sum(dim=1)
        share = len(kl_B) / self.config.batch_size
        tally.add("objective/kl", share * kl_B.mean())
        tally.add("objective/entropy", share * rollout.entropy.sum(dim=1).mean())
        tally.add("objective/scores", share * experience.scores.mean())
        tally.add("objective/length", share * mask.sum(dim=1).float().mean())
        tally.add("val/num_eos_tokens", rollout.finished.sum())
        if getattr(self.config, "max_num_gen_batches", 1) > 1:
            tally.same("sampling/batches", experience.batches)
            share_of_prompts = self.samples / self.config.batch_size
            tally.add("sampling/even_prompts", share_of_prompts * even(experience.scores, self.samples).sum())
        if experience.greedy_scores is not None:
            tally.add("objective/greedy_scores", share * experience.greedy_scores.mean())
        for name, part_B in experience.parts.items():
            tally.add(f"objective/scores/{name}", part_B.nansum())
            tally.add(f"judged/{name}", (~part_B.isnan()).sum())
        self.correction.note(tally, rollout, experience.weights)
        everyone = Everyone(mask.sum(dim=1), rollout.finished)
        numbers, told = tally.exchange([part.tolist() for part in everyone] if self.ranks.size > 1 else [])
        if self.ranks.size > 1:
            columns = ([value for part in column for value in part] for column in zip(*told, strict=True))
            everyone = Everyone(*(torch.tensor(column, device=self.device) for column in columns))
        metrics = self.correction.describe(numbers)
        self.correction.check(metrics)
        for name in experience.parts:  # the mean over the completions that this reward judges
            judged, total = metrics.pop(f"judged/{name}"), metrics.pop(f"objective/scores/{name}")
            if judged:
                metrics[f"objective/scores/{name}"] = total / judged
        non_score = -self.kl.coef * metrics["objective/kl"]
        metrics |= {
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": metrics["objective/scores"] + non_score,
            "objective/kl_coef": self.kl.coef,
            "val/num_eos_tokens": int(metrics["val/num_eos_tokens"]),
        }
        return metrics, everyone
