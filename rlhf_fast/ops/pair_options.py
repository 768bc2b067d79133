"""The options of the losses on pairs of answers: checks, and what the operators take of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.checks import (
    NUMBERS,
    check_device,
    check_dims,
    check_flag,
    check_floats,
    check_number,
    check_option,
    check_positive,
    check_scalar,
    check_tensor,
    expect,
    is_finite,
    is_readable,
    shown,
)

# Kernels get the index: the order is that of enum DPOType in csrc/pair_terms.h and of kernels/dpo_loss.py.
PAIR_TERMS = (
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "sppo_hard",
    "discopop",
    "bco_pair",
    "sft",
    "cpo",
    "simpo",
    "odds_ratio",
)
"""The kernels know a term by its place here: `DPOType` in csrc/pair_terms.h."""
LOSS_TYPES = (*PAIR_TERMS[:-1], "orpo")
"""What users name. `orpo` is the terms odds_ratio and sft, `cpo` the term cpo and cpo_alpha times sft."""
REFERENCE_FREE = ("sft", "cpo", "simpo", "orpo", "odds_ratio")
"""The losses that have no reference."""
AVERAGES = ("ipo", "sigmoid_norm", "simpo", "odds_ratio")
"""The terms that divide by the answers' lengths; ipo only where it is given them."""
SMOOTHED = ("sigmoid", "robust", "exo_pair", "cpo", "simpo")
"""The terms that have label smoothing."""


class PairOptions(NamedTuple):
    """The options of `dpo_loss`, as the operators take them."""

    terms: tuple[str, ...]  # out of PAIR_TERMS
    weights: tuple[float, ...]
    beta: float
    smoothing: float
    margin: float  # SimPO's gamma


class PairConstants(NamedTuple):
    """What a loss of pairs reads of them besides the log-probs; None where it reads none."""

    ref_chosen: Tensor | None  # [B]
    ref_rejected: Tensor | None  # [B]
    chosen_lengths: Tensor | None  # [B]
    rejected_lengths: Tensor | None  # [B]
    mean_length: Tensor | None  # 0-dim, of the chosen answers of the whole batch

    def to(self, dtype: torch.dtype) -> "PairConstants":
        """The same numbers in a floating point dtype."""
        return PairConstants(*(None if x is None else x.to(dtype) for x in self))

    def of(self, pairs: slice) -> "PairConstants":
        """Those of some of the pairs."""
        of_pairs = [None if x is None else x[pairs] for x in self[:4]]
        return PairConstants(*of_pairs, mean_length=self.mean_length)

    def of_term(self, term: str, like: Tensor) -> tuple[Tensor | None, ...]:
        """The first four, as one term reads them. like: [B]."""
        if term == "sft":
            assert self.mean_length is not None  # `check_dpo_arguments` makes it
            length = self.mean_length.to(like).expand_as(like)
            return None, None, length, length
        references = (None, None) if term in REFERENCE_FREE else self[:2]
        return (*references, *(self[2:4] if term in AVERAGES else (None, None)))


def loss_names(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the losses, checked."""
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, (tuple, list)):
        raise ValueError(f"loss_type: expected a name, or several in a list, got {shown(loss_type)}")
    expect(len(names) > 0, "loss_type", "a name, or several", list(names))
    for name in names:
        check_option("loss_type", name, LOSS_TYPES)
    expect(len(set(names)) == len(names), "loss_type", "each name once", list(names))
    return tuple(names)


def check_dpo_arguments(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    *,
    beta: float,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    label_smoothing: float,
    mean_chosen_length: float | Tensor | None,
    simpo_gamma: float,
    cpo_alpha: float,
    reference_free: bool,
) -> tuple[PairOptions, PairConstants]:
    """Check the arguments of `dpo_loss`; returns them as the operators take them."""
    names = loss_names(loss_type)
    weights = (1.0,) * len(names) if loss_weights is None else loss_weights
    expected = f"a finite number for each of {len(names)} losses"
    if not isinstance(weights, (tuple, list)):
        raise ValueError(f"loss_weights: expected {expected}, got {shown(weights)}")
    weights = tuple(weights)
    expect(len(weights) == len(names), "loss_weights", expected, list(weights))
    for weight in weights:
        check_number("loss_weights", weight, expected, is_finite)
    check_positive("beta", beta)
    check_number("simpo_gamma", simpo_gamma)
    check_number("cpo_alpha", cpo_alpha)
    check_flag("reference_free", reference_free)
    terms = _terms(names, weights, cpo_alpha)
    _check_smoothing(names, label_smoothing)
    if reference_free or all(name in REFERENCE_FREE for name in names):
        ref_chosen_logps = ref_rejected_logps = None
    else:
        expect(ref_chosen_logps is not None, "ref_chosen_logps", "a tensor, as reference_free is False", None)
        expect(ref_rejected_logps is not None, "ref_rejected_logps", "a tensor, as reference_free is False", None)
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    check_floats("chosen_logps", optional=references, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_dims("chosen_logps", chosen_logps, "B")
    averaged = [term for term in terms if term in AVERAGES]
    mean = None
    if "sft" in terms or mean_chosen_length is not None:
        mean = _mean_length(chosen_logps, chosen_lengths, mean_chosen_length)
    if "sft" not in terms:
        mean = None
    if not averaged:
        chosen_lengths = rejected_lengths = None
    _check_lengths(averaged, chosen_logps, chosen_lengths, rejected_lengths)
    options = PairOptions(tuple(terms), tuple(terms.values()), beta, label_smoothing, simpo_gamma)
    return options, PairConstants(ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, mean)


def _terms(names: tuple[str, ...], weights: tuple[float, ...], cpo_alpha: float) -> dict[str, float]:
    """The terms of the kernels, and their weights. The first one decides about the rewards."""
    terms: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        parts = {"orpo": {"odds_ratio": 1.0, "sft": 1.0}, "cpo": {"cpo": 1.0, "sft": cpo_alpha}}.get(name, {name: 1.0})
        for term, factor in parts.items():
            if factor:
                terms[term] = terms.get(term, 0.0) + weight * factor
    return terms


def _check_smoothing(names: tuple[str, ...], e: float) -> None:
    name, smoothed = "label_smoothing", [x for x in names if x in SMOOTHED]
    if "robust" in smoothed:
        check_number(name, e, "a number in [0, 0.5) for robust", lambda e: 0 <= e < 0.5)
    if "exo_pair" in smoothed:
        check_number(name, e, "a number in (0, 1) for exo_pair (the paper recommends 1e-3)", lambda e: 0 < e < 1)
    if smoothed:
        check_number(name, e, "a number in [0, 1]", lambda e: 0 <= e <= 1)
    else:
        check_number(name, e, f"0, as {' and '.join(names)} has none", lambda e: e == 0)


def _mean_length(chosen_logps: Tensor, lengths: Tensor | None, mean: float | Tensor | None) -> Tensor:
    """0-dim, the mean number of tokens of a chosen answer."""
    name = "mean_chosen_length"
    if isinstance(mean, Tensor):
        check_scalar(name, mean, chosen_logps)
        if is_readable(mean):
            expect(is_finite(mean.item()) and mean.item() >= 0, name, "a finite number >= 0 in a tensor", mean.item())
        return mean.double()
    if mean is not None:
        check_positive(name, mean)
        return torch.full((), float(mean), dtype=torch.float64, device="cpu")
    if lengths is None:
        raise ValueError(f"{name}: expected a number, or chosen_lengths, as sft divides by it, got {shown(None)}")
    _check_length("chosen_lengths", chosen_logps, lengths)
    return lengths.double().sum() / max(len(lengths), 1)


def _check_lengths(averaged: list[str], chosen_logps: Tensor, chosen: Tensor | None, rejected: Tensor | None) -> None:
    needing = [term for term in averaged if term != "ipo"]
    for name, lengths in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
        if lengths is None:
            what = "orpo" if needing == ["odds_ratio"] else " and ".join(needing)
            expect(not needing, name, f"a tensor, as {what} divides by it", None)
            continue
        _check_length(name, chosen_logps, lengths)
    missing = "chosen_lengths" if chosen is None else "rejected_lengths"
    expect((chosen is None) == (rejected is None), "chosen_lengths", "both lengths or neither", f"no {missing}")


def _check_length(name: str, chosen_logps: Tensor, lengths: Tensor) -> None:
    check_tensor(name, lengths)
    expect(lengths.dtype in NUMBERS, name, "a tensor of numbers", lengths.dtype)
    shape = list(chosen_logps.shape)
    expect(list(lengths.shape) == shape, name, f"shape {shape} as chosen_logps", list(lengths.shape))
    check_device(name, lengths, "chosen_logps", chosen_logps)
