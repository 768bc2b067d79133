"""DPO and its relatives on pairs of answers, with a reference or without, alone or several at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.dispatch import (
    LIBRARY,
    _cpu,
    call,
    code,
    common_dtype,
    contiguous,
    define,
    has_kernel,
    kernel,
    pointer,
    threads,
)
from rlhf_fast.ops.gradients import register_saved_gradients
from rlhf_fast.ops.pair_options import PAIR_TERMS, PairConstants, PairOptions, check_dpo_arguments
from rlhf_fast.ops.preference import any_grad
from rlhf_fast.ops.results import DPOLoss

define(
    "dpo_loss(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_lengths, "
    "Tensor? rejected_lengths, float beta, str loss_type, float label_smoothing, float margin, bool with_grad) "
    "-> (Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, Tensor grad_chosen, Tensor grad_rejected)"
)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    mean_chosen_length: float | Tensor | None = None,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    reference_free: bool = False,
) -> DPOLoss:
    """Direct preference optimisation and relatives, per pair, from the summed log-probabilities of the answers.

    With w = chosen_logps, l = rejected_logps, log-ratios c = w - ref_chosen_logps, r likewise for the rejected answer,
    h = beta (c - r), S = log sigmoid, and e = label_smoothing:

        sigmoid       -(1 - e) S(h) - e S(-h) (e > 0: conservative DPO)                 arXiv 2305.18290 eq. 7
        robust        (-(1 - e) S(h) + e S(-h)) / (1 - 2e)                              arXiv 2403.00409 eq. 12
        hinge         max(0, 1 - h)                                                     SLiC, arXiv 2305.10425 eq. 3
        ipo           (c - r - 1/(2 beta))^2                                            arXiv 2310.12036 eq. 17
        exo_pair      q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigmoid(h)   arXiv 2402.00856 eq. 16
        nca_pair      -S(beta c) - S(-beta c)/2 - S(-beta r)/2                          arXiv 2402.05369
        bco_pair      -S(beta c) - S(-beta r)                                           arXiv 2404.04656
        apo_zero      1 - sigmoid(beta c) + sigmoid(beta r)                             arXiv 2408.06266 eq. 7
        apo_down      sigmoid(beta c) + 1 - sigmoid(h)                                  arXiv 2408.06266 eq. 8
        sigmoid_norm  -S(h) with c, r divided by the answers' lengths                   LN-DPO, arXiv 2411.15124
        sppo_hard     (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2                           arXiv 2405.00675 eq. 4.7
        discopop      -(1 - m) S(h) + m e^-h, m = sigmoid(h / 0.05)                     arXiv 2406.08414 eq. 5
        sft           -w / mean_chosen_length; its mean is the mean over the batch's chosen tokens

    and without a reference, where W and L are w and l divided by the answers' lengths:

        cpo           -(1 - e) S(H) - e S(-H) + cpo_alpha sft, H = beta (w - l)         arXiv 2401.08417 eq. 3 to 5
        simpo         -(1 - e) S(H) - e S(-H), H = beta (W - L) - simpo_gamma           arXiv 2405.14734 eq. 6
        orpo          sft - beta S(log odds(W) - log odds(L)), odds(x) = e^x / (1 - e^x)   arXiv 2403.07691 eq. 6, 7

    named and defined as in TRL. Several names are a mixture: the sum of their losses times loss_weights. For example,
    MPO (arXiv 2411.10442) is ["sigmoid", "bco_pair", "sft"] with weights 0.8, 0.2, 1. Published codes differ on ipo:
    token sums as in the paper's formula, or (with lengths given) averages per token as its authors ran it. TRL's ORPO
    takes sft over the prompt too; its paper and this do not. TRL's aot sorts a batch's log-ratios and is no loss of a
    pair.

    Args:
        chosen_logps, rejected_logps: [B], float32, bfloat16, float16 or float64; gradients flow to these only.
        ref_chosen_logps, ref_rejected_logps: as these; None if no loss has a reference, or reference_free.
        beta: > 0.
        loss_weights: a finite number for each name; default: 1 for each.
        label_smoothing: e, the probability that a label is wrong: [0, 1] for sigmoid, cpo and simpo, [0, 0.5) for
            robust, (0, 1) for exo_pair; a mixture gives it to those that have it.
        chosen_lengths, rejected_lengths: [B] token counts; required by sigmoid_norm, simpo and orpo, optional for ipo.
        mean_chosen_length: for sft, cpo and orpo, tokens of a chosen answer, on average over the whole batch, so that
            micro-batches and ranks add up; default: the mean of chosen_lengths.
        reference_free: drop the reference of every loss.

    Returns:
        DPOLoss(losses, chosen_rewards, rejected_rewards): [B], float32 (float64 if an input is); rewards are detached:
        beta c and beta r before any division by length, beta w and beta l of sft and cpo, beta W and beta L of simpo
        and orpo; of a mixture those of its first loss.

    Raises:
        ValueError: unknown loss_type, or a name twice; label_smoothing out of range or not used; lengths missing;
            beta <= 0; shapes, dtypes or devices that do not fit.
    """
    options, constants = check_dpo_arguments(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, beta=beta,
        loss_type=loss_type, loss_weights=loss_weights, label_smoothing=label_smoothing,
        mean_chosen_length=mean_chosen_length, simpo_gamma=simpo_gamma, cpo_alpha=cpo_alpha,
        reference_free=reference_free,
    )  # fmt: skip
    if not has_kernel("dpo_loss", chosen_logps):
        return reference.dpo_loss(chosen_logps, rejected_logps, constants, options)
    chosen, rejected, *references = common_dtype(chosen_logps, rejected_logps, *constants[:2])
    constants = constants._replace(ref_chosen=references[0], ref_rejected=references[1]).to(chosen.dtype)
    with_grad = any_grad(chosen, rejected)
    outputs = mixture(lambda *arguments: call("dpo_loss", *arguments), chosen, rejected, constants, options, with_grad)
    return DPOLoss(*outputs[:3])


def mixture(
    run: Callable[..., tuple[Tensor, ...]],
    chosen: Tensor,
    rejected: Tensor,
    constants: PairConstants,
    options: PairOptions,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """The outputs of the operator `dpo_loss` for the weighted sum of the terms; the rewards are those of the first.

    A pass over a few numbers for each term costs nothing beside the model. run: calls the operator.
    """
    outputs: list[Tensor] = []
    for term, weight in zip(options.terms, options.weights, strict=True):
        arguments = (*constants.of_term(term, chosen), options.beta, term, options.smoothing, options.margin, with_grad)
        losses, *rewards, by_chosen, by_rejected = run(chosen, rejected, *arguments)
        summed = losses, by_chosen, by_rejected
        if weight != 1:
            summed = tuple(weight * x for x in summed)
        if outputs:
            rewards, summed = outputs[1:3], [outputs[i] + x for i, x in zip((0, 3, 4), summed, strict=True)]
        outputs = [summed[0], *rewards, *summed[1:]]
    return tuple(outputs)


@kernel("dpo_loss", "cpu")
def _dpo_cpu(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    margin: float,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    inputs = contiguous(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    outputs = dpo_outputs(chosen, with_grad)
    _cpu.dpo_loss(
        code(chosen), *map(pointer, inputs), chosen.shape[0], beta, PAIR_TERMS.index(loss_type), label_smoothing,
        margin, *map(pointer, outputs), threads(chosen),
    )  # fmt: skip
    return outputs


@torch.library.register_fake("rlhf_fast::dpo_loss", lib=LIBRARY)
def dpo_outputs(chosen: Tensor, *args: Tensor | float | str | None) -> tuple[Tensor, ...]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    per_pair = [chosen.new_empty(chosen.shape) for _ in range(3)]
    return *per_pair, *(chosen.new_empty(chosen.shape if args[-1] else 0) for _ in range(2))


register_saved_gradients("dpo_loss", "chosen", "rejected")
