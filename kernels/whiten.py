"""Normalised advantages in float64: masked whitening in two launches, and the group baselines of RLOO and GRPO."""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import is_last, sum_partials

BLOCK = 1024


@triton.jit
def _moments(x, mask, partial, moments, ticket, n: tl.int64, BLOCK: tl.constexpr):
    """Writes mean and scale of the True places to moments[2]. The last program merges the moments of all blocks."""
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    at = block * BLOCK + columns
    on = tl.load(mask + at, mask=at < n, other=0)
    value = tl.load(x + at, mask=on, other=0.0).to(tl.float64)
    count = tl.sum(on.to(tl.float64))
    mean = tl.sum(value) / tl.maximum(count, 1.0)
    off = tl.where(on, value - mean, 0.0)
    tl.store(partial + block, count)
    tl.store(partial + blocks + block, count * mean)
    tl.store(partial + 2 * blocks + block, tl.sum(off * off))
    if is_last(ticket, tl.num_programs(0)):
        total = sum_partials(partial, blocks, BLOCK)
        centre = sum_partials(partial + blocks, blocks, BLOCK) / tl.maximum(total, 1.0)
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(0, blocks, BLOCK):
            inside = start + columns < blocks
            there = partial + start + columns
            c = tl.load(there, mask=inside, other=0.0, cache_modifier=".cg")
            s = tl.load(there + blocks, mask=inside, other=0.0, cache_modifier=".cg")
            difference = s / tl.maximum(c, 1.0) - centre
            squares += c * difference * difference
            squares += tl.load(there + 2 * blocks, mask=inside, other=0.0, cache_modifier=".cg")
        variance = tl.where(total > 1, tl.sum(squares) / tl.maximum(total - 1, 1.0), 0.0)
        tl.store(moments, centre)
        tl.store(moments + 1, 1 / tl.sqrt(variance + 1e-8))


@triton.jit
def _whiten(x, mask, moments, out, n: tl.int64, SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    on = tl.load(mask + at, mask=inside, other=0)
    mean = tl.load(moments)
    white = (tl.load(x + at, mask=on, other=0.0).to(tl.float64) - mean) * tl.load(moments + 1)
    if not SHIFT_MEAN:
        white += mean
    tl.store(out + at, tl.where(on, white, 0.0), mask=inside)


def whiten(x, mask, shift_mean, out, partial, moments, tickets):
    """partial: [3, n / BLOCK] float64; moments: [2] float64."""
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, BLOCK),)
        _moments[grid](x, mask, partial, moments, tickets, n, BLOCK=BLOCK)
        _whiten[grid](x, mask, moments, out, n, SHIFT_MEAN=shift_mean, BLOCK=BLOCK)


@triton.jit
def _group_advantages(scores, out, size: tl.int64, STANDARDISE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per group. RLOO: the score less the mean of the group's other scores. GRPO: the score less the
    group's mean, over the group's standard deviation."""
    first = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        total += tl.load(scores + first + start + columns, mask=start + columns < size, other=0.0)
    whole = tl.sum(total)
    mean = whole / size
    squares = tl.zeros([BLOCK], tl.float64)
    if STANDARDISE:
        for start in range(0, size, BLOCK):
            inside = start + columns < size
            score = tl.load(scores + first + start + columns, mask=inside, other=0.0).to(tl.float64)
            squares += tl.where(inside, (score - mean) * (score - mean), 0.0)
    scale = 1 / (tl.sqrt(tl.sum(squares) / (size - 1)) + 1e-4)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        score = tl.load(scores + first + start + columns, mask=inside, other=0.0).to(tl.float64)
        advantage = (score - mean) * scale if STANDARDISE else score - (whole - score) / (size - 1)
        tl.store(out + first + start + columns, advantage, mask=inside)


def group_advantages(scores, size, standardise, out):
    groups = scores.numel() // size
    if groups:
        _group_advantages[(groups,)](scores, out, size, STANDARDISE=standardise, BLOCK=128)


_TYPES = {"mask": "*i1", "partial": "*fp64", "moments": "*fp64", "ticket": "*i32"}
COMPILED = [
    (_moments, _TYPES, {"BLOCK": BLOCK}),
    (_whiten, _TYPES, {"SHIFT_MEAN": True, "BLOCK": BLOCK}),
    (_group_advantages, {}, {"STANDARDISE": False, "BLOCK": 128}),
    (_group_advantages, {}, {"STANDARDISE": True, "BLOCK": 128}),
]
