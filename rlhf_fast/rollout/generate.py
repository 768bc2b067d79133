"""Sampling from a policy in-process: one prefill, one decode loop over a KV cache, for all rows of a prompt at once.

Each prompt is prefilled once. Its cache is then copied for its sampled rows and, for ReMax, for one greedy row. All
rows decode together, so that the greedy baseline needs few steps of its own. Finished rows leave the batch. The
log-probs of decoding are kept. They are the old policy's, so no second pass is needed.

Tokens are drawn from the softmax at `temperature`, as the training passes compute it. With top_k or top_p they are
drawn from the tokens that top_k and top_p keep; the rollout holds the kept tokens, so that the training passes use the
same sets. A row's random numbers depend on the seed, on its prompt and on its number among the prompt's samples. The
same seed therefore gives the same tokens whatever else is in the batch, unless a draw falls within rounding of the
boundary between two tokens.
Left out on purpose: text, rewards, and any decoding trick that changes the distribution.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.turns import end_ids
from rlhf_fast.lm.dtypes import as_it_runs
from rlhf_fast.lm.limits import check_completions
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.switches import switching_length
from rlhf_fast.ops import sample_tokens
from rlhf_fast.ops.results import Sample
from rlhf_fast.rollout.engine import Decoder, decoder
from rlhf_fast.rollout.uniforms import prompt_keys, row_uniforms

# Rows leave the batch when an eighth of them is done, because moving the other rows costs a fraction of a step.
_LEAVE_AT = 8
# On a GPU the host looks for finished rows once in this many steps, because every look waits for the device.
_LOOK_EVERY = 16


class Rollout(NamedTuple):
    """Completions of B rows; P prompt tokens, T response tokens. Masked entries are pad ids and zeros."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] int64, right-padded, EOS included
    response_mask: Tensor  # [B, T] bool, True up to and including the EOS
    logprobs: Tensor  # [B, T] fp32, of the chosen tokens at the sampling temperature
    entropy: Tensor  # [B, T] fp32
    finished: Tensor  # [B] bool, True where an EOS came before the length limit
    # [B, T, ceil(V / 8)] uint8, the tokens that top_k and top_p kept (bits); None: all tokens, or not wanted
    kept: Tensor | None = None
    # [B, T] fp32, log-probs of another engine that has drawn the tokens; None: it is `logprobs` that they were drawn by
    sampler_logprobs: Tensor | None = None

    @property
    def sequences(self) -> Sequences:
        """Prompts and responses as the passes of `lm` take them."""
        return Sequences(*self[:4])

    def rows(self, index: slice | Tensor) -> "Rollout":
        """These rows alone."""
        return Rollout(*(None if x is None else x[index] for x in self))  # pyright: ignore[reportArgumentType]


class Generation(NamedTuple):
    """The completions of B prompts."""

    sampled: Rollout  # B * samples rows; the samples of a prompt are consecutive
    greedy: Rollout | None  # B rows


class _Stretch(NamedTuple):
    """Steps during which the same rows decoded."""

    rows: Tensor  # [n], the row of the output for each row of the batch
    steps: list[Sample]  # each [n]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, because in train mode a model that checkpoints its activations silently drops the KV cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def settle(model: PreTrainedModel) -> None:
    """Takes the trial of decoding now. `generate` takes the trial in its first call, and holds its memory then."""
    with _evaluating(model), as_it_runs(model):
        decoder(model, 1)


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
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
    greedy: bool = False,
    greedy_max_new_tokens: int | None = None,
    seed: int = 0,
    with_kept: bool = True,
    earlier: Tensor | None = None,
) -> Generation:
    """Samples `samples` completions per prompt and, with `greedy`, decodes a greedy completion too, in one decode.

    A greedy completion takes the most likely token at every step.
    prompt_ids, prompt_mask: [B, P] int64 and bool, left-padded.
    eos_ids: the tokens that end a completion. pad_id: what fills the places behind the end.
    temperature, top_k, top_p: as in `sample_tokens`.
    greedy_max_new_tokens: the length limit of greedy rows (ReMax-fast, arXiv 2310.10505 v4).
    seed: the same seed, prompt and number of the sample give the same tokens; equal prompts are told apart by their
        order.
    with_kept: with top_k or top_p the rollout holds the sets that it drew from, because training needs them.
    earlier: [B] int64, how many equal prompts other processes have before these; None: there are none.
    Raises ValueError for prompts that are not left-padded, for no row at all, and for lengths below 1.
    """
    if not prompt_mask[:, -1].all() or (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any():
        raise ValueError("prompt_mask: expected left-padded prompts, got a False behind a prompt's first token")
    if samples + greedy < 1:
        raise ValueError(f"samples: expected at least one row per prompt, got samples={samples}, greedy={greedy}")
    for name, value in (("max_new_tokens", max_new_tokens), ("greedy_max_new_tokens", greedy_max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if switching_length(model.config) is not None:
        check_completions(model, "max_new_tokens", prompt_mask.sum(dim=1).tolist(), max_new_tokens)
    device, copies = prompt_ids.device, samples + int(greedy)
    prompt_ids, prompt_mask_R = (x.repeat_interleave(copies, dim=0) for x in (prompt_ids, prompt_mask))
    number_R = torch.arange(len(prompt_ids), device=device) % copies
    greedy_R = number_R >= samples
    limit_R = torch.where(greedy_R, min(max_new_tokens, greedy_max_new_tokens or max_new_tokens), max_new_tokens)
    keys_R = prompt_keys(prompt_ids, prompt_mask_R, None if earlier is None else _copies(earlier, copies))
    uniforms_RT = row_uniforms(seed, keys_R, max_new_tokens)

    with _evaluating(model), as_it_runs(model):
        stretches = _decode(
            decoder(model, max_new_tokens),
            prompt_ids[::copies],
            prompt_mask,
            copies,
            uniforms_RT,
            greedy_R if greedy else None,
            limit_R,
            list(eos_ids),
            with_kept,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
    rollout = Rollout(
        prompt_ids, prompt_mask_R, *_assemble(stretches, limit_R, torch.tensor(list(eos_ids), device=device), pad_id)
    )
    if not greedy:
        return Generation(rollout, None)
    return Generation(rollout.rows(~greedy_R), rollout.rows(greedy_R))


def _copies(earlier: Tensor, copies: int) -> Tensor:
    """`earlier` for every row of the batch; each prompt stands there `copies` times, as in the other processes."""
    return copies * earlier.repeat_interleave(copies)


def _decode(
    steps: Decoder,
    ids_BP: Tensor,
    mask_BP: Tensor,
    copies: int,
    uniforms: Tensor,
    greedy: Tensor | None,
    limit: Tensor,
    eos: list[int],
    with_kept: bool,
    **options: Any,
) -> list[_Stretch]:
    """Decodes until every row has met an EOS or its limit.

    uniforms [R, T], greedy [R] bool, limit [R]: one entry for each row of the batch. options: as in `sample_tokens`.
    """
    rows = torch.arange(len(uniforms), device=ids_BP.device)
    eos_ids = torch.tensor(eos, device=ids_BP.device)
    last = uniforms.shape[1] - 1
    look_every = _LOOK_EVERY if ids_BP.is_cuda else 1
    done = torch.zeros_like(rows, dtype=torch.bool)
    stretches = [_Stretch(rows, [])]
    logits = steps.prefill(ids_BP, mask_BP, copies)
    for t in range(last + 1):
        chosen = sample_tokens(logits, greedy_mask=greedy, uniforms=uniforms[:, t], **options)
        stretches[-1].steps.append(chosen if with_kept else chosen._replace(kept=None))
        tokens = chosen.tokens
        done = done | torch.isin(tokens, eos_ids) | (limit <= t + 1)
        if t == last:
            break
        if t % look_every == 0:
            number = int(done.sum())
            if number == len(done):
                break
            if number * _LEAVE_AT >= len(done):
                keep = steps.keep((~done).nonzero().squeeze(1))
                rows, uniforms, limit, tokens = rows[keep], uniforms[keep], limit[keep], tokens[keep]
                greedy = None if greedy is None else greedy[keep]
                done = torch.zeros_like(rows, dtype=torch.bool)
                stretches.append(_Stretch(rows, []))
        logits = steps.step(tokens)
    return stretches


def _assemble(
    stretches: list[_Stretch], limit: Tensor, eos: Tensor, pad_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The fields of a Rollout behind its prompt. Tokens behind a row's end are masked."""
    first = stretches[0].steps[0]
    R, T = len(stretches[0].rows), sum(len(s.steps) for s in stretches)
    names = ["tokens", "logprobs", "entropy"] + ["kept"] * (first.kept is not None)
    columns = [x.new_zeros(R, T, *x.shape[1:]) for x in (getattr(first, name) for name in names)]
    t = 0
    for rows, steps in stretches:
        for name, out in zip(names, columns, strict=True):
            out[rows, t : t + len(steps)] = torch.stack([getattr(step, name) for step in steps], dim=1)
        t += len(steps)
    ids, logprobs, entropy, *kept = columns
    place = torch.arange(T, device=ids.device)
    ends = torch.isin(ids, eos) & (place < limit[:, None])
    ended_before = ends.cumsum(dim=1) - ends.long() > 0
    mask = (place < limit[:, None]) & ~ended_before
    width = int(mask.sum(dim=1).max())
    columns = (ids.where(mask, pad_id), mask, logprobs.where(mask, 0.0), entropy.where(mask, 0.0))
    ids, mask, logprobs, entropy = (x[:, :width].contiguous() for x in columns)
    return ids, mask, logprobs, entropy, ends.any(dim=1), kept[0][:, :width].contiguous() if kept else None


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the end of a turn, the tokenizer's EOS and the ends of the generation config.

    `data.turns` says what the end of a turn is. Raises ValueError where neither has an EOS.
    """
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    ids = end_ids(tokenizer, ids)
    if not ids:
        raise ValueError("tokenizer: expected an eos_token, got none; a completion could never end")
    return ids
