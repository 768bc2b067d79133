"""Scores of a model's completions: several per prompt, at any temperature, by several rewards."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.encoding import PromptExample
from rlhf_fast.rollout.sampler import LocalSampler
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.evaluation import prompt_columns
from rlhf_fast.training.progress import passes
from rlhf_fast.training.rewards import Reward

_ROWS = 512  # decoded at once


@torch.no_grad()
def sample_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptExample],
    rewards: list[Reward],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Tensor]:
    """Per reward the scores [prompts, samples] of the same completions; temperature 0 takes the likeliest tokens."""
    greedy = temperature == 0
    if greedy and samples > 1:
        raise ValueError(f"samples: expected 1 at temperature 0, got {samples}")
    sampler = LocalSampler(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature or 1.0)
    scores: list[list[Tensor]] = [[] for _ in rewards]
    for rows in passes("samples", micro_batches(len(prompts), max(1, _ROWS // samples))):
        part = prompts[rows]
        sampled, likeliest = sampler(
            [p.prompt_ids for p in part], seed=seed, samples=0 if greedy else samples, greedy=greedy
        )
        rollout = likeliest if greedy else sampled
        assert rollout is not None
        columns = prompt_columns([p for p in part for _ in range(samples)])
        for reward, own in zip(rewards, scores, strict=True):
            own.append(reward(rollout, columns).view(len(part), samples).cpu())
    return [torch.cat(parts) for parts in scores]
