"""Token ids side by side: padding them, and cutting shuffled rows into batches."""

import itertools

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: pad, else EOS, else 0. The id has no meaning, because the masks say what is padding."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)  # pyright: ignore[reportReturnType]


def pad_left(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] int64 and mask [B, L] bool, L the longest length; every sequence ends in the last column."""
    ids, mask = pad_right([sequence[::-1] for sequence in sequences], pad_id)
    return ids.flip(1), mask.flip(1)


def pad_right(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] int64 and mask [B, L] bool, L the longest length; every sequence starts in column 0."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    mask = torch.arange(max(map(len, sequences), default=0)) < lengths[:, None]
    ids = torch.full(mask.shape, pad_id, dtype=torch.int64)
    ids[mask] = torch.tensor(list(itertools.chain.from_iterable(sequences)), dtype=torch.int64)
    return ids, mask


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, drop_last: bool = True) -> list[list[int]]:
    """Shuffles range(n) by (seed, epoch) and cuts it into batches. drop_last leaves out a short batch at the end.

    Raises ValueError unless 1 <= batch_size <= n.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size: expected between 1 and the {n} rows there are, got {batch_size}")
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return batches[:-1] if drop_last and len(batches[-1]) < batch_size else batches
