"""Losses of policy and value function: value, gradient and statistics in one launch.

The weight of a token needs the number of True tokens. Every program counts a short mask by itself; a launch before
counts a mask of more than COUNTED_BY_ALL tokens. A lane sums in the dtype of the inputs. The lanes' sums are added in
float64, and the last program to arrive combines the programs' sums.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import (
    MAX_LOG_RATIO,
    bregman,
    clamp,
    count_into,
    count_true,
    is_last,
    kl_term,
    number,
    sum_partials,
)

BLOCK = 512
WARPS = 8
REGISTERS = {"maxnreg": 128}  # on NVIDIA, because ptxas by itself spills a few bytes for an occupancy of no use here
COUNTED_BY_ALL = 1 << 18
# The order of REDUCTIONS in rlhf_fast/ops/policy_loss.py.
TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM, CONSTANT = (tl.constexpr(i) for i in range(4))
CLIP, CISPO, SAPO = (tl.constexpr(i) for i in range(3))  # the order of OBJECTIVES there
PARTIALS = 8  # sums of a row: policy, kl, entropy, clipped, approx_kl, ratio, largest ratio, tokens


def _count(mask, tickets):
    """Starts a count of a long mask; returns where the count will be, behind the ticket. None for a short mask."""
    n = mask.numel()
    if n <= COUNTED_BY_ALL:
        return None
    total = tickets[1:]
    total.zero_()
    count_into[(triton.cdiv(n, BLOCK),)](mask, n, total, BLOCK=BLOCK, num_warps=WARPS)
    return total


@triton.jit
def _weight(mask, row, T, n, total, normalizer, rows, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    """The weight of each True token of the row in the loss, and the number of True tokens in the row."""
    row_count = count_true(mask + row * T, T, BLOCK)
    if normalizer is not None:
        whole = tl.load(normalizer).to(tl.float64)
    elif REDUCTION != TOKEN_MEAN:
        whole = rows.to(tl.float64)
    elif total is not None:
        whole = tl.load(total).to(tl.float64)
    else:
        whole = count_true(mask, n, BLOCK)
    if REDUCTION == SEQUENCE_MEAN:
        whole *= tl.maximum(row_count, 1.0)
    return tl.where((whole == 0) | (row_count == 0), 0.0, 1 / tl.where(whole == 0, 1.0, whole)), row_count


@triton.jit
def _mean_log_ratio(logprobs, old_logprobs, mask, T, count, BLOCK: tl.constexpr):
    """The mean of a row's log-ratios over its True tokens, whose number is `count`; in float64."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, T, BLOCK):
        t = start + columns
        on = tl.load(mask + t, mask=t < T, other=0)
        logp = tl.load(logprobs + t, mask=on, other=0.0).to(tl.float64)
        total += logp - tl.load(old_logprobs + t, mask=on, other=0.0)
    return tl.sum(total) / tl.maximum(count, 1.0)


@triton.jit
def _policy_term(logp, log_ratio, ratio, a, low, high, dual_clip, tau_pos, tau_neg, OBJECTIVE: tl.constexpr):
    """A token's term, its derivative by logp, and whether it is clipped; options in the dtype of the arithmetic."""
    if OBJECTIVE == CISPO:
        slope = -a * tl.where(ratio > high, high, ratio)
        return slope * logp, slope, ratio > high
    if OBJECTIVE == SAPO:
        tau = tl.where(a > 0, tau_pos, tau_neg)
        e = tl.exp(-tau * (ratio - 1))
        gate = 1 / (1 + e)
        value = -4 * a * gate / tau
        slope = -4 * a * ratio * (e * gate) * gate
        is_clipped = ratio < 0
    else:
        free = -a * ratio
        bounded = -a * clamp(ratio, 1 - low, 1 + high)
        value = tl.where(free > bounded, free, bounded)
        slope = tl.where(bounded > free, 0.0, free)
        bound = tl.where(a < 0, -a * dual_clip, float("inf"))
        slope = tl.where(value < bound, slope, tl.where(value > bound, 0.0, slope / 2))
        value = tl.where(value > bound, bound, value)
        is_clipped = bounded > free
    slope = tl.where((log_ratio < -MAX_LOG_RATIO) | (log_ratio > MAX_LOG_RATIO), 0.0, slope)
    return value, slope, is_clipped


@triton.jit
def _ppo_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    ref,
    entropy,
    normalizer,
    grad_logprobs,
    grad_entropy,
    loss,
    stats,
    partial,
    ticket,
    total,
    B: tl.int64,
    T: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    PER_TOKEN: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    KL_BY_RATIO: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F: tl.constexpr = logprobs.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    weight, count = _weight(mask, row, T, B * T, total, normalizer, B, REDUCTION, BLOCK)
    token_weight = number(weight, F)
    if BY_SEQUENCE:
        row_log_ratio = _mean_log_ratio(logprobs + row * T, old_logprobs + row * T, mask + row * T, T, count, BLOCK)
    policy_sum = tl.zeros([BLOCK], F)
    kl_sum = tl.zeros([BLOCK], F)
    entropy_sum = tl.zeros([BLOCK], F)
    clipped_sum = tl.zeros([BLOCK], F)
    approx_kl_sum = tl.zeros([BLOCK], F)
    ratio_sum = tl.zeros([BLOCK], F)
    ratio_max = tl.full([BLOCK], float("-inf"), F)
    for start in range(0, T, BLOCK):
        t = start + columns
        inside = t < T
        at = row * T + t
        on = tl.load(mask + at, mask=inside, other=0)
        logp = tl.load(logprobs + at, mask=on, other=0.0)
        if BY_SEQUENCE:
            log_ratio = tl.zeros([BLOCK], F) + number(row_log_ratio, F)
        else:
            log_ratio = logp - tl.load(old_logprobs + at, mask=on, other=0.0)
        a = tl.load(advantages + (at if PER_TOKEN else row + columns * 0), mask=on, other=0.0)
        x = clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = tl.exp(x)
        value, slope, is_clipped = _policy_term(
            logp, log_ratio, ratio, a, number(low, F), number(high, F), number(dual_clip, F), number(tau_pos, F),
            number(tau_neg, F), OBJECTIVE,
        )  # fmt: skip
        policy_sum += tl.where(on, value, 0.0)
        clipped_sum += tl.where(on & is_clipped, 1.0, 0.0)
        approx_kl_sum += tl.where(on, bregman(x), 0.0)
        ratio_sum += tl.where(on, ratio, 0.0)
        ratio_max = tl.where(on & (ratio > ratio_max), ratio, ratio_max)
        gradient = slope * token_weight
        if ref is not None:
            d = logp - tl.load(ref + at, mask=on, other=0.0)
            clamped = clamp(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
            kl, by_logp = kl_term(clamped, ESTIMATOR)
            by_logp = tl.where(clamped == d, by_logp, 0.0)
            if KL_BY_RATIO:
                by_logp = ratio * (by_logp + tl.where(x == log_ratio, kl, 0.0))
                kl *= ratio
            kl_sum += tl.where(on, kl, 0.0)
            gradient += by_logp * (token_weight * number(kl_coef, F))
        if entropy is not None:
            entropy_sum += tl.load(entropy + at, mask=on, other=0.0)
        if grad_logprobs is not None:
            tl.store(grad_logprobs + at, tl.where(on, gradient, 0.0), mask=inside)
        if grad_entropy is not None:
            tl.store(grad_entropy + at, tl.where(on, -number(entropy_coef, F) * token_weight, 0.0), mask=inside)
    tl.store(partial + row, tl.sum(policy_sum.to(tl.float64)) * weight)
    tl.store(partial + B + row, tl.sum(kl_sum.to(tl.float64)) * weight)
    tl.store(partial + 2 * B + row, tl.sum(entropy_sum.to(tl.float64)) * weight)
    tl.store(partial + 3 * B + row, tl.sum(clipped_sum.to(tl.float64)))
    tl.store(partial + 4 * B + row, tl.sum(approx_kl_sum.to(tl.float64)))
    tl.store(partial + 5 * B + row, tl.sum(ratio_sum.to(tl.float64)))
    tl.store(partial + 6 * B + row, tl.max(ratio_max))
    tl.store(partial + 7 * B + row, count)
    if is_last(ticket, tl.num_programs(0)):
        policy = sum_partials(partial, B, BLOCK)
        kl_loss = sum_partials(partial + B, B, BLOCK)
        entropy_bonus = sum_partials(partial + 2 * B, B, BLOCK)
        tokens = sum_partials(partial + 7 * B, B, BLOCK)
        divisor = tl.maximum(tokens, 1.0)
        largest = tl.full([BLOCK], float("-inf"), tl.float64)
        for start in range(0, B, BLOCK):
            inside = start + columns < B
            of_row = tl.load(partial + 6 * B + start + columns, mask=inside, other=float("-inf"), cache_modifier=".cg")
            largest = tl.maximum(largest, of_row)
        result = policy + kl_coef * kl_loss - entropy_coef * entropy_bonus
        tl.store(loss, result)
        tl.store(stats, result)
        tl.store(stats + 1, policy)
        tl.store(stats + 2, sum_partials(partial + 3 * B, B, BLOCK) / divisor)
        tl.store(stats + 3, sum_partials(partial + 4 * B, B, BLOCK) / divisor)
        tl.store(stats + 4, sum_partials(partial + 5 * B, B, BLOCK) / divisor)
        tl.store(stats + 5, tl.where(tokens > 0, tl.max(largest), 0.0))
        tl.store(stats + 6, kl_loss)
        tl.store(stats + 7, entropy_bonus)


def ppo_loss(
    logprobs, old_logprobs, advantages, mask, ref, entropy, normalizer, objective, by_sequence, low, high, dual_clip,
    tau_pos, tau_neg, kl_coef, estimator, kl_by_ratio, entropy_coef, reduction, grad_logprobs, grad_entropy, loss,
    stats, partial, tickets, registers,
):  # fmt: skip
    """partial: [8, B] float64; B > 0. registers: REGISTERS, or {} where the compiler does not know the option."""
    B, T = logprobs.shape
    total = _count(mask, tickets) if reduction == TOKEN_MEAN.value and normalizer is None else None
    _ppo_loss[(B,)](
        logprobs, old_logprobs, advantages, mask, ref, entropy, normalizer, grad_logprobs, grad_entropy, loss, stats,
        partial, tickets, total, B, T, low, high, dual_clip, tau_pos, tau_neg, kl_coef, entropy_coef,
        PER_TOKEN=advantages.dim() == 2, OBJECTIVE=objective, BY_SEQUENCE=by_sequence, ESTIMATOR=estimator,
        KL_BY_RATIO=kl_by_ratio, REDUCTION=reduction, BLOCK=BLOCK, num_warps=WARPS, **registers,
    )  # fmt: skip


@triton.jit
def _reinforce_loss(
    logprobs,
    advantages,
    mask,
    normalizer,
    grad,
    loss,
    partial,
    ticket,
    total,
    B: tl.int64,
    T: tl.int64,
    PER_TOKEN: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    weight, _ = _weight(mask, row, T, B * T, total, normalizer, B, REDUCTION, BLOCK)
    row_sum = tl.zeros([BLOCK], tl.float64)
    for start in range(0, T, BLOCK):
        t = start + columns
        at = row * T + t
        on = tl.load(mask + at, mask=t < T, other=0)
        logp = tl.load(logprobs + at, mask=on, other=0.0).to(tl.float64)
        a = tl.load(advantages + (at if PER_TOKEN else row + columns * 0), mask=on, other=0.0).to(tl.float64)
        row_sum += tl.where(on, -a * logp, 0.0)
        if grad is not None:
            tl.store(grad + at, tl.where(on, -a * weight, 0.0), mask=t < T)
    tl.store(partial + row, tl.sum(row_sum) * weight)
    if is_last(ticket, tl.num_programs(0)):
        tl.store(loss, sum_partials(partial, B, BLOCK))


def reinforce_loss(logprobs, advantages, mask, normalizer, reduction, grad, loss, partial, tickets):
    """partial: [B] float64; B > 0."""
    B, T = logprobs.shape
    total = _count(mask, tickets) if reduction == TOKEN_MEAN.value and normalizer is None else None
    _reinforce_loss[(B,)](
        logprobs, advantages, mask, normalizer, grad, loss, partial, tickets, total, B, T,
        PER_TOKEN=advantages.dim() == 2, REDUCTION=reduction, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _ppo_value_loss(
    values,
    old_values,
    returns,
    mask,
    normalizer,
    grad,
    loss,
    stats,
    partial,
    ticket,
    total,
    n: tl.int64,
    clip: tl.float64,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tokens = tl.load(total).to(tl.float64) if total is not None else count_true(mask, n, BLOCK)
    whole = tl.load(normalizer).to(tl.float64) if normalizer is not None else tokens
    weight = tl.where((whole == 0) | (tokens == 0), 0.0, 1 / tl.where(whole == 0, 1.0, whole))
    on = tl.load(mask + at, mask=inside, other=0)
    value = tl.load(values + at, mask=on, other=0.0)
    old = tl.load(old_values + at, mask=on, other=0.0)
    target = tl.load(returns + at, mask=on, other=0.0)
    near = clamp(value, old - number(clip, value.dtype), old + number(clip, value.dtype))
    near = tl.where(old == old, near, old)  # keeps a NaN in old
    free = (value - target) * (value - target)
    bounded = (near - target) * (near - target)
    by_free = value - target
    by_bounded = tl.where(near == value, by_free, 0.0)
    slope = tl.where(free > bounded, by_free, tl.where(bounded > free, by_bounded, (by_free + by_bounded) / 2))
    if grad is not None:
        tl.store(grad + at, tl.where(on, slope * number(weight, value.dtype), 0.0), mask=inside)
    larger = tl.where(free > bounded, free, bounded).to(tl.float64)
    tl.store(partial + block, tl.sum(tl.where(on, larger / 2, 0.0)) * weight)
    tl.store(partial + blocks + block, tl.sum(tl.where(on & (bounded > free), 1.0, 0.0).to(tl.float64)))
    if is_last(ticket, tl.num_programs(0)):
        result = sum_partials(partial, blocks, BLOCK)
        tl.store(loss, result)
        tl.store(stats, result)
        tl.store(stats + 1, sum_partials(partial + blocks, blocks, BLOCK) / tl.maximum(tokens, 1.0))


def ppo_value_loss(values, old_values, returns, mask, normalizer, clip, grad, loss, stats, partial, tickets):
    """partial: [2, n / BLOCK] float64; n > 0."""
    n = values.numel()
    _ppo_value_loss[(triton.cdiv(n, BLOCK),)](
        values, old_values, returns, mask, normalizer, grad, loss, stats, partial, tickets, _count(mask, tickets), n,
        clip, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


_TYPES = {"mask": "*i1", "partial": "*fp64", "normalizer": "*fp64", "ticket": "*i32", "total": "*i32"}
_PPO = [  # of a launch of PPO, GRPO, GSPO, CISPO and SAPO
    {"OBJECTIVE": 0, "BY_SEQUENCE": False, "ESTIMATOR": 2, "KL_BY_RATIO": False, "REDUCTION": 0},
    {"OBJECTIVE": 0, "BY_SEQUENCE": False, "ESTIMATOR": 0, "KL_BY_RATIO": False, "REDUCTION": 1}
    | {"PER_TOKEN": False, "total": None},
    {"OBJECTIVE": 0, "BY_SEQUENCE": True, "ESTIMATOR": 2, "KL_BY_RATIO": False, "REDUCTION": 1, "total": None},
    {"OBJECTIVE": 1, "BY_SEQUENCE": False, "ESTIMATOR": 2, "KL_BY_RATIO": True, "REDUCTION": 0},
    {"OBJECTIVE": 2, "BY_SEQUENCE": True, "ESTIMATOR": 1, "KL_BY_RATIO": True, "REDUCTION": 1, "total": None},
]
COMPILED = [
    (count_into, {"mask": "*i1", "total": "*i32"}, {"BLOCK": BLOCK, "num_warps": WARPS}),
    *(
        (_ppo_loss, _TYPES, {"PER_TOKEN": True, "BLOCK": BLOCK, "num_warps": WARPS, **REGISTERS, **options})
        for options in _PPO
    ),
    (_reinforce_loss, _TYPES, {"PER_TOKEN": True, "REDUCTION": 2, "BLOCK": BLOCK, "num_warps": WARPS}),
    (_ppo_value_loss, _TYPES, {"BLOCK": BLOCK, "num_warps": WARPS}),
]
