"""From rows of logits or of hidden states: log-probability, entropy, exact KL, sampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.reference.dtypes import at_least_fp32, no_autocast
from rlhf_fast.ops.results import TokenKL, TokenLogprobs

IGNORED_ID = -100
"""The token id of a masked place, as in `torch.nn.functional.cross_entropy`."""


def capped_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(logits / softcap), at least float32."""
    z = at_least_fp32(logits)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def scaled_logits(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """softcap tanh(logits / softcap) / temperature, less the row's largest, at least float32."""
    z = capped_logits(logits, softcap)
    top = z.detach().amax(-1, keepdim=True)  # subtracted first, because a large logit rounds when it is divided
    return torch.where(top.isfinite(), z - top, z) / temperature


def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> TokenLogprobs:
    """log p(token) = -softplus(log sum of the others - z_token), which stays non-zero for a confident token."""
    keep = token_ids != IGNORED_ID
    ids = torch.where(keep, token_ids, 0).unsqueeze(-1)
    z = scaled_logits(torch.where(keep.unsqueeze(-1), logits, 0), temperature, softcap)
    c = z - z.detach().amax(-1, keepdim=True)
    e = torch.exp(c)
    s_others = e.scatter(-1, ids, 0.0).sum(-1)
    alone = s_others == 0
    c_target = c.gather(-1, ids).squeeze(-1)
    log_odds = c_target - torch.log(torch.where(alone, 1.0, s_others))
    logprobs = torch.where(alone, 0.0, F.logsigmoid(log_odds))  # F.softplus is linear past 20
    a = (e * torch.where(c == -math.inf, 0.0, c)).sum(-1)
    log_s = torch.log1p(s_others + torch.expm1(c_target))  # keeps what little the others add to a confident token
    entropy = log_s - a / e.sum(-1)
    return TokenLogprobs(torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """hidden weight^T + bias in this dtype, whatever autocast says."""
    with no_autocast(hidden):
        return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of the logits of a last layer."""
    logits = linear_logits(hidden, weight, bias, compute_dtype(hidden, weight, bias))
    return token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap)


def _difference(z: Tensor, z_ref: Tensor, centre: Tensor) -> Tensor:
    """z_ref - z - centre with the rounding error of z_ref - z, as `difference` in csrc/softmax_pair.h."""
    apart = z_ref - z
    minus_z = apart - z_ref
    return (apart - centre) + ((z_ref - (apart - minus_z)) - (z + minus_z))


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenKL:
    """KL = sum p (log p - log q) over the tokens that p can give; infinite where q cannot give one of them."""
    keep = token_ids != IGNORED_ID
    logits, ref_logits = (at_least_fp32(torch.where(keep.unsqueeze(-1), x, 0)) for x in (logits, ref_logits.detach()))
    log_p, log_q = (F.log_softmax(scaled_logits(x, temperature, softcap), -1) for x in (logits, ref_logits))
    log_ratio = torch.where(log_p > -math.inf, log_p - log_q, 0.0)
    p = log_p.exp().clamp(min=torch.finfo(log_p.dtype).tiny)  # not 0 * infinity where it underflows
    kl = (p * log_ratio).sum(-1)
    kl = torch.where(kl < 0, 0.0, kl)  # NaN stays NaN, with its gradient
    # The gradient p (log p - log q - KL) is taken as p (E_p[u] - u) with u = z_ref - z - a centre, because log p and
    # log q round where one logit lies far above the others. The value stays the one above.
    z, z_ref, possible = capped_logits(logits, softcap), capped_logits(ref_logits, softcap), log_p > -math.inf
    likeliest = log_p.argmax(-1, keepdim=True)
    centre = (z_ref - z).detach().gather(-1, likeliest)

    def about(centre: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.where(possible, _difference(z, z_ref, centre), 0.0) / temperature
        return u, (log_p.exp() * u).sum(-1, keepdim=True).detach()

    u, mean = about(centre)
    u, mean = about(centre + mean * temperature)  # the second time about the mean
    by_u = -(log_p.exp() * (u - mean)).sum(-1) - torch.logsumexp(scaled_logits(logits, temperature, softcap), -1)
    kl = torch.where(kl.isfinite(), kl.detach() + (by_u - by_u.detach()), kl)
    ref = token_logprobs(ref_logits, token_ids, temperature=temperature, softcap=softcap)
    policy = token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap)
    return TokenKL(*policy, torch.where(keep, kl, 0.0), ref.logprobs)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenKL:
    """`token_kl` of the logits of two last layers, the reference a constant."""
    dtype = compute_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    logits = linear_logits(hidden, weight, bias, dtype)
    with torch.no_grad():
        ref_logits = linear_logits(ref_hidden, ref_weight, ref_bias, dtype)
    return token_kl(logits, ref_logits, token_ids, temperature=temperature, softcap=softcap)


@torch.no_grad()
def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, greedy_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse CDF: the first token whose running sum of p exceeds the uniform number; or the first maximum."""
    z = scaled_logits(logits, temperature, None)
    e = torch.exp(z - z.amax(-1, keepdim=True)).double()
    below = (e.cumsum(-1) <= (uniforms * e.sum(-1)).unsqueeze(-1)).sum(-1)
    last_possible = e.shape[-1] - 1 - (e > 0).int().flip(-1).argmax(-1)
    tokens = torch.minimum(below, last_possible)
    if greedy_mask is not None:
        tokens = torch.where(greedy_mask, z.argmax(-1), tokens)
    out = token_logprobs(logits, tokens, temperature=temperature)
    return tokens, out.logprobs, out.entropy
