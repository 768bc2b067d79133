"""Bytes of global memory that each operator's kernels ask for, beside those that no kernel can avoid.

The kernels run on the CPU, Triton's in its interpreter and CUDA's emulated, and every access is counted (see
tests/emulation/counted.py).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bench.launches import Launch, on_pairs, on_rows, on_tokens
from rlhf_fast.ops import dispatch
from tests.emulation.counted import counted_cuda, counted_triton

COUNTED = {"Triton": ("triton", counted_triton), "CUDA C++": ("cuda", counted_cuda)}


class Sizes(NamedTuple):
    """Of the operators on logits, on tokens and on pairs."""

    rows: tuple[int, int]
    tokens: tuple[int, int]
    pairs: int


SIZES = Sizes((2, 151_936), (4, 1024), 16)


def measure(sizes: Sizes = SIZES) -> list[dict[str, Any]]:
    """A row for each operator, dtype of logits and back end."""
    return [_row(name, launch, *count) for name, (_, context) in COUNTED.items() for launch, *count in
            _counted(name, context, sizes)]  # fmt: skip


def _counted(name: str, context: Any, sizes: Sizes) -> Iterator[tuple[Launch, int, int, int, int]]:
    """(launch, bytes of loads and of stores, and those that cannot be avoided)."""
    with context():  # which registers the kernels of the back end
        kernels = dispatch.KERNELS[COUNTED[name][0]]
        torch.manual_seed(0)
        rows = [launch for dtype in (torch.bfloat16, torch.float32) for launch in on_rows(kernels, *sizes.rows, dtype)]
        launches = [*rows, *on_tokens(*sizes.tokens), *on_pairs(sizes.pairs)]
    for launch in launches:
        with context() as found:
            results = launch.run(kernels)
        yield launch, found.loads, found.stores, *launch.ideal_bytes(results)


def _row(name: str, launch: Launch, loads: int, stores: int, least_loads: int, least_stores: int) -> dict[str, Any]:
    elements = launch.args[0].numel() if launch.args[0].dim() > 1 else max(x.numel() for x in _tensors(launch))
    return {
        "operator": launch.operator,
        "by": name,
        "shape": launch.shape,
        "loads": round(loads / elements, 3),
        "stores": round(stores / elements, 3),
        "ideal": round((least_loads + least_stores) / elements, 3),
        "of ideal": round((loads + stores) / (least_loads + least_stores), 3),
    }


def _tensors(launch: Launch) -> list[torch.Tensor]:
    return [x for x in launch.args if isinstance(x, torch.Tensor)]
