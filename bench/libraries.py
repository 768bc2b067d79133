"""Other libraries' kernels as further rivals of `python -m bench ops --device cuda`, where they are installed."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.case import Case, Function
from bench.rivals import FROM_HIDDEN, FROM_LOGITS, Implementation


def with_libraries(cases: Sequence[Case]) -> list[Case]:
    """The cases, with a further rival for every installed library that has the operation."""
    return [dataclasses.replace(case, others=case.others | _rivals(case)) for case in cases]


def _rivals(case: Case) -> dict[str, Function]:
    family = FROM_LOGITS if case.name.startswith("token_logprobs") else FROM_HIDDEN
    if not case.name.startswith(("token_logprobs", "linear_token_logprobs", "linear_sft_loss")):
        return {}
    return {i.name: _as_case(case, i) for i in family if i.requires and not i.ours and i.installed()}


def _as_case(case: Case, implementation: Implementation) -> Function:
    """The case's first result from the implementation's log-probs."""
    logprobs_of = implementation.load()
    tensors = 2 if case.name.startswith("token_logprobs") else 3  # ids included

    def call(*inputs: Tensor) -> tuple[Tensor]:
        logprobs, _ = logprobs_of(*inputs[:tensors])
        if case.name.startswith("linear_sft_loss"):
            return (-logprobs.mean(),)
        return ((logprobs * inputs[tensors]).mean() if len(inputs) > tensors else logprobs.to(torch.float32),)

    return call
