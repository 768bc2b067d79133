"""The online softmax of token_logprobs, token_kl and sample_tokens. csrc/math.h has the same state in base e.

A state (m, s, a) of some logits z holds their maximum m and, over x = (z - m) log2(e) / temperature, the sums
s = sum 2^x and a = sum x 2^x. The functions take scale = log2(e) / temperature.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import LOG2E, log1p, number, softplus, tanh


@triton.jit
def capped(z, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(z / softcap), or z without SOFTCAP."""
    return tanh(z / softcap) * softcap if SOFTCAP else z


@triton.jit
def bounded(x):
    """x bounded from below, where 2^x is 0, because 0 * -inf is NaN. NaN stays NaN."""
    if x.dtype == tl.float64:
        return tl.where(x < -1100.0, -1100.0, x)
    else:
        return tl.where(x < -150.0, -150.0, x)


@triton.jit
def add_tile(z, m, s, a, scale):
    """The states [COLUMNS] after a tile of logits z [ROWS, COLUMNS] is added to the states (m, s, a) [COLUMNS]."""
    top = tl.maximum(m, tl.max(z, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    moved = (m - shift) * scale
    e = tl.exp2(moved)
    a = tl.where(e == 0, 0.0, e * (a + s * moved))  # moved is -inf for an empty state
    s = s * e
    x = (z - shift[None, :]) * scale
    x = bounded(x)
    e = tl.exp2(x)
    return top, s + tl.sum(e, 0), a + tl.sum(e * x, 0)


@triton.jit
def recentred(m, s, a, top, scale, CENTRED: tl.constexpr):
    """The state (m, s, a) moved to another maximum `top`: (factor, s, a). Without CENTRED, a is only scaled."""
    moved = (m - tl.where(top == float("-inf"), 0.0, top)) * scale
    e = tl.exp2(moved)
    if CENTRED:
        a = tl.where(e == 0, 0.0, a + s * moved)
    return e, s * e, a * e


@triton.jit
def reduced(m, s, a, scale):
    """One state merged from many."""
    top = tl.max(m, 0)
    x = (m - tl.where(top == float("-inf"), 0.0, top)) * scale
    e = tl.exp2(x)
    return top, tl.sum(s * e, 0), tl.sum(tl.where(e == 0, 0.0, e * (a + s * x)), 0)


@triton.jit
def row_results(m, s, a, z, scale):
    """(logprob, entropy, shift, log_sum) of a row in float64, from the state of all columns but the target and from the
    target's logit z. shift is the row's largest logit, log_sum = log sum e^((logit - shift) / temperature)."""
    factor = number(scale, tl.float64) / LOG2E
    m = m.to(tl.float64)
    z = z.to(tl.float64)
    s = s.to(tl.float64)
    a = a.to(tl.float64) / LOG2E
    lead = tl.where(s == 0, float("-inf"), (m - z) * factor + tl.log(tl.where(s == 0, 1.0, s)))
    logprob = tl.where(s == 0, z - z, -softplus(lead))
    logprob = tl.where(z == float("-inf"), float("-inf"), logprob)
    shift = tl.maximum(m, z)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    x_others = tl.where(m == float("-inf"), 0.0, (m - shift) * factor)
    x_target = tl.where(z == float("-inf"), 0.0, (z - shift) * factor)
    w_others = tl.exp(x_others)
    w_target = tl.where(z == float("-inf"), 0.0, tl.exp(x_target))
    rest = s * w_others
    total = rest + w_target
    centred = (a + s * x_others) * w_others + x_target * w_target
    log_sum = tl.where(total == 0, 0.0, tl.log(tl.where(total == 0, 1.0, total)))
    log_sum = tl.where(w_target == 1, log1p(rest), log_sum)  # the rest keeps its digits beside a target of weight 1
    h = log_sum - centred / tl.where(total == 0, 1.0, total)
    return logprob, tl.where(h < 0, 0.0, h), shift, log_sum
