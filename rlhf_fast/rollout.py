"""Sampling from a policy in-process: one prefill, one decode loop over a KV cache, for all rows of a prompt at once.

Each prompt is prefilled once; its cache is then expanded to its sampled rows and, for ReMax, one greedy row, and all
decode together, so that the greedy baseline rides along in steps that are paid for anyway. Finished rows leave the
batch. The log-probs met while decoding are kept: they are the old policy's, and no second pass is needed.

Sampling is from the full softmax at `temperature`, which is what the training passes compute.
Left out on purpose: text, rewards, and any decoding trick that changes the distribution.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.models import Sequences, forward_inputs, position_ids
from rlhf_fast.ops import sample_tokens

# Copying the cache costs about one step; waiting until a quarter of the rows are done keeps that rare.
_COMPACT_BELOW = 0.75


class Rollout(NamedTuple):
    """Completions of B rows; P prompt tokens, T response tokens. Masked entries are pad ids and zeros."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] int64, right-padded, EOS included
    response_mask: Tensor  # [B, T] bool, True up to and including the EOS
    logprobs: Tensor  # [B, T] fp32, of the chosen tokens at the sampling temperature
    entropy: Tensor  # [B, T] fp32
    finished: Tensor  # [B] bool, an EOS came before the length limit

    @property
    def sequences(self) -> Sequences:
        return Sequences(*self[:4])

    def rows(self, index: slice | Tensor) -> "Rollout":
        return Rollout(*(x[index] for x in self))


class Generation(NamedTuple):
    sampled: Rollout  # [B * samples] rows, a prompt's samples consecutive
    greedy: Rollout | None  # [B] rows


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode: in train mode a model that checkpoints its activations silently drops the KV cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    samples: int = 1,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Generation:
    """Sample `samples` completions per prompt and, with `greedy`, the most likely-token one, in one decode.

    prompt_ids, prompt_mask: [B, P], left-padded. The same generator state gives the same tokens.
    """
    if not prompt_mask[:, -1].all():
        raise ValueError("prompt_mask: expected left-padded prompts whose last column is True, got a False there")
    if samples + greedy < 1:
        raise ValueError(f"samples: expected at least one row per prompt, got samples={samples}, greedy={greedy}")
    device, (B, P), rows_per_prompt = prompt_ids.device, prompt_ids.shape, samples + int(greedy)
    R, T = B * rows_per_prompt, max_new_tokens
    eos = torch.tensor(list(eos_ids), device=device)
    greedy_R = torch.zeros(B, rows_per_prompt, dtype=torch.bool, device=device)
    greedy_R[:, samples:] = True
    greedy_R = greedy_R.flatten()

    tokens_RT = torch.full((R, T), pad_id, dtype=torch.long, device=device)
    mask_RT = torch.zeros(R, T, dtype=torch.bool, device=device)
    logprobs_RT, entropy_RT = torch.zeros(R, T, device=device), torch.zeros(R, T, device=device)
    finished_R = torch.zeros(R, dtype=torch.bool, device=device)

    with _evaluating(model):
        cache = DynamicCache(config=model.config)
        positions = position_ids(prompt_mask)
        logits = _last_logits(model, forward_inputs(model, prompt_ids, prompt_mask, positions), cache)
        if rows_per_prompt > 1:
            cache.batch_repeat_interleave(rows_per_prompt)
        logits = logits.repeat_interleave(rows_per_prompt, dim=0)
        attention = torch.cat([prompt_mask.repeat_interleave(rows_per_prompt, dim=0), mask_RT.new_ones(R, T)], dim=1)
        position = positions[:, -1:].repeat_interleave(rows_per_prompt, dim=0)

        live = torch.arange(R, device=device)  # the row of the output each row of the batch writes to
        for t in range(T):
            chosen = sample_tokens(logits, temperature=temperature, greedy_mask=greedy_R[live], generator=generator)
            running = ~finished_R[
                live
            ]  # rows that finished since the last compaction still decode; drop what they make
            tokens_RT[live, t] = torch.where(running, chosen.tokens, pad_id)
            logprobs_RT[live, t] = torch.where(running, chosen.logprobs, 0.0)
            entropy_RT[live, t] = torch.where(running, chosen.entropy, 0.0)
            mask_RT[live, t] = running
            finished_R[live] |= torch.isin(chosen.tokens, eos)
            keep = (~finished_R[live]).nonzero().squeeze(1)
            if len(keep) == 0 or t == T - 1:
                break
            inputs_ids = chosen.tokens
            if len(keep) < _COMPACT_BELOW * len(live):
                cache.batch_select_indices(keep)
                live, attention, position, inputs_ids = live[keep], attention[keep], position[keep], inputs_ids[keep]
            position = position + 1
            inputs = forward_inputs(model, inputs_ids[:, None], attention[:, : P + t + 1], position)
            logits = _last_logits(model, inputs, cache)

    length = t + 1
    rollout = Rollout(
        prompt_ids.repeat_interleave(rows_per_prompt, dim=0),
        prompt_mask.repeat_interleave(rows_per_prompt, dim=0),
        *(x[:, :length] for x in (tokens_RT, mask_RT, logprobs_RT, entropy_RT)),
        finished_R,
    )
    if not greedy:
        return Generation(rollout, None)
    return Generation(rollout.rows(~greedy_R), rollout.rows(greedy_R))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and whatever the model's generation config adds."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    ids = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not ids:
        raise ValueError("tokenizer: expected an eos_token, got none; a completion could never end")
    return ids


def _last_logits(model: PreTrainedModel, inputs: dict[str, Tensor], cache: DynamicCache) -> Tensor:
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]
