"""The exactness table, and the operations and fused heads beside their rivals and their ceilings.

These are the tables of `python -m bench exactness` and `python -m bench ops --device cuda`, case by case, with fewer
rounds. The heads stand for themselves, because their float64 truth takes most of the GPU's memory.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from bench import exactness, exactness_report
from bench.backends import in_triton
from bench.case import OURS, Case
from bench.cases import FULL, Shapes, cases_at
from bench.device import CPU, CUDA
from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work, compiled
from bench.libraries import with_libraries
from bench.measure import CEILING, Disagreement, measure
from bench.report import GPU_BARS, bar_rows
from bench.rivals import FROM_HIDDEN, FROM_LOGITS
from bench.trials import hidden_trials, logits_trials

TOY = Shapes((4, 601), (3, 40), (6, 16, 211), (), 4)
TOY_TRIALS = ("fp32", "bf16", "softcap 30")
ROUNDS, TOY_ROUNDS = (5, 0.6), (1, 0.0)  # at least so many rounds of a case, and seconds of them
CONTENDERS = 6  # ours twice, eager, torch.compile, two libraries; the ceiling comes on top
PASSES = 12  # of eager code over its logits, forward and backward: assumed, for the time of all contenders


# Exactness


def exactness_work(setting: Setting) -> Iterator[Work]:
    """Compilations of the kernels of all libraries, by dtype and option."""
    yield compiled(kernels=setting.pick(36, 0))
    yield Work(launches=setting.pick(24 * 7 * 60, 1000))


def run_exactness(setting: Setting, found: Found) -> None:
    """A row per case: everyone's larger error of values and gradients."""
    for inputs, family, trials in (("logits", FROM_LOGITS, logits_trials), ("hidden", FROM_HIDDEN, hidden_trials)):
        for trial in trials(*setting.pick((), (3, 601))):
            if setting.dry and trial.name not in TOY_TRIALS:
                continue
            (result,) = exactness.measure([trial], family, setting.device)
            found.details.setdefault(inputs, []).append(result)
            for short in exactness_report.short_rows([result]):
                ours, others = [], []
                for name, cell in short.items():
                    if name != "case" and cell != exactness.NOT_INSTALLED:
                        (ours if name.startswith(OURS) else others).append(f"{name} {cell}")
                found.row(f"errors from {inputs}: {short['case']}", "; ".join(ours), "; ".join(others))
            for miss in exactness.failures([result]):
                found.fail(miss)


# Operations and heads


def cases(setting: Setting, heads: bool) -> list[Case]:
    """The cases on logits, tokens and pairs, or the fused heads."""
    shapes = setting.pick(FULL["cuda"], TOY)
    return [case for case in with_libraries(cases_at(shapes, "cuda")) if bool(case.products) == heads]


def _rounds(setting: Setting) -> int:
    return setting.pick(ROUNDS, TOY_ROUNDS)[0] + 3  # two to warm up and one for the memory


def ops_work(setting: Setting) -> Iterator[Work]:
    """The logits of the three cases pass through everyone's memory; the Python loop of eager GAE is launches."""
    shapes = setting.pick(FULL["cuda"], TOY)
    n, vocabulary = shapes.tokens
    yield compiled(kernels=setting.pick(30, 0), functions=setting.pick(4, 0))
    logits = 2 * n * vocabulary
    yield Work(bytes=3 * _rounds(setting) * CONTENDERS * PASSES * logits / 2)
    yield Work(bytes=3 * 2 * PASSES * 4 * logits)  # once more in float64, and the widened logits
    yield Work(launches=_rounds(setting) * 8 * shapes.sequences[1])
    yield Work(seconds=setting.pick(11 * ROUNDS[1], 0))


def heads_work(setting: Setting) -> Iterator[Work]:
    """Three matmuls a call, four for the KL; the same in float64 for the truth; logits through memory in eager code."""
    n, hidden, vocabulary = setting.pick(FULL["cuda"], TOY).heads
    product, calls = 2.0 * n * hidden * vocabulary, _rounds(setting) * (CONTENDERS + 1)
    yield compiled(kernels=setting.pick(12, 0), functions=setting.pick(4, 0))
    for products in (3, 3, 2, 3, 5):  # the KL's two heads, and three matmuls of the backward pass
        yield Work(bytes=calls * PASSES * 2 * n * vocabulary / 3, flops=calls * products * product)
        yield Work(bytes=3 * PASSES * 8 * n * vocabulary, flops_64=products * product)


def run_ops(setting: Setting, found: Found) -> None:
    """The part `ops`."""
    _measure(setting, found, heads=False)


def run_heads(setting: Setting, found: Found) -> None:
    """The part `heads`."""
    _measure(setting, found, heads=True)


def _measure(setting: Setting, found: Found, heads: bool) -> None:
    device = CPU() if setting.dry else CUDA()
    rounds, seconds = setting.pick(ROUNDS, TOY_ROUNDS)
    results: list[dict[str, Any]] = []
    for case in cases(setting, heads):
        with found.expecting(f"{case.name} {case.shape}"), in_triton():
            result = _with_those_that_run(case, rounds, 0.0 if case.products else seconds, device, found)
            results.append(result)
            found.row(f"{case.name} {case.shape}", *_said(result))
        if not setting.dry:
            torch.cuda.empty_cache()
    found.details["cases"] = results
    for bar in [] if setting.dry else bar_rows(results, GPU_BARS):
        found.row(
            f"bar: {bar['operation']} against {bar['against']}", f"{bar['measured']:.3g}", f"{bar['bar']}: {bar['met']}"
        )


def _with_those_that_run(case: Case, rounds: int, seconds: float, device: CPU | CUDA, found: Found) -> dict[str, Any]:
    """`measure`; where it raises beside other libraries, once more without them."""
    try:
        return measure(case, rounds, seconds, device)
    except Exception as error:
        if not case.others or isinstance(error, Disagreement):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found.row(f"{case.name}: without {', '.join(case.others)}", said)
        return measure(dataclasses.replace(case, others={}), rounds, seconds, device)


def _said(result: dict[str, Any]) -> tuple[str, str]:
    """Ours, Triton and CUDA C++; everyone else."""
    medians = {name: seconds["median"] for name, seconds in result["seconds"].items()}
    share = f" ({medians[CEILING] / medians[OURS]:.0%} of the ceiling)" if CEILING in medians else ""
    memory = f", {result['temporary_bytes'][OURS] / 2**20:.0f} MiB"
    beside = [f"{name} {_time(median)}" for name, median in medians.items() if name != OURS]
    return _time(medians[OURS]) + share + memory, "; ".join(beside)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms" if seconds < 1 else f"{seconds:.2f} s"
