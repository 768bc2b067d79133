"""Measures a case: its errors against float64 first, then time beside its rivals and its ceiling, then memory.

A case whose results disagree with float64 is not timed: it raises. The contenders and the ceiling take turns in every
round, and every other round in reverse order, so that whatever else the machine does hits all of them alike.

Left out: pinning of threads and clocks. Run on an idle machine; the 20 and 80 % quantiles show whether it was.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.backends import cuda_stands_beside, in_cuda
from bench.case import OURS, Case, Function
from bench.device import CPU, CUDA, Contender

CEILING = "ceiling"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OURS_IN_CUDA = f"{OURS}, CUDA C++"  # beside the back end that the dispatch table chooses


class Disagreement(Exception):
    """A kernel whose results are not those of the formula in float64."""


def bind(function: Function, inputs: tuple[Tensor, ...], differentiable: tuple[int, ...]) -> Callable:
    """One call of the function: its results, then the gradients of the first of them."""
    inputs = tuple(x.detach().requires_grad_(i in differentiable) for i, x in enumerate(inputs))
    leaves = [inputs[i] for i in differentiable]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(function(*inputs))

    def forward_backward() -> tuple[Tensor, ...]:
        results = function(*inputs)
        return *results, *torch.autograd.grad(results[0], leaves)

    return forward_backward if leaves else forward


def contenders(case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Contender]:
    """Ours and the rivals on these tensors. If ours overwrites its input, it gets a copy."""
    own = (inputs[0].clone(), *inputs[1:]) if case.overwrites else inputs

    def restore() -> None:
        own[0].copy_(inputs[0])

    ours = Contender(bind(case.ours, own, case.differentiable), restore if case.overwrites else None)
    rivals = {name: Contender(bind(f, inputs, case.differentiable)) for name, f in case.functions().items()}
    if cuda_stands_beside(inputs[0]):
        rivals[OURS_IN_CUDA] = Contender(in_cuda_kernels(ours.run), ours.restore)
    return rivals | {OURS: ours}


def in_cuda_kernels(run: Callable[[], object]) -> Callable[[], object]:
    """The call, on the CUDA C++ kernels."""

    def call() -> object:
        with in_cuda():
            return run()

    return call


def errors(case: Case, inputs: tuple[Tensor, ...], competitors: dict[str, Contender]) -> dict[str, float]:
    """Largest error of each contender's results and gradients against the eager rival in float64.

    The error is relative, for entries smaller than 1 to 1 or the largest entry. A bf16 matrix out of matmuls has the
    error of its norm, because each of its entries is a sum of rounded terms. Raises Disagreement where ours is not
    within the tolerance of the result's dtype.
    """
    doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    truth = bind(case.eager, doubles, case.differentiable)()
    worst = {}
    for name, contender in competitors.items():
        if contender.restore:
            contender.restore()
        results = contender.run()
        expected = truth
        if name in case.others:  # the loss and its gradients alone
            expected = truth[:1] + truth[len(truth) - len(case.differentiable) :]
        of_norm = [case.products > 0 and x.dtype == torch.bfloat16 for x in results]
        error = [_error(*each) for each in zip(results, expected, of_norm, strict=True)]
        worst[name] = max(error)
        if name == OURS:
            for i, (x, e) in enumerate(zip(results, error, strict=True)):
                if not e <= TOLERANCE[x.dtype]:
                    raise Disagreement(f"{case.name}: result {i} is off by {e:.2g}, more than {TOLERANCE[x.dtype]:.2g}")
    return worst


def _error(actual: Tensor, truth: Tensor, of_norm: bool) -> float:
    if of_norm:
        return ((actual.double() - truth).norm() / truth.norm()).item()
    size = truth.abs()
    scale = size.clamp(min=min(1.0, size.max().item()))
    return ((actual.double() - truth).abs() / scale).max().item()


def ceiling(case: Case, inputs: tuple[Tensor, ...]) -> Contender | None:
    """The work that the case cannot avoid, its traffic or its matmuls, done by plain torch."""
    if case.products:
        return Contender(lambda: bare_products(*inputs[:2], case.products))
    return Contender(bare_traffic(case, inputs[0])) if case.traffic else None


@torch.no_grad()
def bare_products(hidden: Tensor, weight: Tensor, number: int) -> None:
    """So many matmuls of a linear layer and its backward pass; the results are dropped."""
    logits = hidden @ weight.t()
    logits @ weight
    if number > 2:
        logits.t() @ hidden
    if number > 3:
        hidden @ weight.t()


def bare_traffic(case: Case, x: Tensor) -> Callable[[], None]:
    """Moves float32 words of memory that is already mapped.

    On a GPU a read is a copy of as many bytes, because its `sum` does not reach the memory's speed.
    """
    words = x.flatten().view(torch.float32)
    other = torch.empty_like(words) if case.traffic != "read" or x.is_cuda else words
    half = len(words) // 2
    second = {"read": None, "read, copy": lambda: other.copy_(words), "read, overwrite": lambda: other.neg_()}
    if case.traffic == "read, overwrite":
        other.copy_(words)
    after = second[case.traffic]

    def run() -> None:
        other[:half].copy_(words[:half]) if x.is_cuda else words.sum()
        if after:
            after()

    return run


def traffic_bytes(case: Case, x: Tensor) -> int:
    """Bytes moved at least once: a copy and an overwrite are a read and a write."""
    return x.nbytes * (1 if case.traffic == "read" else 3)


def take_turns(
    competitors: dict[str, Contender], rounds: int, seconds: float, device: CPU | CUDA
) -> dict[str, list[float]]:
    """Samples of seconds per call, one of each contender per round; at least `rounds` rounds and `seconds` of them."""
    calls = {}
    for name, contender in competitors.items():
        device.timed(contender)
        calls[name] = 1 if contender.restore else max(1, round(device.sample_seconds / device.timed(contender)))
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    order = list(competitors)
    end = time.perf_counter() + seconds
    while len(samples[order[0]]) < rounds or time.perf_counter() < end:
        for name in order:
            samples[name].append(device.timed(competitors[name], calls[name]))
        order.reverse()
    return samples


def quantiles(samples: list[float]) -> dict[str, float]:
    """{"median", "p20", "p80"} of the samples."""
    low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return {"median": median.item(), "p20": low.item(), "p80": high.item()}


def measure(case: Case, rounds: int, seconds: float, device: CPU | CUDA) -> dict[str, Any]:
    """Everything about one case, ready for JSON: seconds, bytes, errors by contender."""
    torch.manual_seed(0)
    with torch.device(device.name):
        inputs = case.make_inputs()
    competitors = contenders(case, inputs)
    error = errors(case, inputs, competitors)
    most = ceiling(case, inputs)
    turns = competitors | ({CEILING: most} if most else {})
    samples = take_turns(turns, rounds, seconds, device)
    return {
        "name": case.name,
        "shape": case.shape,
        "rounds": len(samples[OURS]),
        "seconds": {name: quantiles(values) for name, values in samples.items()},
        "traffic": case.traffic,
        "traffic_bytes": traffic_bytes(case, inputs[0]) if case.traffic else None,
        "products": case.products,
        "flops": 2 * case.products * inputs[0].numel() * len(inputs[1]) if case.products else None,
        "input_bytes": inputs[0].nbytes,
        "temporary_bytes": {name: device.temporary_bytes(contender) for name, contender in competitors.items()},
        "error": error,
    }
