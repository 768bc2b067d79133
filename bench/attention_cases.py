"""What is measured: attention of rows that stand side by side, beside torch's own on the same rows spread out."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Function
from rlhf_fast.ops import reference
from rlhf_fast.ops.attention import packed_attention


def attention_cases(*shapes: tuple[int, int, int, int]) -> list[Case]:
    """A case per shape (rows, length of the longest, heads, size of a head). The shortest row has half the length."""
    return [_case(*shape) for shape in shapes]


def _case(rows: int, length: int, heads: int, size: int) -> Case:
    lengths = torch.linspace(length // 2, length, rows).long()
    slots_N = torch.cat([row * length + torch.arange(n) for row, n in enumerate(lengths.tolist())])

    def make() -> tuple[Tensor, ...]:
        """Query, key and value as the projections leave them, the places of their tokens, and weights for a loss."""
        parts = (torch.randn(len(slots_N), heads, size).transpose(0, 1) for _ in range(3))
        return *parts, slots_N, torch.randn(len(slots_N), heads, size)

    def loss_of(attention: Callable[..., Tensor]) -> Function:
        def loss(query: Tensor, key: Tensor, value: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            out = attention(query, key, value, slots, rows, length, scale=size**-0.5)
            return (out * weights).mean(), out.detach()

        return loss

    return Case(
        name="packed_attention forward + backward",
        shape=f"{rows} rows to {length}, {heads} x {size}",
        make_inputs=make,
        ours=loss_of(packed_attention),
        eager=loss_of(reference.packed_attention),
        differentiable=(0, 1, 2),
    )
