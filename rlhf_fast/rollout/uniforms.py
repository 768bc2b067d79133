"""Random numbers that belong to a row, not to a place in a batch: U[0, 1) from (seed, prompt, sample, step).

The generator counts (SplitMix64: Steele, Lea, Flood 2014) in int64 tensors, whose arithmetic wraps around. Its numbers
are the same on every device, whatever rows share the batch and however the rows are ordered.
"""

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def row_uniforms(seed: int, keys: Tensor, steps: int) -> Tensor:
    """Random numbers [R, steps] float64 in [0, 1) for rows with `keys` [R] int64."""
    counters = torch.arange(1, steps + 1, device=keys.device) * _GOLDEN
    bits = _mix(_mix(keys ^ _mix(torch.full_like(keys, seed)))[:, None] + counters)
    return _shift(bits, 11).double() * 2.0**-53


def row_seeds(seed: int, keys: Tensor) -> Tensor:
    """Seeds [R] int64 from 0 to 2^62 - 1 for the generator of another engine, for prompts with `keys` [R] int64."""
    return _mix(keys ^ _mix(torch.full_like(keys, seed))) & (2**62 - 1)


def prompt_keys(ids: Tensor, mask: Tensor, earlier: Tensor | None = None) -> Tensor:
    """Keys [B] int64: a hash of each prompt's tokens, wherever its padding stands. Equal prompts get different keys.

    earlier: [B] int64, how many equal prompts stand before these in other processes.
    """
    place = mask.long().cumsum(dim=1)  # counted from the prompt's first token
    hashes = torch.where(mask, _mix(ids * _FIRST + place * _GOLDEN), 0).sum(dim=1)
    same_before = torch.tril(hashes[:, None] == hashes, diagonal=-1).sum(dim=1)
    if earlier is not None:
        same_before = same_before + earlier
    return _mix(hashes + same_before * _GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift, because the shift of int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
