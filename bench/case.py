"""A case of the bench: an operation beside its rivals, written as users write them, on the same tensors.

The functions of a case take the same tensors and return the same results in the same order. Our results are therefore
checked against the eager rival in float64. Where gradients are taken, the first result is the scalar loss.
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
    traffic: for a case bound by memory, the memory traffic of its first input that cannot be avoided. As the ceiling,
    plain torch makes the same traffic in the same rounds.
    products: for a case bound by matmuls, how many it needs of the three matmuls of a linear layer: input by weight,
    and the gradients of both; a fourth is a reference's input by weight. The first two inputs are hidden [N, H] and
    weight [V, H]; the bare matmuls are the ceiling.
    overwrites: our function overwrites its first input, which is restored, untimed, before each run.
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
        """Contender -> function, ours first."""
        functions = {OURS: self.ours, EAGER: self.eager}
        if self.upcast:
            functions[UPCAST] = self.upcast
        if self.compiled:
            functions[COMPILED] = torch.compile(self.eager, dynamic=False)
        return functions | self.others
