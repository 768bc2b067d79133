"""linear_kto_loss: KTO straight from hidden states, the gradient taken in the forward pass."""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import check_dims
from rlhf_fast.ops.dispatch import LIBRARY, define, has_kernel, kernel
from rlhf_fast.ops.gradients import register_consumed_gradients
from rlhf_fast.ops.heads import full_precision, loss_in_forward, pack_rows
from rlhf_fast.ops.kto import check_kto_arguments
from rlhf_fast.ops.linear import check_head, empty_gradients, wants_gradients
from rlhf_fast.ops.linear_ops import GRADIENTS, HEAD, OPTIONS, head_of
from rlhf_fast.ops.policy_options import as_tensor, check_normalizer
from rlhf_fast.ops.reference import compute_dtype
from rlhf_fast.ops.results import LinearKTOLoss

define(
    f"linear_kto_loss({HEAD}, Tensor ref_logps, Tensor labels, Tensor kl, Tensor? normalizer, float beta, "
    f"str loss_type, float desirable_weight, float undesirable_weight, {OPTIONS}) "
    f"-> (Tensor loss, Tensor losses, Tensor rewards, Tensor logps, {GRADIENTS})"
)


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: float | Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> LinearKTOLoss:
    """`kto_loss` of the summed `linear_token_logprobs` of each answer, averaged: KTO from hidden states.

    An answer's tokens share a chunk, so that its coefficient is known while its logits are there. Only an answer too
    long for the memory budget has its logits computed twice.

    Args:
        hidden: [B, T, H]; token_ids: [B, T], -100 where nothing counts (prompt, padding).
        ref_logps, labels, kl, beta, loss_type, desirable_weight, undesirable_weight: as in `kto_loss`.
        normalizer: replaces the number of answers B.
        weight, bias, temperature, softcap, memory_budget: as in `linear_token_logprobs`; gradients flow to hidden,
            weight and bias.

    Returns:
        LinearKTOLoss(loss, losses, rewards, logps): loss is sum(losses) / B; the others [B] and detached.

    Raises:
        ValueError: as `linear_token_logprobs` and `kto_loss`.
    """
    check_dims("token_ids", token_ids, "BT")
    budget = check_head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    check_normalizer(normalizer, hidden)
    options: dict[str, Any] = dict(
        loss_type=loss_type, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    like = hidden.new_empty(len(token_ids), dtype=compute_dtype(hidden, weight, bias))
    kl = check_kto_arguments(like, ref_logps, labels, kl, beta=beta, **options)
    if not has_kernel("linear_kto_loss", hidden):
        out = reference.linear_token_logprobs(
            hidden, weight, token_ids, bias=bias, temperature=temperature, softcap=softcap
        )
        logps = out.logprobs.sum(1)
        losses, rewards = reference.kto_loss(logps, ref_logps, labels, kl, beta=beta, **options)
        loss = reference.mean_over(losses, max(len(losses), 1) if normalizer is None else normalizer)
        return LinearKTOLoss(loss, losses.detach(), rewards, logps.detach())
    outputs = torch.ops.rlhf_fast.linear_kto_loss(
        hidden, weight, bias, token_ids.long(), ref_logps, labels, as_tensor(kl), as_tensor(normalizer), beta,
        *options.values(), temperature, softcap or 0.0, budget, *wants_gradients(hidden, weight, bias),
    )  # fmt: skip
    return LinearKTOLoss(*outputs[:4])


@kernel("linear_kto_loss", "cpu", "triton", "cuda")
@full_precision
def _kto(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    normalizer: Tensor | None,
    beta: float,
    loss_type: str,
    desirable_weight: float,
    undesirable_weight: float,
    *options: Any,
) -> tuple[Tensor, ...]:
    head = head_of(hidden, weight, bias, token_ids, options)
    (B, T), ref = token_ids.shape, ref_logps.to(head.dtype)
    whole = max(B, 1) if normalizer is None else float(normalizer)

    def losses_of(logps: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        settings = beta, loss_type, desirable_weight, undesirable_weight
        return torch.ops.rlhf_fast.kto_loss(logps, ref, labels, kl, *settings, with_grad)

    def coefficients(tokens: Tensor, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        answer = tokens // T
        logps = logprobs.new_zeros(B).index_add(0, answer, logprobs)  # complete of the answers in this pack
        return losses_of(logps, True)[2][answer] / whole, None

    logprobs, _ = loss_in_forward(head, pack_rows(head.rows, B, T, head.chunk_rows), coefficients)
    logps = logprobs.view(B, T).sum(1)
    losses, rewards, _ = losses_of(logps, False)
    return losses.sum() / whole, losses, rewards, logps, *head.gradients()


@torch.library.register_fake("rlhf_fast::linear_kto_loss", lib=LIBRARY)
def _outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype, B = compute_dtype(hidden, weight, bias), token_ids.shape[0]
    per_answer = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (B,), (B,), (B,)))
    return *per_answer, *empty_gradients(hidden, weight, bias, args[-3:], True)


register_consumed_gradients("linear_kto_loss", "hidden", "weight", "bias")
