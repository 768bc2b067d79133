"""Recurrences over time: GAE, discounted returns, ReMax returns. A program takes a row, from the row's end.

A step is an affine map of the state after it in time; a masked step is the identity, and its output is 0. A parallel
scan in float64 composes a block of steps.
"""

import triton
import triton.language as tl

BLOCK = 1024
WARPS = 8
OFFICIAL, PAPER, VERL = (tl.constexpr(i) for i in range(3))  # the order of REMAX_VARIANTS in rlhf_fast/ops/returns.py


@triton.jit
def _after(a_slope, a_offset, b_slope, b_offset):
    """The map x -> b(a(x)) of two affine maps."""
    return b_slope * a_slope, b_slope * a_offset + b_offset


@triton.jit
def _after_with_value(ap, aq, ac, aw, au, bp, bq, bc, bw, bu):
    """b after a, two maps of the state (advantage, next value v) -> (p advantage + q v + c, w v + u)."""
    return bp * ap, bp * aq + bq * aw, bp * ac + bq * au + bc, bw * aw, bw * au + bu


@triton.jit
def _first(x, columns):
    return tl.sum(tl.where(columns == 0, x, 0.0))


@triton.jit
def _gae(
    rewards,
    values,
    mask,
    lams,
    advantages,
    returns,
    T: tl.int64,
    gamma: tl.float64,
    gamma_lam: tl.float64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    advantage = tl.zeros([1], tl.float64)
    next_value = tl.zeros([1], tl.float64)
    if lams is not None:
        gamma_lam = gamma * tl.load(lams + row).to(tl.float64)
    for done in range(0, T, BLOCK):
        t = T - done - BLOCK + columns
        at = row * T + t
        on = tl.load(mask + at, mask=t >= 0, other=0)
        value = tl.load(values + at, mask=on, other=0.0).to(tl.float64)
        reward = tl.load(rewards + at, mask=on, other=0.0).to(tl.float64)
        one = tl.full([BLOCK], 1.0, tl.float64)
        p, q, c, w, u = tl.associative_scan(
            (
                tl.where(on, gamma_lam, one),
                tl.where(on, gamma, one * 0),
                reward - value,
                tl.where(on, 0.0, one),
                value,
            ),
            0,
            _after_with_value,
            reverse=True,
        )
        mine = p * advantage + q * next_value + c
        tl.store(advantages + at, tl.where(on, mine, 0.0), mask=t >= 0)
        tl.store(returns + at, tl.where(on, mine + value, 0.0), mask=t >= 0)
        advantage = tl.zeros([1], tl.float64) + _first(mine, columns)
        next_value = next_value * _first(w, columns) + _first(u, columns)


def gae(rewards, values, mask, lams, gamma, lam, advantages, returns):
    """lams: [B], a lambda for each row in place of lam, or None."""
    B, T = rewards.shape
    if B:
        _gae[(B,)](
            rewards, values, mask, lams, advantages, returns, T, gamma, gamma * lam, BLOCK=BLOCK, num_warps=WARPS
        )  # fmt: skip


@triton.jit
def _discounted_returns(rewards, mask, returns, T: tl.int64, gamma: tl.float64, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    to_go = tl.zeros([1], tl.float64)
    for done in range(0, T, BLOCK):
        t = T - done - BLOCK + columns
        at = row * T + t
        on = tl.load(mask + at, mask=t >= 0, other=0)
        reward = tl.load(rewards + at, mask=on, other=0.0).to(tl.float64)
        one = tl.full([BLOCK], 1.0, tl.float64)
        slope, offset = tl.associative_scan((tl.where(on, gamma, one), reward), 0, _after, reverse=True)
        mine = slope * to_go + offset
        tl.store(returns + at, tl.where(on, mine, 0.0), mask=t >= 0)
        to_go = tl.zeros([1], tl.float64) + _first(mine, columns)


def discounted_returns(rewards, mask, gamma, returns):
    B, T = rewards.shape
    if B:
        _discounted_returns[(B,)](rewards, mask, returns, T, gamma, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def _remax_returns(
    scores,
    greedy_scores,
    logprobs,
    ref,
    mask,
    weights,
    T: tl.int64,
    kl_coef: tl.float64,
    log_gamma: tl.float64,
    clip: tl.float64,
    VARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    advantage = tl.load(scores + row).to(tl.float64) - tl.load(greedy_scores + row).to(tl.float64)
    advantage = tl.where(advantage < -clip, -clip, tl.where(advantage > clip, clip, advantage))
    kl_to_go = tl.zeros([1], tl.float64)
    count_to_go = tl.zeros([1], tl.float64)
    for done in range(0, T, BLOCK):
        t = T - done - BLOCK + columns
        at = row * T + t
        on = tl.load(mask + at, mask=t >= 0, other=0)
        kl = tl.load(logprobs + at, mask=on, other=0.0).to(tl.float64) - tl.load(ref + at, mask=on, other=0.0)
        weight = advantage + kl * 0
        if VARIANT == OFFICIAL:  # gamma^(L - t), gamma at the last True place
            count = tl.cumsum(on.to(tl.float64), 0, reverse=True) + count_to_go
            count_to_go = tl.zeros([1], tl.float64) + _first(count, columns)
            weight = advantage * tl.exp(log_gamma * tl.maximum(count, 1.0))
        if VARIANT == VERL:  # the KL of this place and all that follow
            kl = tl.cumsum(kl, 0, reverse=True) + kl_to_go
            kl_to_go = tl.zeros([1], tl.float64) + _first(kl, columns)
        tl.store(weights + at, tl.where(on, weight - kl_coef * kl, 0.0), mask=t >= 0)


def remax_returns(scores, greedy_scores, logprobs, ref, mask, kl_coef, log_gamma, clip, variant, weights):
    B, T = logprobs.shape
    if B:
        _remax_returns[(B,)](
            scores, greedy_scores, logprobs, ref, mask, weights, T, kl_coef, log_gamma, clip, VARIANT=variant,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


COMPILED = [
    (_gae, {"mask": "*i1"}, {"BLOCK": BLOCK, "num_warps": WARPS}),
    (_gae, {"mask": "*i1"}, {"BLOCK": BLOCK, "num_warps": WARPS, "lams": None}),
    (_discounted_returns, {"mask": "*i1"}, {"BLOCK": BLOCK, "num_warps": WARPS}),
    *(
        (_remax_returns, {"mask": "*i1"}, {"VARIANT": variant, "BLOCK": BLOCK, "num_warps": WARPS})
        for variant in range(3)
    ),
]
