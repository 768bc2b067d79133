"""Bradley-Terry losses of a reward model: pairs with margin and centring, and all pairs of K ranked answers."""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import is_last, sigmoid, softplus, sum_partials

BLOCK = 256
SQUARE = 16  # a program compares SQUARE x SQUARE answers at a time


@triton.jit
def _order(difference):
    """A pair's accuracy: 1 for the right order, 1/2 for a tie, 0 for the wrong order."""
    return tl.where(difference > 0, 1.0, tl.where(difference == 0, 0.5, 0.0))


@triton.jit
def _reward_loss(
    chosen,
    rejected,
    margin,
    grad_chosen,
    grad_rejected,
    loss,
    stats,
    B: tl.int64,
    center_coef: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program takes all pairs, because B is small."""
    columns = tl.arange(0, BLOCK)
    likelihood = tl.zeros([BLOCK], tl.float64)
    centre = tl.zeros([BLOCK], tl.float64)
    right = tl.zeros([BLOCK], tl.float64)
    difference = tl.zeros([BLOCK], tl.float64)
    n = tl.maximum(B, 1).to(tl.float64)
    for start in range(0, B, BLOCK):
        b = start + columns
        inside = b < B
        c = tl.load(chosen + b, mask=inside, other=0.0).to(tl.float64)
        r = tl.load(rejected + b, mask=inside, other=0.0).to(tl.float64)
        x = c - r
        if margin is not None:
            x -= tl.load(margin + b, mask=inside, other=0.0)
        likelihood += tl.where(inside, softplus(-x), 0.0)
        centre += (c + r) * (c + r)
        right += tl.where(inside, _order(c - r), 0.0)
        difference += c - r
        slope = -sigmoid(-x)
        by_centre = (c + r) * (2 * center_coef)
        if grad_chosen is not None:
            tl.store(grad_chosen + b, (slope + by_centre) / n, mask=inside)
            tl.store(grad_rejected + b, (by_centre - slope) / n, mask=inside)
    bt = tl.sum(likelihood) / n
    result = bt + center_coef * (tl.sum(centre) / n)
    tl.store(loss, result)
    tl.store(stats, result)
    tl.store(stats + 1, tl.sum(right) / n)
    tl.store(stats + 2, tl.sum(difference) / n)
    tl.store(stats + 3, bt)


def reward_loss(chosen, rejected, margin, center_coef, grad_chosen, grad_rejected, loss, stats):
    _reward_loss[(1,)](
        chosen, rejected, margin, grad_chosen, grad_rejected, loss, stats, chosen.numel(), center_coef, BLOCK=BLOCK
    )  # fmt: skip


@triton.jit
def _count_pairs(ranks, total, K: tl.int64, SQUARE: tl.constexpr):
    """Adds the number of a row's ranked pairs to the integer `total`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SQUARE)
    count = tl.zeros([SQUARE, SQUARE], tl.int32)
    for first in range(0, K, SQUARE):
        i = first + columns
        rank_i = tl.load(ranks + row * K + i, mask=i < K, other=-1)
        for second in range(0, K, SQUARE):
            j = second + columns
            rank_j = tl.load(ranks + row * K + j, mask=j < K, other=-1)
            count += ((rank_i >= 0)[:, None] & (rank_i[:, None] < rank_j[None, :])).to(tl.int32)
    tl.atomic_add(total, tl.sum(tl.sum(count, 1), 0), sem="relaxed")


@triton.jit
def _ranking_loss(
    scores, ranks, grad, loss, stats, partial, ticket, total, B: tl.int64, K: tl.int64, SQUARE: tl.constexpr
):
    """One program per row. The gradient of an answer sums over the pairs that the answer leads or trails."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SQUARE)
    pairs = tl.load(total).to(tl.float64)
    n = tl.maximum(pairs, 1.0)
    row_loss = tl.zeros([SQUARE], tl.float64)
    right = tl.zeros([SQUARE], tl.float64)
    for first in range(0, K, SQUARE):
        i = first + columns
        rank_i = tl.load(ranks + row * K + i, mask=i < K, other=-1)
        score_i = tl.load(scores + row * K + i, mask=i < K, other=0.0).to(tl.float64)
        slope = tl.zeros([SQUARE], tl.float64)
        for second in range(0, K, SQUARE):
            j = second + columns
            rank_j = tl.load(ranks + row * K + j, mask=j < K, other=-1)
            score_j = tl.load(scores + row * K + j, mask=j < K, other=0.0).to(tl.float64)
            difference = score_i[:, None] - score_j[None, :]
            leads = (rank_i >= 0)[:, None] & (rank_i[:, None] < rank_j[None, :])
            trails = (rank_j >= 0)[None, :] & (rank_j[None, :] < rank_i[:, None])
            row_loss += tl.sum(tl.where(leads, softplus(-difference), 0.0), 1)
            right += tl.sum(tl.where(leads, _order(difference).to(tl.float64), 0.0), 1)
            slope += tl.sum(tl.where(trails, sigmoid(difference), 0.0) - tl.where(leads, sigmoid(-difference), 0.0), 1)
        if grad is not None:
            tl.store(grad + row * K + i, slope / n, mask=i < K)
    tl.store(partial + row, tl.sum(row_loss))
    tl.store(partial + B + row, tl.sum(right))
    if is_last(ticket, tl.num_programs(0)):
        result = sum_partials(partial, B, SQUARE) / n
        tl.store(loss, result)
        tl.store(stats, result)
        tl.store(stats + 1, sum_partials(partial + B, B, SQUARE) / n)


def ranking_loss(scores, ranks, grad, loss, stats, partial, tickets):
    """partial: [2, B] float64; B > 0."""
    B, K = scores.shape
    total = tickets[1:]
    total.zero_()
    _count_pairs[(B,)](ranks, total, K, SQUARE=SQUARE)
    _ranking_loss[(B,)](scores, ranks, grad, loss, stats, partial, tickets, total, B, K, SQUARE=SQUARE)


_TYPES = {"ranks": "*i64", "partial": "*fp64", "ticket": "*i32", "total": "*i32"}
COMPILED = [
    (_reward_loss, {}, {"BLOCK": BLOCK}),
    (_count_pairs, _TYPES, {"SQUARE": SQUARE}),
    (_ranking_loss, _TYPES, {"SQUARE": SQUARE}),
]
