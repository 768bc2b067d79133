"""Scalar maths of the Triton kernels, term by term that of csrc/math.h.

The last program to arrive ends a reduction over programs. It adds all partial sums in a fixed order, so that the same
inputs give the same bits, and sets the ticket back to 0 for the next launch.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MAX_LOG_RATIO = tl.constexpr(20.0)
K1, K2, K3, ABS = (tl.constexpr(i) for i in range(4))  # the order of ESTIMATORS in rlhf_fast/ops/kl.py


@triton.jit
def log1p(y):
    """log(1 + y) by Kahan's correction, which keeps the digits of small values."""
    u = 1 + y
    return tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def softplus(x):
    """log(1 + e^x); small values keep their digits."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    y = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1 / (1 + y), y / (1 + y))


@triton.jit
def expm1(x):
    """e^x - 1 in float64. The series below 1e-5 leaves a relative error of 1e-15."""
    return tl.where(tl.abs(x) < 1e-5, x * (1 + x / 2 * (1 + x / 3)), tl.exp(x) - 1)


@triton.jit
def tanh(x):
    """tanh(x) by a polynomial below 0.625 in float32, elsewhere by e^2x."""
    y = tl.abs(x)
    y2 = y * y
    p = -5.70493396e-3
    p = p * y2 + 2.06390419e-2
    p = p * y2 - 5.37397019e-2
    p = p * y2 + 1.33314420e-1
    p = p * y2 - 3.33332819e-1
    t = tl.where((y < 0.625) & (x.dtype != tl.float64), y + y * y2 * p, 1 - 2 / (tl.exp(2 * y) + 1))
    return tl.where(x < 0, -t, t)


@triton.jit
def bregman(x):
    """e^x - 1 - x without cancellation near 0."""
    p = 2.48416795e-5 * x + 1.99619571e-4
    p = p * x + 1.38890401e-3
    p = p * x + 8.33318276e-3
    p = p * x + 4.16666643e-2
    p = p * x + 1.66666671e-1
    near = (p * x + 0.5) * x * x
    if x.dtype == tl.float64:
        near = tl.where(tl.abs(x) < 1e-3, x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x / 120))), tl.exp(x) - 1 - x)
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1 - x)


@triton.jit
def kl_term(d, ESTIMATOR: tl.constexpr):
    """The KL estimate and its derivative by logp, from d = logp - ref_logp."""
    if ESTIMATOR == K1:
        return d, tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == K2:
        return d * d / 2, d
    elif ESTIMATOR == K3:
        k3 = bregman(-d)
        return k3, d - k3
    else:
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0))


@triton.jit
def number(x, F: tl.constexpr):
    """An option in the dtype of the arithmetic. Options arrive in float64, which would widen the arithmetic."""
    return tl.full([], x, F)


@triton.jit
def clamp(x, low, high):
    """x bounded by low and high. NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def count_true(mask, n, BLOCK: tl.constexpr):
    """The number of True places among n, in float64."""
    columns = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        count += tl.load(mask + start + columns, mask=start + columns < n, other=0).to(tl.int32)
    return tl.sum(count.to(tl.int64)).to(tl.float64)


@triton.jit
def count_into(mask, n: tl.int64, total, BLOCK: tl.constexpr):
    """Adds one block's number of True places to the integer `total`, for masks too long for every program to count."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(mask + at, mask=at < n, other=0).to(tl.int32)), sem="relaxed")


@triton.jit
def is_last(ticket, programs):
    """Whether this program is the last of `programs` programs to get here."""
    tl.debug_barrier()  # every thread's partial sums are on their way before the ticket is drawn
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_partials(partial, n, BLOCK: tl.constexpr):
    """Sum of n float64 values that other programs of this launch wrote. The loads bypass the L1 cache."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        total += tl.load(partial + start + columns, mask=start + columns < n, other=0.0, cache_modifier=".cg")
    return tl.sum(total)
