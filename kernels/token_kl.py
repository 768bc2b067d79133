"""log p(token), entropy and KL(p || q) of the softmaxes of two rows of logits. The forward pass reads both rows once.

    u_j = (z_ref_j - z_j - centre) / temperature      KL = log E_p[e^u] - E_p[u]

csrc/softmax_pair.h says how the sums of u give the KL. The centre is z_ref - z of the target first, and near
E_p[z_ref - z] where the target is far from it. A lane keeps its own state, as in token_logprobs. The kernels have no
16-byte loads, because the linear head's rows are float32, and split no row over programs.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import LOG2E, bregman, expm1, log1p, number
from rlhf_fast.kernels.softmax import bounded, capped, recentred, row_results

COLUMNS = 2048
BLOCK = 2048  # columns of a program of the backward pass
WARPS = 8


@triton.jit
def _target(logits, target, V, cap, SOFTCAP: tl.constexpr, F: tl.constexpr):
    z = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(F)
    return capped(z, cap, SOFTCAP)


@triton.jit
def _finite(z):
    return tl.where((z > float("-inf")) & (z < float("inf")), z, 0.0)


@triton.jit
def _log_ratio(z, ref, centre):
    """ref - z - centre with the rounding error of ref - z, as `difference` in csrc/softmax_pair.h."""
    apart = ref - z
    minus_z = apart - ref
    return (apart - centre) + ((ref - (apart - minus_z)) - (z + minus_z))


@triton.jit
def _is_near(u):
    return (u > -0.5) & (u < 0.5)


@triton.jit
def _excess(u):
    """e^u - 1 - u where u is near 0, else -1 - u, to which the reference's sum adds e^u."""
    near = _is_near(u)
    return tl.where(near, bregman(tl.where(near, u, 0.0)), -1 - u)


@triton.jit
def _token_kl(
    logits,
    ref_logits,
    ids,
    logprobs,
    entropy,
    kl,
    ref_logprobs,
    stats,
    row_stride: tl.int64,
    ref_row_stride: tl.int64,
    V: tl.int32,
    scale: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    F: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + row)
    if target == -100:
        tl.store(kl + row, 0.0)
        tl.store(logprobs + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(ref_logprobs + row, 0.0)
        tl.store(stats + 4 * row + tl.arange(0, 4), tl.zeros([4], F))
    else:
        logits += row * row_stride
        ref_logits += row * ref_row_stride
        columns = tl.arange(0, COLUMNS)
        factor = number(scale, F)
        cap = number(softcap, F)
        z_target = _target(logits, target, V, cap, SOFTCAP, F)
        ref_target = _target(ref_logits, target, V, cap, SOFTCAP, F)
        centre = _finite(ref_target - z_target)
        logprob = tl.zeros([], tl.float64)
        h = tl.zeros([], tl.float64)
        difference = tl.zeros([], tl.float64)
        ref_logprob = tl.zeros([], tl.float64)
        shift = tl.zeros([], tl.float64)
        log_sum = tl.zeros([], tl.float64)
        mean = tl.zeros([], tl.float64)
        left = tl.full([], 7, tl.int32)
        while left > 0:
            m = tl.full([COLUMNS], float("-inf"), F)
            s = tl.zeros([COLUMNS], F)
            a = tl.zeros([COLUMNS], F)
            u_sum = tl.zeros([COLUMNS], F)
            curve = tl.zeros([COLUMNS], F)  # weighted sum of e^u - 1 - u, or of -1 - u where u is not near 0
            ref_m = tl.full([COLUMNS], float("-inf"), F)
            ref_s = tl.zeros([COLUMNS], F)
            ref_far = tl.zeros([COLUMNS], F)  # the reference's sum over the tokens whose u is not near 0
            endless = tl.zeros([COLUMNS], tl.int32)  # 1: a token of p is impossible under q, the KL is infinite
            for start in range(0, V, COLUMNS):
                column = start + columns
                inside = (column < V) & (column != target)
                z = capped(tl.load(logits + column, mask=inside, other=0.0).to(F), cap, SOFTCAP)
                ref = capped(tl.load(ref_logits + column, mask=inside, other=0.0).to(F), cap, SOFTCAP)
                z = tl.where(inside, z, float("-inf"))
                ref = tl.where(inside, ref, float("-inf"))
                top = tl.maximum(m, z)
                moved, s, a = recentred(m, s, a, top, factor, True)
                x = bounded((z - tl.where(top == float("-inf"), 0.0, top)) * factor)
                e = tl.exp2(x)
                missing = (z > float("-inf")) & (ref == float("-inf"))
                endless = tl.where(missing, 1, endless)
                u = tl.where(missing, 0.0, _log_ratio(z, ref, centre) * (factor / LOG2E))
                s += e
                a += e * x
                # An infinite sum stays infinite or becomes NaN; the KL does not use it.
                u_sum = tl.where(m == float("-inf"), 0.0, u_sum * moved) + tl.where(e == 0, 0.0, e * u)
                curve = tl.where(m == float("-inf"), 0.0, curve * moved) + tl.where(e == 0, 0.0, e * _excess(u))
                m = top
                top = tl.maximum(ref_m, ref)
                _, ref_s, ref_far = recentred(ref_m, ref_s, ref_far, top, factor, False)
                ref_e = tl.exp2(bounded((ref - tl.where(top == float("-inf"), 0.0, top)) * factor))
                ref_s += ref_e
                ref_far += tl.where(_is_near(u), 0.0, ref_e)
                ref_m = top
            top = tl.max(m, 0)
            e, s, a = recentred(m, s, a, top, factor, True)
            s_row = tl.sum(s, 0)
            u_row = tl.sum(tl.where(e == 0, 0.0, u_sum * e), 0)
            curve_row = tl.sum(tl.where(e == 0, 0.0, curve * e), 0)
            logprob, h, shift, log_sum = row_results(top, s_row, tl.sum(a, 0), z_target, scale)
            ref_top = tl.max(ref_m, 0)
            _, ref_s, ref_far = recentred(ref_m, ref_s, ref_far, ref_top, factor, False)
            far_row = tl.sum(ref_far, 0)
            ref_s_row = tl.sum(ref_s, 0)
            ref_logprob, _, ref_shift, ref_log_sum = row_results(ref_top, ref_s_row, 0 * s_row, ref_target, scale)
            missing = (z_target > float("-inf")) & (ref_target == float("-inf"))
            infinite = missing | (tl.max(endless, 0) > 0)
            per_nat = scale / LOG2E
            others = tl.where(s_row == 0, 0.0, tl.exp((top - shift) * per_nat) / tl.exp(log_sum))
            u_target = _log_ratio(z_target.to(tl.float64), ref_target.to(tl.float64), centre.to(tl.float64)) * per_nat
            p_target = tl.where(missing | (z_target == float("-inf")), 0.0, tl.exp(logprob))
            mean = tl.where(others == 0, 0.0, u_row * others) + tl.where(p_target == 0, 0.0, p_target * u_target)
            bend = tl.where(others == 0, 0.0, curve_row * others)
            bend += tl.where(p_target == 0, 0.0, p_target * _excess(u_target))
            far = tl.where(far_row == 0, 0.0, far_row * tl.exp((ref_top - ref_shift) * per_nat))
            far += tl.where(_is_near(u_target), 0.0, tl.exp((ref_target - ref_shift) * per_nat))
            apart = _log_ratio(shift, ref_shift, centre.to(tl.float64)) * per_nat
            growth = mean + bend + tl.where(far == 0, 0.0, far * tl.exp(apart - log_sum))  # E_p[e^u] - 1
            near = (growth >= -0.5) & (growth < float("inf")) & (tl.abs(mean) < 8)
            log_mean = tl.where(near, log1p(tl.where(near, growth, 0.0)), apart + ref_log_sum - log_sum)
            difference = log_mean - mean
            difference = tl.where(difference < 0, 0.0, difference)
            difference = tl.where(infinite, float("inf") + 0 * (log_sum + ref_log_sum), difference)
            # The centre moves to the mean, so that little is left to cancel in the gradient. Sums about a centre far
            # from the mean have lost digits, and are made again.
            about = (centre.to(tl.float64) + mean / per_nat).to(F)
            finite = (difference < float("inf")) & (about > float("-inf")) & (about < float("inf"))
            about = tl.where(finite, about, centre)
            left = tl.where(finite & (tl.abs(mean) > 8), left - 1, 0)
            mean += (centre.to(tl.float64) - about.to(tl.float64)) * per_nat
            mean = tl.where(difference < float("inf"), mean, float("nan"))
            centre = about
        tl.store(logprobs + row, logprob)
        tl.store(entropy + row, h)
        tl.store(kl + row, difference)
        tl.store(ref_logprobs + row, ref_logprob)
        tl.store(stats + 4 * row, shift)
        tl.store(stats + 4 * row + 1, log_sum)
        tl.store(stats + 4 * row + 2, centre)
        tl.store(stats + 4 * row + 3, mean)


def token_kl(
    logits, row_stride, ref_logits, ref_row_stride, ids, rows, V, temperature, softcap, logprobs, entropy, kl,
    ref_logprobs, stats, compute,
):  # fmt: skip
    _token_kl[(rows,)](
        logits, ref_logits, ids, logprobs, entropy, kl, ref_logprobs, stats, row_stride, ref_row_stride, V,
        LOG2E.value / temperature, softcap, SOFTCAP=softcap != 0, F=compute, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _token_kl_backward(
    logits,
    ref_logits,
    ids,
    logprobs,
    entropy,
    stats,
    grad_logprobs,
    grad_entropy,
    grad_kl,
    grad_logits,
    row_stride: tl.int64,
    ref_row_stride: tl.int64,
    grad_row_stride: tl.int64,
    V: tl.int32,
    blocks: tl.int32,
    scale: tl.float64,
    softcap: tl.float64,
    SOFTCAP: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    target = tl.load(ids + row)
    out = grad_logits + row * grad_row_stride + column
    if target == -100:
        tl.store(out, tl.zeros([BLOCK], F), mask=inside)
    else:
        base2 = number(scale, F)
        factor = base2 / LOG2E
        cap = number(softcap, F)
        by_logprob = tl.zeros([1], F)
        by_entropy = tl.zeros([1], F)
        by_kl = tl.zeros([1], F)
        if grad_logprobs is not None:
            by_logprob += tl.load(grad_logprobs + row)
        if grad_entropy is not None:
            by_entropy += tl.load(grad_entropy + row)
        if grad_kl is not None:
            by_kl += tl.load(grad_kl + row)
        h = tl.load(entropy + row)
        shift = tl.load(stats + 4 * row)
        log_sum = tl.load(stats + 4 * row + 1)
        centre = tl.load(stats + 4 * row + 2)
        mean = tl.where(by_kl == 0, 0.0, tl.load(stats + 4 * row + 3))
        z = capped(tl.load(logits + row * row_stride + column, mask=inside, other=0.0).to(F), cap, SOFTCAP)
        ref = capped(tl.load(ref_logits + row * ref_row_stride + column, mask=inside, other=0.0).to(F), cap, SOFTCAP)
        x = bounded((z - shift) * base2)
        p = tl.exp2(x) * tl.exp(-log_sum)
        u = _log_ratio(z, ref, centre) * factor
        log_ratio = tl.where((p == 0) | (by_kl == 0), 0.0, mean - u)  # log p - log q - KL
        weight = by_kl * log_ratio - by_entropy * (x / LOG2E - log_sum + h)
        logprob = tl.load(logprobs + row).to(tl.float64)
        at_target = (-expm1(logprob)).to(F)
        g = tl.where(p == 0, 0.0, p * weight) + by_logprob * tl.where(column == target, at_target, -p)
        g = g * factor
        if SOFTCAP:
            t = z / cap
            g = g * (1 - t * t)
        tl.store(out, g.to(grad_logits.dtype.element_ty), mask=inside)


def token_kl_backward(
    logits, row_stride, ref_logits, ref_row_stride, ids, rows, V, temperature, softcap, logprobs, entropy, stats,
    grad_logprobs, grad_entropy, grad_kl, grad_logits, grad_row_stride, compute,
):  # fmt: skip
    """grad_logits may be the memory of the logits."""
    blocks = triton.cdiv(V, BLOCK)
    _token_kl_backward[(rows * blocks,)](
        logits, ref_logits, ids, logprobs, entropy, stats, grad_logprobs, grad_entropy, grad_kl, grad_logits,
        row_stride, ref_row_stride, grad_row_stride, V, blocks, LOG2E.value / temperature, softcap,
        SOFTCAP=softcap != 0, F=compute, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


COMPILED = []
for _dtype in ("*bf16", "*fp32"):
    _logits = {"ids": "*i64", "logits": _dtype, "ref_logits": _dtype, "grad_logits": _dtype}
    _constants = {"SOFTCAP": False, "F": tl.float32, "num_warps": WARPS}
    COMPILED += [
        (_token_kl, _logits, _constants | {"COLUMNS": COLUMNS}),
        (_token_kl_backward, _logits, _constants | {"BLOCK": BLOCK}),
    ]
