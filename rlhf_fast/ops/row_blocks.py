"""How a kernel walks over rows of logits: blocks that one row stride describes, each with its rows' other numbers.

Logits cut like `logits[:, :-1]` are read in place: they are one block per sequence. Any other contiguous or evenly
strided logits are a single block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_fast.ops.dispatch import contiguous, kernel


def row_blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """[..., V] each, as 2-D views with one row stride each: a single one unless one is cut like ``x[:, :-1]``."""
    try:
        return [tuple(x.view(-1, x.shape[-1]) for x in tensors)]
    except RuntimeError:
        return [block for parts in zip(*tensors, strict=True) for block in row_blocks(*parts)]


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied unless the numbers of each row lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


Rows = TypeVar("Rows", bound=Tensor | None)


def over_rows(
    logits: Sequence[Tensor], per_row: Sequence[Rows]
) -> Iterator[tuple[int, tuple[Tensor, ...], tuple[Rows, ...]]]:
    """Of each block that has rows: (its first row, the logits [n, V], their rows' part of each tensor in `per_row`).

    per_row: contiguous, with one or several numbers for each row of the logits.
    """
    blocks = row_blocks(*logits)
    if len(blocks) == 1:
        if len(blocks[0][0]):
            yield 0, blocks[0], tuple(per_row)
        return
    rows = sum(len(block[0]) for block in blocks)
    flat = [None if x is None else x.view(rows, -1) for x in per_row]
    row = 0
    for block in blocks:
        if n := len(block[0]):
            yield row, block, tuple(None if x is None else x[row : row + n] for x in flat)  # pyright: ignore
        row += n


def gradient_kernels(name: str, backend: str, references: int = 0) -> Callable[[Callable], Callable]:
    """Decorator of a launch on one block: makes the operator `name`, into a new tensor, and `name_`, over the logits.

    The launch gets (gradient [n, V], logits [n, V], `references` more logits [n, V], temperature, softcap, the tensors
    per row). The operators take (logits, `references` more, the tensors per row, temperature, softcap).
    """

    def register(launch: Callable) -> Callable:
        def walk(grad: Tensor | None, logits: Tensor, *args: Any) -> None:
            others = map(rows_contiguous, args[:references])
            per_row, options = contiguous(*args[references:-2]), args[-2:]
            for row, (z, *z_others), parts in over_rows((logits, *others), per_row):
                out = z if grad is None else grad.view(-1, grad.shape[-1])[row : row + len(z)]
                launch(out, z, *z_others, *options, *parts)

        @kernel(name, backend)
        def new_tensor(logits: Tensor, *args: Any) -> Tensor:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            walk(grad, rows_contiguous(logits), *args)
            return grad

        @kernel(f"{name}_", backend)
        def over_the_logits(logits: Tensor, *args: Any) -> None:
            walk(None, logits, *args)
            torch.autograd.graph.increment_version(logits)

        return launch

    return register
