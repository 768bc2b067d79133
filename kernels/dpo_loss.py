"""Direct preference losses per pair, their rewards and gradients, in float64. csrc/pair_terms.h has the same terms."""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import expm1, log1p, sigmoid, softplus

BLOCK = 256
# The order of PAIR_TERMS in rlhf_fast/ops/pair_options.py.
SIGMOID, ROBUST, HINGE, IPO, EXO_PAIR, NCA_PAIR, APO_ZERO, APO_DOWN, SIGMOID_NORM, SPPO_HARD, DISCOPOP = (
    tl.constexpr(i) for i in range(11)
)
BCO_PAIR, SFT, CPO, SIMPO, ODDS_RATIO = (tl.constexpr(i) for i in range(11, 16))


@triton.jit
def _log1mexp(x):
    """log(1 - e^x) for x < 0, with all its digits at both ends."""
    near = x > -0.6931471805599453
    return tl.where(near, tl.log(-expm1(tl.where(near, x, -1.0))), log1p(-tl.exp(tl.where(near, -1.0, x))))


@triton.jit
def _term(c, r, beta, eps, log_eps, log_rest, margin, TYPE: tl.constexpr):
    """The loss of the log-ratios c and r, and its derivatives by c and r. eps is the label smoothing, log_eps its log,
    log_rest the log of 1 - eps, margin SimPO's gamma."""
    h = (c - r) * beta
    if TYPE == SIMPO:
        h -= margin
    p = sigmoid(h)
    q = sigmoid(-h)
    log_p = -softplus(-h)
    log_q = -softplus(h)
    if TYPE == IPO:
        error = c - r - 1 / (2 * beta)
        return error * error, 2 * error, -2 * error
    elif TYPE == NCA_PAIR:
        a = c * beta
        b = r * beta
        value = softplus(-a) + (softplus(a) + softplus(b)) / 2
        return value, (sigmoid(a) / 2 - sigmoid(-a)) * beta, sigmoid(b) / 2 * beta
    elif TYPE == APO_ZERO:
        a = c * beta
        b = r * beta
        return sigmoid(-a) + sigmoid(b), -beta * sigmoid(a) * sigmoid(-a), beta * sigmoid(b) * sigmoid(-b)
    elif TYPE == APO_DOWN:
        a = c * beta
        return sigmoid(a) + q, (sigmoid(a) * sigmoid(-a) - p * q) * beta, p * q * beta
    elif TYPE == BCO_PAIR:
        a = c * beta
        b = r * beta
        return softplus(-a) + softplus(b), -beta * sigmoid(-a), beta * sigmoid(b)
    elif TYPE == SFT:
        return -c, c * 0 - 1, c * 0
    elif TYPE == ODDS_RATIO:
        c = tl.where(c > -1e-7, -1e-7, c)
        r = tl.where(r > -1e-7, -1e-7, r)
        c_rest = _log1mexp(c)
        r_rest = _log1mexp(r)
        log_odds = (c - r) - (c_rest - r_rest)
        lost = -softplus(log_odds)
        return softplus(-log_odds) * beta, -beta * tl.exp(lost - c_rest), beta * tl.exp(lost - r_rest)
    elif TYPE == SPPO_HARD:
        win = c - 1 / (2 * beta)
        lose = r + 1 / (2 * beta)
        return win * win + lose * lose, 2 * win, 2 * lose
    else:
        if TYPE == ROBUST:
            value = (log_q * eps - log_p * (1 - eps)) / (1 - 2 * eps)
            by_h = (-q * (1 - eps) - p * eps) / (1 - 2 * eps)
        elif TYPE == HINGE:
            value = tl.where(h < 1, 1 - h, h - h)
            by_h = tl.where(h < 1, -1.0, h * 0)
        elif TYPE == EXO_PAIR:
            on_p = log_p - log_rest
            on_q = log_q - log_eps
            value = p * on_p + q * on_q
            by_h = p * q * (on_p - on_q)  # dp/dh = p q; the derivatives of log_p and log_q cancel
        elif TYPE == DISCOPOP:
            mix = sigmoid(h * 20)
            rest = sigmoid(h * -20)
            e_mix = tl.exp(-h - softplus(h * -20))  # e^-h by itself overflows where mix is 0
            value = e_mix - log_p * rest
            by_h = e_mix * (rest * 20 - 1) + mix * rest * 20 * log_p - q * rest
        else:
            value = -log_p * (1 - eps) - log_q * eps
            by_h = p * eps - q * (1 - eps)
        return value, by_h * beta, -by_h * beta


@triton.jit
def _log_ratio(logps, ref, b, inside):
    x = tl.load(logps + b, mask=inside, other=0.0).to(tl.float64)
    if ref is not None:
        x -= tl.load(ref + b, mask=inside, other=0.0)
    return x


@triton.jit
def _length(lengths, b, inside, TYPE: tl.constexpr):
    one = tl.full(b.shape, 1.0, tl.float64)
    if lengths is None:
        return one
    elif TYPE == IPO or TYPE == SIGMOID_NORM or TYPE == SFT or TYPE == SIMPO or TYPE == ODDS_RATIO:  # noqa: SIM109
        return tl.maximum(tl.load(lengths + b, mask=inside, other=1.0).to(tl.float64), 1.0)
    else:
        return one


@triton.jit
def _dpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    chosen_lengths,
    rejected_lengths,
    losses,
    chosen_rewards,
    rejected_rewards,
    grad_chosen,
    grad_rejected,
    B: tl.int64,
    beta: tl.float64,
    eps: tl.float64,
    log_eps: tl.float64,
    log_rest: tl.float64,
    margin: tl.float64,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = b < B
    c = _log_ratio(chosen, ref_chosen, b, inside)
    r = _log_ratio(rejected, ref_rejected, b, inside)
    c_length = _length(chosen_lengths, b, inside, TYPE)
    r_length = _length(rejected_lengths, b, inside, TYPE)
    value, by_c, by_r = _term(c / c_length, r / r_length, beta, eps, log_eps, log_rest, margin, TYPE)
    tl.store(losses + b, value, mask=inside)
    if TYPE == SIMPO or TYPE == ODDS_RATIO:  # noqa: SIM109
        c /= c_length
        r /= r_length
    tl.store(chosen_rewards + b, c * beta, mask=inside)
    tl.store(rejected_rewards + b, r * beta, mask=inside)
    if grad_chosen is not None:
        tl.store(grad_chosen + b, by_c / c_length, mask=inside)
        tl.store(grad_rejected + b, by_r / r_length, mask=inside)


def dpo_loss(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, beta, loss_type, eps, log_eps,
    log_rest, margin, losses, chosen_rewards, rejected_rewards, grad_chosen, grad_rejected,
):  # fmt: skip
    """log_eps: log(eps), log_rest: log(1 - eps); only exo_pair reads them."""
    B = chosen.numel()
    if B:
        _dpo_loss[(triton.cdiv(B, BLOCK),)](
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, losses, chosen_rewards,
            rejected_rewards, grad_chosen, grad_rejected, B, beta, eps, log_eps, log_rest, margin, TYPE=loss_type,
            BLOCK=BLOCK,
        )  # fmt: skip


COMPILED = [(_dpo_loss, {}, {"TYPE": loss_type, "BLOCK": BLOCK}) for loss_type in range(16)]
