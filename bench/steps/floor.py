"""The matmul floor of a step: its matmuls, each timed alone, times how often it runs. And the memory's speed.

A matmul alone runs on as many threads as the step, into memory that is there already. It takes turns over several
copies of its operands, because a step's matmuls find their weights in memory and not in a cache.
"""

import time
from typing import Any

import torch
from torch import Tensor

from bench.measure import quantiles
from bench.steps.products import Counts, Product

APART = 64 << 20  # bytes of operands between two uses of one copy: more than a core's own cache
BYTES_PER_WEIGHT = 28  # AdamW in fp32 reads weight, gradient and two moments, and writes all but the gradient


def floor(counts: Counts, seconds: float) -> dict[str, Any]:
    """{"seconds", "cpu_seconds", "groups": group -> seconds, "products": one row each}.

    seconds: at least so long for each matmul.
    """
    rows, groups, cpu_seconds = [], dict.fromkeys(counts, 0.0), 0.0
    for group, found in counts.items():
        for product, times in found.items():
            alone, cpu_alone = time_alone(product, times, seconds)
            groups[group] += times * alone
            cpu_seconds += times * cpu_alone
            rows.append({"group": group, **product._asdict(), "times": times, "seconds": alone})
    rows.sort(key=lambda row: -row["times"] * row["seconds"])
    return {"seconds": sum(groups.values()), "cpu_seconds": cpu_seconds, "groups": groups, "products": rows}


@torch.no_grad()
def time_alone(product: Product, times: float, seconds: float) -> tuple[float, float]:
    """Seconds and CPU seconds of one such matmul, the medians of several turns. times: how often the step runs it."""
    operands = _operands(product)
    size = sum(x.nbytes for x in operands)
    copies = [operands] + [_operands(product) for _ in range(min(int(times), -(-APART // size)) - 1)]
    multiply = torch.bmm if product.batch > 1 else torch.mm

    def turn() -> tuple[float, float]:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for a, b, out in copies:
            multiply(a, b, out=out)
        return (time.perf_counter() - begin) / len(copies), (time.process_time() - cpu_begin) / len(copies)

    turn()
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(turn())
    wall, cpu = (quantiles([*clock])["median"] for clock in zip(*samples, strict=True))
    return wall, cpu


def _operands(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    dtype, batch = getattr(torch, product.dtype), [product.batch] if product.batch > 1 else []

    def operand(rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        x = torch.empty(*batch, *shape, dtype=dtype).fill_(0.01)
        return x.transpose(-1, -2) if transposed else x

    a = operand(product.m, product.k, product.left)
    b = operand(product.k, product.n, product.right)
    return a, b, operand(product.m, product.n, False)


@torch.no_grad()
def triad(numbers: int, rounds: int) -> float:
    """Bytes per second of c = a + 2 b over arrays of so many fp32 numbers; the median of the rounds."""
    a, b, c = (torch.full((numbers,), float(i)) for i in range(3))
    samples = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        torch.add(a, b, alpha=2.0, out=c)
        samples.append(12 * numbers / (time.perf_counter() - begin))
    return quantiles(samples[1:])["median"]
