"""log p(token) and entropy of softmax(logits / temperature). The forward pass reads the logits once; the backward pass
reads and writes once.

A lane keeps its own softmax state (see kernels/softmax.py), so that a program reduces over its lanes only at the end of
the row. The sums leave the target out, so that the log-prob of a target far ahead keeps its digits. Several programs
share a row if there are few rows; the last program to finish merges their states. A row of an odd V starts at any
address. Columns are therefore counted from the 16-byte boundary before the row, and all tiles but the first and the
last are read unmasked, 16 bytes at a time.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import LOG2E, expm1, is_last, number
from rlhf_fast.kernels.softmax import add_tile, bounded, capped, reduced, row_results

ROWS = 4  # rows of a tile; a lane holds a column of the tile, so that its maximum moves at most once per tile
COLUMNS = 1024
BLOCK = 2048  # columns of a program of the backward pass
WARPS = 4
MOST_SPLITS = 64
WIDE = True


@triton.jit
def _aligned(offset, ALIGN: tl.constexpr):
    """The last multiple of ALIGN not after the offset, marked for the compiler as a multiple."""
    return tl.multiple_of(offset // ALIGN * ALIGN, ALIGN)


@triton.jit
def _write_row(m, s, a, z, scale, logprobs, entropy, stats, row):
    logprob, h, shift, log_sum = row_results(m, s, a, z, scale)
    tl.store(logprobs + row, logprob)
    tl.store(entropy + row, h)
    tl.store(stats + 2 * row, shift)
    tl.store(stats + 2 * row + 1, log_sum)


@triton.jit
def _token_logprobs(
    logits,
    ids,
    logprobs,
    entropy,
    stats,
    partial,
    tickets,
    row_stride: tl.int64,
    V: tl.int32,
    splits: tl.int32,
    tiles_per_split: tl.int32,
    scale: tl.float64,
    softcap: tl.float64,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // splits).to(tl.int64)  # on one axis, because the other axes end at 65,535
    split = tl.program_id(0) % splits
    target = tl.load(ids + row)
    if target == -100:
        if split == 0:
            tl.store(logprobs + row, 0.0)
            tl.store(entropy + row, 0.0)
            tl.store(stats + 2 * row, 0.0)
            tl.store(stats + 2 * row + 1, 0.0)
    else:
        offset = row * row_stride
        start = _aligned(offset, ALIGN)
        first = (start - offset).to(tl.int32)  # the column at the 16-byte boundary, at most 0
        tile = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
        factor = number(scale, F)
        cap = number(softcap, F)
        m = tl.full([COLUMNS], float("-inf"), F)
        s = tl.zeros([COLUMNS], F)
        a = tl.zeros([COLUMNS], F)
        begin = split * tiles_per_split * (ROWS * COLUMNS)
        end = tl.minimum(begin + tiles_per_split * (ROWS * COLUMNS), V - first)
        for done in range(begin, end, ROWS * COLUMNS):
            done = tl.multiple_of(done, ROWS * COLUMNS)
            left = first + done  # the tile's first column
            if (left >= 0) & (left + ROWS * COLUMNS <= V):
                z = capped(tl.load(logits + start + done + tile).to(F), cap, SOFTCAP)
            else:
                inside = (left + tile >= 0) & (left + tile < V)
                z = tl.load(logits + start + done + tile, mask=inside, other=0.0).to(F)
                z = tl.where(inside, capped(z, cap, SOFTCAP), float("-inf"))
            if (target >= left) & (target < left + ROWS * COLUMNS):
                z = tl.where(left + tile == target, float("-inf"), z)
            m, s, a = add_tile(z, m, s, a, factor)
        m_row, s_row, a_row = reduced(m, s, a, factor)
        in_range = (target >= 0) & (target < V)
        z_target = tl.load(logits + offset + target, mask=in_range, other=float("nan")).to(F)
        z_target = capped(z_target, cap, SOFTCAP)
        if SPLIT:
            mine = partial + (row * splits + split) * 3
            tl.store(mine, m_row)
            tl.store(mine + 1, s_row)
            tl.store(mine + 2, a_row)
            if is_last(tickets + row, splits):
                each = tl.arange(0, 64)
                theirs = partial + (row * splits + each) * 3
                there = each < splits
                m_all = tl.load(theirs, mask=there, other=float("-inf"), cache_modifier=".cg")
                s_all = tl.load(theirs + 1, mask=there, other=0.0, cache_modifier=".cg")
                a_all = tl.load(theirs + 2, mask=there, other=0.0, cache_modifier=".cg")
                m_row, s_row, a_row = reduced(m_all, s_all, a_all, factor)
                _write_row(m_row, s_row, a_row, z_target, scale, logprobs, entropy, stats, row)
        else:
            _write_row(m_row, s_row, a_row, z_target, scale, logprobs, entropy, stats, row)


def splits_for(rows, V, processors):
    """Programs per row: at least two programs for every processor, at least a tile for every program."""
    tiles = triton.cdiv(V, ROWS * COLUMNS)
    return max(1, min(MOST_SPLITS, tiles, triton.cdiv(2 * processors, max(rows, 1))))


def token_logprobs(
    logits, row_stride, ids, rows, V, temperature, softcap, logprobs, entropy, stats, partial, tickets, splits, compute
):  # fmt: skip
    """partial: [rows, splits, 3] of the statistics' dtype; tickets: [rows] int32 of 0. None, None where splits is 1."""
    tiles = triton.cdiv(triton.cdiv(V + 16, ROWS * COLUMNS), splits)
    _token_logprobs[(splits * rows,)](
        logits, ids, logprobs, entropy, stats, partial, tickets, row_stride, V, splits, tiles,
        LOG2E.value / temperature, softcap, SPLIT=splits > 1, SOFTCAP=softcap != 0,
        ALIGN=16 // logits.element_size(), F=compute, ROWS=ROWS,
        COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _token_logprobs_backward(
    logits,
    ids,
    logprobs,
    entropy,
    stats,
    grad_logprobs,
    grad_entropy,
    grad_logits,
    row_stride: tl.int64,
    grad_row_stride: tl.int64,
    V: tl.int32,
    blocks: tl.int32,
    scale: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    target = tl.load(ids + row)
    source = row * row_stride
    goal = row * grad_row_stride
    start = _aligned(source, ALIGN)
    done = tl.multiple_of(program % blocks * BLOCK, BLOCK)
    first = (start - source).to(tl.int32) + done
    at = tl.arange(0, BLOCK)
    inside = (first + at >= 0) & (first + at < V)
    # Where both rows have the same offset from a 16-byte boundary, as in place, whole blocks are written 16 bytes at a
    # time too.
    alike = (goal - source) % ALIGN == 0
    whole = (first >= 0) & (first + BLOCK <= V) & alike
    if target == -100:
        tl.store(grad_logits + goal + first + at, tl.zeros([BLOCK], F), mask=inside)
    else:
        base2 = number(scale, F)
        factor = base2 / LOG2E
        cap = number(softcap, F)
        by_logprob = tl.zeros([1], F)
        by_entropy = tl.zeros([1], F)
        if grad_logprobs is not None:
            by_logprob += tl.load(grad_logprobs + row)
        if grad_entropy is not None:
            by_entropy += tl.load(grad_entropy + row)
        h = tl.load(entropy + row)
        shift = tl.load(stats + 2 * row)
        log_sum = tl.load(stats + 2 * row + 1)
        # -p (gL + gH (log p + H)) / temperature, with log p = x ln 2 - log_sum
        share = -tl.exp(-log_sum) * factor
        slope = share * by_entropy / LOG2E
        level = share * (by_logprob + by_entropy * (h - log_sum))
        if whole:
            z = tl.load(logits + start + done + at).to(F)
        else:
            z = tl.load(logits + source + first + at, mask=inside, other=float("-inf")).to(F)
        z = capped(z, cap, SOFTCAP)
        x = bounded((z - shift) * base2)
        g = tl.exp2(x) * (slope * x + level)
        if (target >= first) & (target < first + BLOCK):
            logprob = tl.load(logprobs + row).to(tl.float64)
            p = tl.exp(logprob)
            at_target = tl.where(p == 0, 0.0, p * (logprob + h) * by_entropy)
            at_target = (-expm1(logprob) * by_logprob - at_target) * factor
            g = tl.where(first + at == target, at_target.to(F), g)
        if SOFTCAP:
            t = z / cap
            g = g * (1 - t * t)
        if whole:
            tl.store(grad_logits + _aligned(goal, ALIGN) + done + at, g.to(grad_logits.dtype.element_ty))
        else:
            tl.store(grad_logits + goal + first + at, g.to(grad_logits.dtype.element_ty), mask=inside)


def token_logprobs_backward(
    logits, row_stride, ids, rows, V, temperature, softcap, logprobs, entropy, stats, grad_logprobs, grad_entropy,
    grad_logits, grad_row_stride, compute,
):  # fmt: skip
    """grad_logits may be the memory of the logits."""
    blocks = triton.cdiv(V + 16, BLOCK)
    _token_logprobs_backward[(rows * blocks,)](
        logits, ids, logprobs, entropy, stats, grad_logprobs, grad_entropy, grad_logits, row_stride, grad_row_stride, V,
        blocks, LOG2E.value / temperature, softcap, SOFTCAP=softcap != 0, ALIGN=16 // logits.element_size(),
        F=compute, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


_FORWARD = {"ids": "*i64", "tickets": "*i32"}
_BACKWARD = {"ids": "*i64"}
COMPILED = []
for _dtype, _align in (("*bf16", 8), ("*fp16", 8), ("*fp32", 4)):
    for _softcap in (False, True):
        _shared = {"SOFTCAP": _softcap, "ALIGN": _align, "F": tl.float32}
        for _split in (False, True):
            COMPILED.append(
                (
                    _token_logprobs,
                    {**_FORWARD, "logits": _dtype},
                    {**_shared, "SPLIT": _split, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS},
                )
            )
        COMPILED.append(
            (
                _token_logprobs_backward,
                {**_BACKWARD, "logits": _dtype, "grad_logits": _dtype},
                {**_shared, "BLOCK": BLOCK, "num_warps": WARPS},
            )
        )
