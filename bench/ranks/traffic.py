"""Counts the collectives of this process and their bytes, by phase, while it is entered.

Every collective of torch passes torch's dispatcher as an operator of `c10d` or `_c10d_functional`: those of
`torch.distributed`, of FSDP2 and of DTensor. The bytes of a collective are those of the whole tensor: what an
all-gather makes, what a reduce-scatter takes, what an all-reduce adds up.

    with Traffic() as traffic:
        with traffic.phase("rollout"):
            ...
        with traffic.numbers():
            ...
    traffic.take()  # {"rollout": {"all-gather": {"count": 3, "bytes": 1024}}}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {  # words in an operator's name -> what the tables call it; the first that fits
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast": "broadcast",
    "barrier": "barrier",
}
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NO_TRAFFIC = ("wait_tensor", "wait_work", "_wrap_tensor")
NUMBERS = "numbers"  # what the tables call an exchange of a handful of numbers
OUTSIDE = "outside of phases"

Counts = dict[str, dict[str, dict[str, int]]]


class Traffic(TorchDispatchMode):
    """Adds up collectives by phase and kind until `take`."""

    def __init__(self) -> None:
        super().__init__()
        self._phase, self._numbers, self._counts = OUTSIDE, False, Counts()

    @contextmanager
    def numbers(self) -> Iterator[None]:
        """Inside, collectives exchange numbers, not weights or gradients."""
        before, self._numbers = self._numbers, True
        try:
            yield
        finally:
            self._numbers = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, collectives belong to this phase; phases nest, and the inner one counts."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def take(self) -> Counts:
        """phase -> kind -> {"count", "bytes"} since the last call."""
        taken, self._counts = self._counts, {}
        return taken

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then makes collectives of it, which come here
        namespace, _, name = function._schema.name.partition("::")
        if namespace in _NAMESPACES and not name.startswith(_NO_TRAFFIC):
            self._note(name, args)
        return function(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        kind = next((kind for word, kind in KINDS.items() if word in name), name)
        sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        size = max(sizes, default=0)
        if name == "allgather_":  # a list of outputs, and an input as large as each of them
            size = sum(sizes) - size
        if self._numbers:
            kind = NUMBERS
        counted = self._counts.setdefault(self._phase, {}).setdefault(kind, {"count": 0, "bytes": 0})
        counted["count"] += 1
        counted["bytes"] += size
