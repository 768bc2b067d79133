"""A case of the bench: an operation beside its rivals, written as users write them, on the same tensors.

The functions of a case take the same tensors and return the same results in the same order, so that the eager rival
in float64 is the truth ours is checked against. Where gradients are taken, the first result is the scalar loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
OURS, EAGER, COMPILED, UPCAST = "rlhf_fast", "eager", "torch.compile", "eager, upcast"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row group of the results.

    differentiable: positions of the inputs whose gradient is taken; none means forward only, under no_grad.
    traffic: for a case bound by memory, what has to be moved at least once, in units of the first input. It is moved
    by plain torch in the same rounds, as the ceiling.
    products: for a case bound by matmuls, how many of the three of a linear layer it needs: input by weight, and the
    gradients of both; a fourth is a reference's input by weight. The first two inputs are hidden [N, H] and weight
    [V, H]; the bare matmuls are the ceiling.
    overwrites: ours leaves something else in its first input, which is restored, untimed, before each run.
    others: further rivals by name, which return the first result alone.
    """

    name: str
    shape: str
    make_inputs: Callable[[], tuple[Tensor, ...]]
    ours: Function
    eager: Function
    upcast: Function | None = None
    compiled: bool = False
    differentiable: tuple[int, ...] = ()
    traffic: Literal["read", "read, copy", "read, overwrite"] | None = None
    products: int = 0
    overwrites: bool = False
    others: dict[str, Function] = field(default_factory=dict)

    def functions(self) -> dict[str, Function]:
        """Who takes part, ours first."""
        functions = {OURS: self.ours, EAGER: self.eager}
        if self.upcast:
            functions[UPCAST] = self.upcast
        if self.compiled:
            functions[COMPILED] = torch.compile(self.eager, dynamic=False)
        return functions | self.others
