"""What the operations are held against: float64 formulas written apart from `rlhf_fast`, tolerances, awkward inputs."""

import torch

VALUE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float64: 1e-12}
"""Half-precision inputs are exact numbers: the float32 statistics made from them are held to float32's tolerance."""

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-11}
"""Gradients have the dtype of the input and are rounded once: half a unit in the last place."""


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error, relative where the truth is larger than 1."""
    assert actual.shape == truth.shape
    if actual.numel() == 0:
        return 0.0
    return ((actual.detach().double() - truth.double()).abs() / truth.double().abs().clamp(min=1)).max().item()


def token_truth(logits, ids, grad_logprobs, grad_entropy, temperature=1.0, softcap=None):
    """float64 log-probs, entropies and their gradient: gL (1[j = t] - p_j) - gH p_j (log p_j + H), times dz/dlogit."""
    raw = logits.double()
    slope = torch.ones_like(raw)
    if softcap is not None:
        slope = 1 - torch.tanh(raw / softcap) ** 2
        raw = softcap * torch.tanh(raw / softcap)
    z = raw / temperature
    logp = z - torch.logsumexp(z, -1, keepdim=True)
    p = logp.exp()
    logp_or_0 = torch.where(p > 0, logp, 0.0)
    entropy = -(p * logp_or_0).sum(-1)
    onehot = torch.zeros_like(z).scatter(-1, ids.unsqueeze(-1), 1.0)
    others = torch.logsumexp(z.masked_fill(onehot.bool(), -torch.inf), -1)
    target = -torch.nn.functional.softplus(others - z.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
    gradient = grad_logprobs.double().unsqueeze(-1) * (onehot - p)
    gradient = gradient - grad_entropy.double().unsqueeze(-1) * p * (logp_or_0 + entropy.unsqueeze(-1))
    return target, entropy, gradient * slope / temperature


def kl_truth(logits, ref_logits, ids, grad_logprobs, grad_entropy, grad_kl, temperature=1.0, softcap=None):
    """float64 log-probs, entropies, KLs, reference log-probs and the gradient: gK p_j (log p_j - log q_j - KL) more."""
    zero = torch.zeros(ids.shape)
    options = dict(temperature=temperature, softcap=softcap)
    logprobs, entropy, gradient = token_truth(logits, ids, grad_logprobs, grad_entropy, **options)
    ref_logprobs = token_truth(ref_logits, ids, zero, zero, **options)[0]
    slope = torch.ones_like(gradient)
    z, z_ref = logits.double(), ref_logits.double()
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z, z_ref = softcap * torch.tanh(z / softcap), softcap * torch.tanh(z_ref / softcap)
    logp, logq = ((x / temperature).log_softmax(-1) for x in (z, z_ref))
    ratio = torch.where(logp > -torch.inf, logp - logq, 0.0)
    kl = (logp.exp() * ratio).sum(-1)
    by_kl = grad_kl.double().unsqueeze(-1) * logp.exp() * (ratio - kl.unsqueeze(-1))
    return logprobs, entropy, kl, ref_logprobs, gradient + by_kl * slope / temperature


def ragged_mask(rows: int, length: int) -> torch.Tensor:
    """Rows that end early, one with a hole, one empty, one full."""
    lengths = torch.arange(rows) * length // max(rows - 1, 1)
    mask = torch.arange(length) < lengths[:, None]
    if rows > 2 and length > 4:
        mask[-2, 2:4] = False
    return mask


def poisoned(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """NaN and infinity at the masked places."""
    junk = torch.full_like(x, torch.nan)
    junk[..., ::2] = torch.inf
    return torch.where(mask, x, junk)
