"""The online softmax of token_logprobs, token_kl and sample_tokens, term by term the one of csrc/math.h.

A state (m, s, a) of some logits z holds their maximum m and, over x = (z - m) log2(e) / temperature, the sums
s = sum 2^x and a = sum x 2^x. The functions take scale = log2(e) / temperature.
"""

import triton
import triton.language as tl
from rlhf_fast.kernels.maths import LOG2E, log1p, number, softplus, tanh


@triton.jit
def capped(z, softcap, SOFTCAP: tl.constexpr):
    return tanh(z / softcap) * softcap if SOFTCAP else z


@triton.jit
def bounded(x):
    """2^x is 0 at the bound: 0 * -inf would be NaN. Keeps NaN."""
    if x.dtype == tl.float64:
        return tl.where(x < -1100.0, -1100.0, x)
    else:
        return tl.where(x < -150.0, -150.0, x)


@triton.jit
def add_tile(z, m, s, a, scale):
    """States [COLUMNS] after a tile of logits [ROWS, COLUMNS]; scale: log2(e) / temperature."""
    top = tl.maximum(m, tl.max(z, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    moved = (m - shift) * scale
    e = tl.exp2(moved)
    a = tl.where(e == 0, 0.0, e * (a + s * moved))  # moved is -inf where nothing has been summed
    s = s * e
    x = (z - shift[None, :]) * scale
    x = bounded(x)
    e = tl.exp2(x)
    return top, s + tl.sum(e, 0), a + tl.sum(e * x, 0)


@triton.jit
def recentred(m, s, a, top, scale, CENTRED: tl.constexpr):
    """The factor e of a move from m to top, and sums of e^x and (CENTRED) x e^x, base 2, about top."""
    moved = (m - tl.where(top == float("-inf"), 0.0, top)) * scale
    e = tl.exp2(moved)
    if CENTRED:
        a = tl.where(e == 0, 0.0, a + s * moved)
    return e, s * e, a * e


@triton.jit
def reduced(m, s, a, scale):
    """One state of many."""
    top = tl.max(m, 0)
    x = (m - tl.where(top == float("-inf"), 0.0, top)) * scale
    e = tl.exp2(x)
    return top, tl.sum(s * e, 0), tl.sum(tl.where(e == 0, 0.0, e * (a + s * x)), 0)


@triton.jit
def row_results(m, s, a, z, scale):
    """(logprob, entropy, shift, log_sum) in float64, from the state of all columns but the target (a: base 2) and the
    target's logit z."""
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
    log_sum = tl.where(w_target == 1, log1p(rest), log_sum)  # beside a target that weighs 1 the rest keeps its digits
    h = log_sum - centred / tl.where(total == 0, 1.0, total)
    return logprob, tl.where(h < 0, 0.0, h), shift, log_sum
