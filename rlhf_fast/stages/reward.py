"""Reward model: Bradley-Terry on pairs (optionally with margins) or on all pairs of K ranked answers.

The reward model starts from the SFT model with a new scalar head. After the training the scores are shifted so that the
SFT model's own samples score 0 on average (arXiv 2009.01325), because a policy with a KL penalty starts from there.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.config import RewardConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import (
    PreferenceExample,
    RankingExample,
    pad_id,
    pad_left,
    pad_right,
)
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm.adapters import lora_of
from rlhf_fast.lm.balance import leave_out
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.loading import default_device, load_policy, load_scorer, mark_trained_here, set_score_offset
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import whole
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import RankingLoss, RewardLoss, ranking_loss, reward_loss
from rlhf_fast.ranks import current
from rlhf_fast.rollout.sampler import LocalSampler
from rlhf_fast.stages.offline import Offline
from rlhf_fast.training.batches import OfflineBatches, micro_batches
from rlhf_fast.training.learner import autocast
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import mean_and_se
from rlhf_fast.training.progress import passes
from rlhf_fast.training.resume import resume_directory
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally

Example = PreferenceExample | RankingExample


@writes_alone("output_dir")
@trusts_as_asked
def train(config: RewardConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains a reward model from `config.model` on `config.train_data`; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    pad = pad_id(tokenizer)
    data = encode_stage("reward", config.train_data, tokenizer, config)
    examples: list[Example] = data.examples
    held_out = encode_stage("reward", config.eval_data, tokenizer, config).examples if config.eval_data else []
    batches = OfflineBatches(len(examples), config.batch_size, config.epochs, config.seed)
    torch.manual_seed(config.seed)  # for the new head
    start = resume_directory(config) or config.model
    model = load_scorer(start, dtype=config.dtype, lora=lora_of(config), shard=config.shard).to(device)  # pyright: ignore[reportArgumentType]
    mark_trained_here(model)
    leave_out(model, "the reward stage")
    check_rows(model, tokenizer, [row for e in (*examples, *held_out) for row in _answers(e)], "max_length")
    prompts = [e.prompt_ids for e in examples[: config.normalize_samples]]
    lengths = "max_prompt_length, max_response_length"
    check_rows(model, tokenizer, prompts, lengths, response=config.max_response_length)

    def loss(rows: list[int], pairs: int, tally: Tally) -> Tensor:
        micro = [examples[i] for i in rows]
        weight = sum(map(_pairs, micro)) / pairs
        out = preference_loss(model, micro, pad, config.center_coef)
        tally.add("loss", weight * out.loss.double())
        tally.add("accuracy", weight * out.accuracy.double())
        return out.loss * weight

    def look(run: Run) -> dict[str, float]:
        metrics = evaluate(model, held_out, pad, config)
        run.note(**metrics)
        return metrics

    stage = Offline(
        config,
        "reward model",
        model,
        tokenizer,
        batches,
        role="reward",
        whole=lambda rows: sum(_pairs(examples[i]) for i in rows),
        held_out=look if held_out else None,
        show=("loss", "accuracy"),
        listeners=listeners,
    )
    with stage.training(data) as run:
        stage.steps(loss)
        if config.normalize_samples:
            run.save_state(run.total_steps)  # sampling may fail, and the trained weights must not be lost then
            mean, se = normalize(model, examples, tokenizer, config)
            run.note(score_offset=mean, score_offset_se=se)


def preference_loss(
    model: PreTrainedModel, batch: list[Example], pad: int, center_coef: float
) -> RewardLoss | RankingLoss:
    """Loss and accuracy of a batch of pairs or of rankings; all answers go through the model in one forward pass.

    batch: examples of one kind. center_coef: weight of the mean of (s_i + s_j)^2 over pairs.
    """
    if isinstance(batch[0], RankingExample):
        rankings = cast(list[RankingExample], batch)
        ranks_BK = pad_right([[rank + 1 for rank in e.ranks] for e in rankings], 0)[0].to(model.device) - 1  # -1: none
        answers = [(e.prompt_ids, ids) for e in rankings for ids in e.completion_ids]
        scores_BK = torch.zeros(ranks_BK.shape, device=model.device)
        scores_BK = scores_BK.masked_scatter(ranks_BK >= 0, Scores(model).of(_sequences(model, answers, pad)))
        out = ranking_loss(scores_BK, ranks_BK)
        return out._replace(loss=out.loss + center_coef * _centring(scores_BK, ranks_BK)) if center_coef else out
    pairs = cast(list[PreferenceExample], batch)
    answers = [(e.prompt_ids, e.chosen_ids) for e in pairs] + [(e.prompt_ids, e.rejected_ids) for e in pairs]
    chosen_B, rejected_B = Scores(model).of(_sequences(model, answers, pad)).chunk(2)
    margins = [e.margin for e in pairs]
    margin_B = None
    if any(m is not None for m in margins):
        margin_B = torch.tensor([m or 0.0 for m in margins], device=model.device)
    return reward_loss(chosen_B, rejected_B, margin=margin_B, center_coef=center_coef)


def _centring(scores_BK: Tensor, ranks_BK: Tensor) -> Tensor:
    """The mean of (s_i + s_j)^2, as in `reward_loss`, over the pairs of `ranking_loss`."""
    pairs_BKK = (ranks_BK[:, :, None] >= 0) & (ranks_BK[:, :, None] < ranks_BK[:, None, :])
    sums_BKK = scores_BK[:, :, None] + scores_BK[:, None, :]
    return torch.where(pairs_BKK, sums_BKK.square(), 0.0).sum() / pairs_BKK.sum().clamp(min=1)


@torch.no_grad()
def evaluate(model: PreTrainedModel, examples: list[Example], pad: int, config: RewardConfig) -> dict[str, float]:
    """Held-out loss and pair accuracy, as means over pairs, and the accuracy's standard error."""
    pairs, tally, mine = sum(map(_pairs, examples)), Tally(), current().share(examples)
    with whole(model), autocast(model.device, config.bf16):
        for rows in passes("held out", micro_batches(len(mine), config.micro_batch_size or config.batch_size)):
            part = [*mine[rows]]
            out = preference_loss(model, part, pad, config.center_coef)
            weight = sum(map(_pairs, part)) / pairs
            tally.add("eval/loss", weight * out.loss.double())
            tally.add("eval/accuracy", weight * out.accuracy.double())
    metrics = tally.read()
    right = metrics["eval/accuracy"]
    return metrics | {"eval/accuracy_se": math.sqrt(max(0.0, right * (1 - right)) / pairs)}


@torch.no_grad()
def normalize(
    model: PreTrainedModel, examples: list[Example], tokenizer: PreTrainedTokenizerBase, config: RewardConfig
) -> tuple[float, float]:
    """Shifts the scores so that samples of the SFT model average 0; returns the shift and its standard error."""
    dtype = "fp32" if config.frozen_weights == "fp32" else "bf16"  # decoding is faster than of a mixed model
    policy = load_policy(config.model, dtype=dtype, trainable=False, shard=config.shard).to(model.device)  # pyright: ignore[reportArgumentType]
    prompts = [e.prompt_ids for e in examples[: config.normalize_samples]]
    sampler = LocalSampler(policy, tokenizer, max_new_tokens=config.max_response_length)
    ranks, scorer, scores = current(), Scores(model), []
    with whole(model), autocast(model.device, config.bf16):
        for rows in passes("offset", micro_batches(len(prompts), 4 * config.batch_size)):
            mine, scored = ranks.share(prompts[rows]), []
            if mine:
                rollout = sampler(mine, seed=config.seed, earlier=ranks.earlier(prompts[rows])).sampled
                scored = scorer.of(rollout.sequences).tolist()
            scores.append(scored)
    mean, se = mean_and_se(torch.tensor(ranks.join(scores)))
    set_score_offset(model, getattr(model.config, "score_offset", 0.0) + mean)
    return mean, se


def _answers(example: Example) -> list[list[int]]:
    """The token ids of the prompt with each of its answers."""
    if isinstance(example, PreferenceExample):
        answers = [example.chosen_ids, example.rejected_ids]
    else:
        answers = example.completion_ids
    return [example.prompt_ids + ids for ids in answers]


def _pairs(example: Example) -> int:
    if isinstance(example, PreferenceExample):
        return 1
    ranks = example.ranks
    return sum(a != b for i, a in enumerate(ranks) for b in ranks[:i])


def _sequences(model: PreTrainedModel, answers: list[tuple[list[int], list[int]]], pad: int) -> Sequences:
    prompts, responses = zip(*answers, strict=True)
    return Sequences(*pad_left(list(prompts), pad), *pad_right(list(responses), pad)).to(model.device)
