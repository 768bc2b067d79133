"""How exact: errors of log-probs, entropies and gradients against float64, ours and rivals' on the same inputs.

The truth is the formula in float64 on the very numbers that the implementations got. Half-precision numbers are
widened, and -inf is taken as probability 0. Gradients are by the logits or the hidden states: of a random combination
of the log-probs, and of a random combination of both outputs where an implementation has an entropy.

An error is relative where the truth is above 1, absolute below. Where the target is 25 nats ahead, log-prob, entropy
and gradient are near 1e-11 and an absolute error says nothing: errors there are relative, to the largest entry of its
row for a gradient, and the gradient by the logits is looked at where the target is.

Shapes: N tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import OURS
from bench.measure import TOLERANCE
from bench.rivals import Implementation
from bench.trials import Inputs, Trial, log_sum_others

Cell = float | str
LOGPROB, LOGPROB_GRADIENT, ENTROPY, GRADIENT = "log-prob", "its gradient", "entropy", "gradient of both"
QUANTITIES = LOGPROB, LOGPROB_GRADIENT, ENTROPY, GRADIENT
AT_TARGET = "gradient at the target"
VALUE_TOLERANCE = 1e-5
"""For our log-probs and entropies, whatever the dtype of the input. Gradients have that dtype: see `TOLERANCE`."""
NOT_INSTALLED, NO_SUCH = "not installed", "-"


class Truth(NamedTuple):
    """The right results of a trial with N tokens."""

    logprobs: Tensor  # [N], float64 as all of it
    entropy: Tensor  # [N]
    logprobs_gradient: Tensor  # by the first of the inputs, of the log-probs alone
    gradient: Tensor  # of both outputs


def truth(
    inputs: Inputs, *, bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None
) -> Truth:
    """In float64: d log p_t = 1[j = t] - p_j, d entropy = -p_j (log p_j + entropy), and the chain rule.

    The target's log p and 1 - p come from its odds, because at 25 nats a subtraction leaves float64 5 digits of them.
    """
    first, *weight = (x.double() for x in inputs.tensors)
    logits = F.linear(first, weight[0], None if bias is None else bias.double()) if weight else first
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    slope = (1 - torch.tanh(logits / softcap) ** 2 if softcap else torch.ones_like(logits)) / temperature
    z, target = capped / temperature, inputs.ids[:, None]
    log_p_target = F.logsigmoid(z.gather(1, target) - log_sum_others(z, inputs.ids)[:, None])
    log_p = (z - z.logsumexp(1, keepdim=True)).scatter(1, target, log_p_target)
    p, log_p = log_p.exp(), torch.where(log_p == -math.inf, 0.0, log_p)
    entropy = -(p * log_p).sum(1, keepdim=True)
    by_logprobs, by_entropy = inputs.by_logprobs.double()[:, None], inputs.by_entropy.double()[:, None]
    of_logprobs = by_logprobs * (-p).scatter(1, target, -torch.expm1(log_p_target)) * slope
    of_both = of_logprobs - by_entropy * p * (log_p + entropy) * slope
    gradients = (x @ weight[0] if weight else x for x in (of_logprobs, of_both))
    return Truth(log_p_target[:, 0], entropy[:, 0], *gradients)


def largest_error(actual: Tensor, expected: Tensor, relative: bool) -> float:
    """The largest error, as the module defines it; NaN if any is NaN. relative: to the largest entry of the row."""
    size = expected.abs()
    scale = (size.amax(-1, keepdim=True) if size.dim() > 1 else size) if relative else size.clamp(min=1.0)
    return ((actual.double() - expected).abs() / scale).max().item()


def errors(trial: Trial, implementation: Implementation, device: str = "cpu") -> dict[str, Cell]:
    """By quantity: the error, "NaN" or "inf", "-" where there is no such result, or the class of the exception."""
    if not implementation.installed():
        return dict.fromkeys(QUANTITIES, NOT_INSTALLED)
    inputs, options = trial.make_inputs()
    if not set(options) <= implementation.takes:
        return dict.fromkeys(QUANTITIES, NO_SUCH)
    try:
        with implementation.within():
            results = _run(implementation, inputs, options, device)
    except Exception as problem:  # a rival's crash is a result; ours makes the command fail
        return dict.fromkeys(QUANTITIES, type(problem).__name__)
    true = truth(inputs, **options)
    expected = dict(zip(QUANTITIES, (true.logprobs, true.logprobs_gradient, true.entropy, true.gradient), strict=True))
    cells: dict[str, Cell] = {}
    for quantity, result in results.items():
        right = expected[quantity]
        if trial.relative and right.shape == inputs.tensors[0].shape and len(inputs.tensors) == 1:
            result, right = (x.gather(1, inputs.ids[:, None]) for x in (result, right))
            if quantity == LOGPROB_GRADIENT:
                cells[AT_TARGET] = "non-zero" if (result != 0).all() else "0"
        cells[quantity] = _cell(largest_error(result, right, trial.relative))
    return {quantity: cells.pop(quantity, NO_SUCH) for quantity in QUANTITIES} | cells


def _run(implementation: Implementation, inputs: Inputs, options: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Results by quantity, without the two quantities of the entropy where the implementation has none."""
    function = implementation.load()
    # Copies, because some implementations write into their inputs. The weight is trained too, as without LoRA.
    tensors = [x.clone().to(device).requires_grad_() for x in inputs.tensors]
    ids, by_logprobs, by_entropy = (x.clone().to(device) for x in inputs[1:])
    options = {key: x.clone().to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
    logprobs, entropy = function(*tensors, ids, **options)
    of_logprobs = (by_logprobs * logprobs).sum()
    results = {
        LOGPROB: logprobs,
        LOGPROB_GRADIENT: torch.autograd.grad(of_logprobs, tensors, retain_graph=entropy is not None)[0],
    }
    if entropy is not None:
        of_both = of_logprobs + (by_entropy * entropy).sum()
        results |= {ENTROPY: entropy, GRADIENT: torch.autograd.grad(of_both, tensors)[0]}
    return {quantity: result.detach().cpu() for quantity, result in results.items()}


def _cell(error: float) -> Cell:
    return error if math.isfinite(error) else "NaN" if math.isnan(error) else "inf"


def measure(trials: Sequence[Trial], implementations: Sequence[Implementation], device: str = "cpu") -> list[dict]:
    """One entry per trial, ready for JSON."""
    return [
        {
            "case": trial.name,
            "shape": trial.shape,
            "dtype": str(trial.make_inputs()[0].tensors[0].dtype).removeprefix("torch."),
            "errors": {each.name: errors(trial, each, device) for each in implementations},
        }
        for trial in trials
    ]


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Every result of ours, on any back end, that is not finite, raised, or is beyond the tolerance."""
    missed = []
    for result in results:
        for name, errors in result["errors"].items():
            if name.startswith(OURS) and errors[LOGPROB] != NOT_INSTALLED:
                missed += [f"{name}: {result['case']}: {miss}" for miss in _misses(errors, result["dtype"])]
    return missed


def _misses(errors: dict[str, Cell], dtype: str) -> Iterator[str]:
    for quantity, error in errors.items():
        if quantity == AT_TARGET:
            if error != "non-zero":
                yield f"the gradient at the target is {error}"
            continue
        bound = TOLERANCE[getattr(torch, dtype)] if "gradient" in quantity else VALUE_TOLERANCE
        if not (isinstance(error, float) and error <= bound):
            yield f"{quantity} is off by {error}, more than {bound:.2g}"
