"""Smoke: every public operation on Triton and on CUDA C++, values and gradients against the reference in float64.

The arguments are those of the fuzz of operations (bench/trust/op_calls.py): shapes from empty to some tokens, options,
dtypes and layouts at random. The seeds are fixed, so that two calls do the same, and their shapes are not empty.
"""

from collections.abc import Iterator
from random import Random

import torch

from bench.backends import BACKENDS, TITLES
from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work, compiled
from bench.trust.op_calls import CALLS, Draw
from bench.trust.op_checks import valid

REAL, TOY = 3, 1  # tries of an operation and back end
VARIANTS = 40  # Triton kernels of the real tries, by dtype and option: assumed


def work(setting: Setting) -> Iterator[Work]:
    """Compilations and launches; the tensors have some thousand bytes."""
    tries = setting.pick(REAL, TOY) * len(CALLS) * len(BACKENDS)
    yield compiled(kernels=setting.pick(VARIANTS, 0))
    yield Work(launches=100 * tries)


def seeds(name: str, number: int, most: int) -> list[str]:
    """The first seeds of an operation whose draw has tokens and sequences, and at most so many tokens."""
    found: list[str] = []
    tried = 0
    while len(found) < number:
        seed, tried = f"{name}/{tried}", tried + 1
        drawn = Draw(Random(seed))
        if 1 < drawn.B * drawn.T <= most:
            found.append(seed)
    return found


def run(setting: Setting, found: Found) -> None:
    """One row for each back end: how many operations are right."""
    number, most = setting.pick((REAL, 119), (TOY, 4))
    for backend, within in BACKENDS.items():
        right = []
        for name in CALLS:
            before = len(found.failures)
            for seed in seeds(name, number, most):
                with found.expecting(f"{seed} on {TITLES[backend]}"), within():
                    valid(name, Random(seed), torch.device(setting.device))
            right += [name] * (len(found.failures) == before)
        said = f"{number} tries each, values and gradients"
        found.row(f"{TITLES[backend]} against float64", f"{len(right)} of {len(CALLS)} operations right", said)
