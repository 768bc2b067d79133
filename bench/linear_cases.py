"""The fused linear heads beside the unfused layer and loss, torch's own fused cross-entropy, and the bare matmuls.

N tokens, H hidden, V vocabulary. bf16 is left out on CPUs without a unit for it, where the rivals' bf16 matmul of an
untransposed matrix takes minutes. Ours widens the weight a tile at a time there and takes as long as in fp32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Function
from rlhf_fast import ops

TORCH_FUSED = "torch linear_cross_entropy"
TORCH_CHUNK = 512
"""Rows of a chunk: torch's default chunking is several times slower on CPU."""


def linear_cases(n: int, hidden: int, vocabulary: int, dtype: torch.dtype, tag: str = "") -> list[Case]:
    """The cases at hidden [n, hidden] and weight [vocabulary, hidden] of this dtype; `tag` follows the names."""

    def inputs(*extra: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def make() -> tuple[Tensor, ...]:
            h, weight = torch.randn(n, hidden) / 2, torch.randn(vocabulary, hidden) / hidden**0.5
            h, weight = h.to(dtype), weight.to(dtype)
            return h, weight, torch.randint(0, vocabulary, (n,)), *(each() for each in extra)

        return make

    def case(name: str, extra: tuple, ours: Function, eager: Function, products: int, **options: object) -> Case:
        return Case(
            name=f"{name}{tag} forward + backward",
            shape=f"[{n}, {hidden}] x [{vocabulary}, {hidden}]",
            make_inputs=inputs(*extra),
            ours=ours,
            eager=eager,
            compiled=True,
            products=products,
            **options,
        )

    def per_token() -> Tensor:
        return torch.randn(n)

    def old_logprobs() -> Tensor:
        return torch.randn(n) / 5 - 10.4

    reference = (lambda: torch.randn(n, hidden) / 2, lambda: torch.randn(vocabulary, hidden) / hidden**0.5)
    both = {"differentiable": (0, 1)}
    fused = {TORCH_FUSED: torch_sft} if hasattr(F, "linear_cross_entropy") else {}
    return [
        case("linear_sft_loss", (), our_sft, eager_sft, 3, **both, others=fused),
        case("linear_ppo_loss", (old_logprobs, per_token), our_ppo, eager_ppo, 3, **both),
        case("linear_ppo_loss, frozen head,", (old_logprobs, per_token), our_ppo, eager_ppo, 2, differentiable=(0,)),
        case("linear_token_logprobs", (per_token,), our_logprobs, eager_logprobs, 3, **both),
        case("linear_token_kl", (per_token, *reference), our_kl, eager_kl, 4, **both),
    ]


def our_sft(h: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor]:
    """The fused loss."""
    return (ops.linear_sft_loss(h, weight, ids).loss,)


def eager_sft(h: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor]:
    """Matmul, then cross-entropy."""
    return (F.cross_entropy(h @ weight.t(), ids),)


def torch_sft(h: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor]:
    """torch's own fused loss."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)
    return (F.linear_cross_entropy(h, weight, ids, options=options),)


def our_ppo(h: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
    """The fused loss, its log-probs and entropies."""
    mask = torch.ones_like(ids[None], dtype=torch.bool)
    out = ops.linear_ppo_loss(h[None], weight, ids[None], old[None], advantages[None], mask)
    return out.loss, out.logprobs[0], out.token_entropy[0]


def eager_ppo(h: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
    """Matmul, log_softmax, then the clipped objective."""
    logp = torch.log_softmax(h @ weight.t(), -1)
    logprobs = logp.gather(-1, ids[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    ratio = torch.exp(logprobs - old)
    loss = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)).mean()
    return loss, logprobs.detach(), entropy


def our_logprobs(h: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """A weighted mean of the fused log-probs."""
    logprobs, entropy = ops.linear_token_logprobs(h, weight, ids)
    return (logprobs * upstream).mean(), logprobs.detach(), entropy.detach()


def eager_logprobs(h: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Matmul, log_softmax, then the weighted mean."""
    logp = torch.log_softmax(h @ weight.t(), -1)
    logprobs = logp.gather(-1, ids[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return (logprobs * upstream).mean(), logprobs.detach(), entropy


def our_kl(
    h: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, ref_h: Tensor, ref_weight: Tensor
) -> tuple[Tensor, ...]:
    """The fused log-probs and KL, in a loss of both."""
    out = ops.linear_token_kl(h, weight, ref_h, ref_weight, ids)
    loss = (out.logprobs * upstream).mean() + out.kl.mean()
    return loss, out.logprobs.detach(), out.entropy.detach(), out.kl.detach(), out.ref_logprobs


def eager_kl(
    h: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, ref_h: Tensor, ref_weight: Tensor
) -> tuple[Tensor, ...]:
    """Two matmuls, two log_softmax, then the formulas."""
    logp = torch.log_softmax(h @ weight.t(), -1)
    with torch.no_grad():
        logq = torch.log_softmax(ref_h @ ref_weight.t(), -1)
        entropy = -(logp.exp() * logp).sum(-1)
    logprobs, ref_logprobs = (x.gather(-1, ids[:, None])[:, 0] for x in (logp, logq))
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return (logprobs * upstream).mean() + kl.mean(), logprobs.detach(), entropy, kl.detach(), ref_logprobs
